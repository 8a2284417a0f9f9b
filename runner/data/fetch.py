"""From positions to a batch, as a pure function: the same in a worker or here, now or after a resume. With the global
random generators and the number of threads while samples are read.
"""

import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import Dataset, default_collate, get_worker_info

from runner import signals
from runner.cache import LRUCache
from runner.data.loader import remedy_for
from runner.data.order import Indices, Words, digest_words, splitmix64
from runner.data.plan import Plan, Slice
from runner.errors import DataError
from runner.hashing import derive

Collate = Callable[[list[Any]], Any]

MAX_SUBSTITUTES = 8  # samples that are tried in place of a bad record
_BLOCK = 1024  # neighbouring positions whose indices and seeds are computed together
_RETRY_PAUSES = (0.1, 0.5, 2.0)  # seconds
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_NETWORK_CLIENTS = {"aiohttp", "botocore", "httpcore", "httpx", "requests", "urllib3"}
_BIT_GENERATOR = np.random.MT19937(0)  # numpy's, within ``private_generators``
_SHAPES = "Give all samples the same shape, or set data.collate to a function that makes a batch of a list of them"


class Samples(Protocol):
    """A map-style data set. Optional attributes:

    ``counts``: samples per shard, in order of index; shards are then read almost sequentially, and ``hold(windows,
    window)`` tells the data set how many windows of samples are read in turn. ``lengths``: tokens per sample, for
    ``data.max_tokens``. ``fingerprint``: a text that changes with the data. ``locate(index)``: where a sample is
    stored, for messages.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A sample that could not be read: its place in the storage, the error, and the index of its substitute if any."""

    position: int
    index: int
    location: str
    error: str
    substitute: int | None


class FetchedBatch(NamedTuple):
    """A collated micro-batch, the position of its first sample, and the digest of its samples' indices.

    Digests of slices add up, modulo 2^64, to the digest of all of them. There is no batch if a record in ``bad`` has no
    substitute, or if the collate function raised ``failure``.
    """

    first: int
    batch: Any
    digest: int = 0
    bad: tuple[BadRecord, ...] = ()
    failure: str = ""


def seed_host(key: int) -> None:
    """Seed python, numpy and torch on the CPU. ``rng.seed_all`` seeds the GPUs as well."""
    seed_python_numpy(key)
    torch.default_generator.manual_seed(key)


def seed_python_numpy(key: int) -> None:
    """Seed python's and numpy's global generators."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


class Fetcher(Dataset[Any]):
    """Maps slices of positions to batches.

    Python's, numpy's and torch's generators are seeded from the position before each sample (``randomness=sample``),
    before each batch (``batch``), or never (``off``), and once more before collating. ``label`` gives training and
    evaluation different seeds. A read is repeated after an error that may pass. With ``substitute`` a sample that
    cannot be read is replaced by another, a pure function of the position. Positions in ``substitutions`` take the
    sample recorded there, because the record may be readable when a step is repeated.
    """

    def __init__(
        self, samples: Samples, plan: Plan, *, label: str, collate: Collate | None = None, substitute: bool = False
    ) -> None:
        self.samples = samples
        self.plan = plan
        self.label = label
        self.collate: Collate = collate or default_collate
        self.order = plan.order()
        self.substitute = substitute
        self.substitutions: dict[int, int] = {}  # position -> index
        self.torch_suffices = True  # until a sample draws from python's or numpy's generator
        self._blocks = LRUCache[tuple[Indices, Words, Words]](4)
        self._bad: list[BadRecord] = []  # of the current slice, as is the digest
        self._digest = 0

    def __getitem__(self, item: "Slice | Callable[[Fetcher], Any]") -> Any:
        """The batch of a slice; for a function its result, called with this fetcher in the process that reads."""
        return item(self) if callable(item) else self.batch(item)

    def batch(self, piece: Slice) -> FetchedBatch:
        """The batch of a slice, or why there is none."""
        with sandboxed(draws=self.plan.randomness != "off"), signals.reading():
            try:
                rows = self._rows(piece)
            except _NoSubstituteError as error:
                return FetchedBatch(piece.first, None, bad=error.args)
            if self.plan.randomness != "off":
                seed_host(self._key("collate", piece))
            try:
                batch = self.collate(rows)
            except Exception as error:
                failure = (
                    f"the {len(rows)} samples from position {piece.first} on cannot be collated to a batch:\n"
                    f"{_traceback(error)}\n{remedy_for(error) or _SHAPES}"
                )
                return FetchedBatch(piece.first, None, failure=failure)
            return FetchedBatch(piece.first, batch, self._digest % 2**64, tuple(self._bad))

    def _rows(self, piece: Slice) -> list[Any]:
        if self.plan.randomness == "off":
            return self._draw(piece, lambda key: None)
        if self.plan.randomness == "batch":
            seed_host(self._key("batch", piece))
            return self._draw(piece, lambda key: None)
        if self.torch_suffices:
            # Seeding python's and numpy's generators is most of the cost of seeding, and few data sets use them. So
            # seed only torch's; if a sample has used the others, draw the slice again.
            mark = self._key("mark", piece)
            seed_python_numpy(mark)
            untouched = next_numbers()
            seed_python_numpy(mark)
            rows = self._draw(piece, torch.default_generator.manual_seed)
            if next_numbers() == untouched:
                return rows
            self.torch_suffices = False
        return self._draw(piece, seed_host)

    def _draw(self, piece: Slice, seed: Callable[[int], object]) -> list[Any]:
        """The samples of the slice, each after a call of ``seed`` with the key of its position."""
        rows: list[Any] = []
        self._bad, self._digest = [], 0
        for indices, keys, words in self._lookup(piece):
            self._digest += int(words.sum(dtype=np.uint64))
            for key, index in zip(keys.tolist(), indices.tolist(), strict=True):
                rows.append(self._row(piece.first + len(rows), index, key, seed))
        return rows

    def _lookup(self, piece: Slice) -> Iterator[tuple[Indices, Words, Words]]:
        """Indices, seeds and digest words of a slice, in parts of blocks: a whole one takes hardly longer."""
        for epoch, start, stop in self.plan.spans(piece):
            for number in range(start // _BLOCK, (stop - 1) // _BLOCK + 1):
                first = number * _BLOCK
                part = slice(max(start, first) - first, min(stop, first + _BLOCK) - first)
                indices, keys, words = self._block(epoch, number)
                yield indices[part], keys[part], words[part]

    def _block(self, epoch: int, number: int) -> tuple[Indices, Words, Words]:
        def compute() -> tuple[Indices, Words, Words]:
            places = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.plan.epoch_size))
            indices = self.order(epoch, places)
            keys = splitmix64(places.astype(np.uint64) ^ np.uint64(derive(self.label, self.plan.seed, epoch)))
            return indices, keys, digest_words(epoch * self.plan.epoch_size + places, indices)

        return self._blocks.get((epoch, number), compute)

    def _row(self, position: int, index: int, key: int, seed: Callable[[int], object]) -> Any:
        """The sample of a position, or its substitute. Raises _NoSubstituteError."""
        recorded = self.substitutions.get(position)
        cause = "" if recorded is None else "replaced when this step was done before"
        attempts = range(MAX_SUBSTITUTES if self.substitute else 0)
        substitutes = (derive("substitute", key, attempt) % self.plan.samples for attempt in attempts)
        failed = False
        for chosen in chain([index if recorded is None else recorded], substitutes):
            try:
                row = self.sample(chosen, key, seed)
                if row is None:
                    raise ValueError("__getitem__ returned None; expected a sample")
            except MemoryError:
                raise
            except Exception as error:
                cause, failed = cause if failed else _traceback(error), True
                continue
            if cause:
                self._bad.append(BadRecord(position, index, sample_name(self.samples, index), cause, chosen))
            return row
        raise _NoSubstituteError(BadRecord(position, index, sample_name(self.samples, index), cause, None))

    def sample(self, index: int, key: int, seed: Callable[[int], object] = seed_host) -> Any:
        """A sample, drawn after ``seed(key)``. The read is repeated after an error that may pass."""
        for pause in (*_RETRY_PAUSES, None):
            seed(key)
            try:
                return self.samples[index]
            except Exception as error:
                if pause is None or pause not in _retry_pauses(error):
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _key(self, purpose: str, piece: Slice) -> int:
        return derive(f"{self.label} {purpose}", self.plan.seed, piece.first)


class _NoSubstituteError(Exception):
    """Its argument is a bad record without a substitute. The training process gets it, not a worker's traceback."""


def sample_name(samples: Samples, index: int) -> str:
    """Where a sample is stored, if its data set can tell, else its index."""
    locate = getattr(samples, "locate", None)
    return str(locate(index)) if locate is not None else f"sample {index}"


def bad_record_error(record: BadRecord, samples: Samples, *, remedy: str) -> DataError:
    """The error for a bad record that ends the run."""
    place = f"{record.location} of {type(samples).__qualname__}"
    return DataError(f"{place} cannot be read (position {record.position}):\n{record.error}\n{remedy}")


def _traceback(error: Exception) -> str:
    """An exception and the lines of the user's code that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return "".join(traceback.format_list(frames) + traceback.format_exception_only(error)).rstrip()


def _retry_pauses(error: Exception) -> Sequence[float]:
    """Pauses before further reads: none after an error of the data, one where the cause cannot be told."""
    if isinstance(error, _LASTING):
        return ()
    system_error = isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno)
    if system_error or type(error).__module__.split(".")[0] in _NETWORK_CLIENTS:
        return _RETRY_PAUSES
    return _RETRY_PAUSES[:1] if type(error) is OSError else ()


@contextmanager
def sandboxed(*, draws: bool) -> Iterator[None]:
    """Read samples as a worker process does: on one thread, and, if they draw, without a trace in the generators."""
    if get_worker_info() is not None:
        yield
        return
    with one_thread(), private_generators() if draws else nullcontext():
        yield


def next_numbers() -> tuple[int, bytes]:
    """The next numbers of python's and numpy's generators, which this call advances."""
    return random.getrandbits(64), np.random.bytes(8)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, as in a worker process, because float sums depend on the number of threads."""
    threads = torch.get_num_threads()
    if threads == 1:  # even setting the same number makes later convolutions slower by some per cent
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def private_generators() -> Iterator[None]:
    """Restore the global generators of python, numpy and torch on the CPU after the block."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    generator = get_bit_generator()
    set_bit_generator(_BIT_GENERATOR)  # faster by 60 us than restoring the state of the old one
    try:
        yield
    finally:
        random.setstate(python)
        set_bit_generator(generator)
        if numpy["has_gauss"]:  # changing generators loses the stored gaussian
            np.random.set_state(numpy)
        torch.set_rng_state(torch_state)

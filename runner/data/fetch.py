"""From positions to a batch, as a pure function: the same in a worker or here, now or after a resume."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from runner import signals
from runner.cache import LRUCache
from runner.data.order import Indices, Words, digest_words, splitmix64
from runner.data.plan import Plan, Slice
from runner.data.sandbox import next_numbers, sandboxed, seed_host, seed_python_numpy
from runner.data.workers import remedy_for
from runner.errors import DataError
from runner.hashing import derive

Collate = Callable[[list[Any]], Any]

MAX_SUBSTITUTES = 8  # samples that are tried in place of a bad record
_BLOCK = 1024  # neighbouring positions whose indices and seeds are computed together
_RETRY_PAUSES = (0.1, 0.5, 2.0)  # seconds
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_NETWORK_CLIENTS = {"aiohttp", "botocore", "httpcore", "httpx", "requests", "urllib3"}
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


class Fetcher(Dataset[FetchedBatch]):
    """Maps slices of positions to batches.

    Python's, numpy's and torch's generators are seeded from the position before each sample (``randomness=sample``),
    before each batch (``batch``), or never (``off``), and once more before collating. ``label`` gives training and
    evaluation different seeds. A read is repeated after an error that may pass. With ``substitute`` a sample that
    cannot be read is replaced by another, a pure function of the position. Positions in ``substitutions`` take the
    sample recorded there, because the record may be readable when a step is repeated.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Plan,
        *,
        label: str,
        collate: Collate | None = None,
        substitute: bool = False,
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

    def __getitem__(self, piece: Slice) -> FetchedBatch:
        with sandboxed(draws=self.plan.randomness != "off"), signals.reading():
            try:
                rows = self._rows(piece)
            except _NoSubstituteError as error:
                return FetchedBatch(piece.first, None, bad=(error.record,))
            if self.plan.randomness != "off":
                seed_host(self._key("collate", piece))
            try:
                batch = self.collate(rows)
            except Exception as error:
                return FetchedBatch(piece.first, None, failure=_collate_failure(rows, piece.first, error))
            return FetchedBatch(piece.first, batch, self._digest % 2**64, tuple(self._bad))

    def sample(self, index: int, key: int) -> Any:
        """A sample drawn with the seed ``key``."""
        return self._read(index, key, seed_host)

    def _rows(self, piece: Slice) -> list[Any]:
        if self.plan.randomness == "off":
            return self._draw(piece, _seed_nothing)
        if self.plan.randomness == "batch":
            seed_host(self._key("batch", piece))
            return self._draw(piece, _seed_nothing)
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
        """Indices, seeds and digest words for the positions of a slice, in parts. A whole block of neighbours is
        computed at a time, which takes hardly longer than a few of them.
        """
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
        try:
            row = _require_sample(self._read(index if recorded is None else recorded, key, seed))
        except MemoryError:
            raise
        except Exception as error:
            return self._substitute(position, index, key, seed, error)
        if recorded is not None:
            cause = "replaced when this step was done before"
            self._bad.append(BadRecord(position, index, sample_name(self.samples, index), cause, recorded))
        return row

    def _read(self, index: int, key: int, seed: Callable[[int], object]) -> Any:
        for pause in (*_RETRY_PAUSES, None):
            seed(key)
            try:
                return self.samples[index]
            except Exception as error:
                if pause is None or pause not in _retry_pauses(error):
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _substitute(self, position: int, index: int, key: int, seed: Callable[[int], object], error: Exception) -> Any:
        location, text = sample_name(self.samples, index), _traceback(error)
        for attempt in range(MAX_SUBSTITUTES if self.substitute else 0):
            other = derive("substitute", key, attempt) % self.plan.samples
            try:
                row = _require_sample(self._read(other, key, seed))
            except Exception:
                continue
            self._bad.append(BadRecord(position, index, location, text, other))
            return row
        raise _NoSubstituteError(BadRecord(position, index, location, text, None))

    def _key(self, purpose: str, piece: Slice) -> int:
        return derive(f"{self.label} {purpose}", self.plan.seed, piece.first)


class _NoSubstituteError(Exception):
    """A bad record without a substitute. The training process gets the record, not a worker's traceback."""

    def __init__(self, record: BadRecord) -> None:
        self.record = record


def sample_name(samples: Samples, index: int) -> str:
    """Where a sample is stored, if its data set can tell, else its index."""
    locate = getattr(samples, "locate", None)
    return str(locate(index)) if locate is not None else f"sample {index}"


def bad_record_error(record: BadRecord, samples: Samples, *, remedy: str) -> DataError:
    """The error for a bad record that ends the run."""
    return DataError(
        f"{record.location} of {type(samples).__qualname__} cannot be read (position {record.position}):\n"
        f"{record.error}\n{remedy}"
    )


def _collate_failure(rows: list[Any], first: int, error: Exception) -> str:
    return (
        f"the {len(rows)} samples from position {first} on cannot be collated to a batch:\n{_traceback(error)}\n"
        f"{remedy_for(error) or _SHAPES}"
    )


def _traceback(error: Exception) -> str:
    """An exception and the lines of the user's code that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _require_sample(row: Any) -> Any:
    if row is None:
        raise ValueError("__getitem__ returned None; expected a sample")
    return row


def _retry_pauses(error: Exception) -> Sequence[float]:
    """Pauses before further reads: none after an error of the data, one where the cause cannot be told."""
    if isinstance(error, _LASTING):
        return ()
    package = type(error).__module__.split(".")[0]
    if isinstance(error, ConnectionError | TimeoutError) or package in _NETWORK_CLIENTS:
        return _RETRY_PAUSES
    if isinstance(error, OSError) and error.errno:
        return _RETRY_PAUSES
    return _RETRY_PAUSES[:1] if type(error) is OSError else ()


def _seed_nothing(key: int) -> None:
    pass

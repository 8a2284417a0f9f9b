"""From positions to a batch, as a pure function: the same in a worker or here, now or after a resume."""

import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from runner import signals
from runner.cache import LRUCache
from runner.data.loader import remedy_for
from runner.data.order import digest_words, splitmix64
from runner.data.plan import Plan, Slice
from runner.data.sandbox import changed_generators, one_thread, private_generators, seed_host, seeding
from runner.errors import DataError
from runner.hashing import derive

Collate = Callable[[list[Any]], Any]

MAX_SUBSTITUTES = 8  # samples to try in place of a bad one; if one in ten is bad, all fail in one of 10^8 cases
_MEASURE_EVERY = 8  # batches between two looks at a thread's time on a core, whose clock is slow on some systems
_BLOCK = 4096  # neighbouring positions whose indices and seeds are computed together
_RETRY_PAUSES = (0.1, 0.5, 2.0)  # seconds
_PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_NETWORK_CLIENTS = {"aiohttp", "botocore", "httpcore", "httpx", "requests", "urllib3"}
_COLLATE_REMEDY = "set data.collate to a function that makes a batch of a list of them"


class Samples(Protocol):
    """A map-style data set. Optional attributes:

    ``counts``: samples per shard, in order of index; shards are then read almost sequentially, and ``hold(windows,
    window)`` tells the data set how many windows of samples are read in turn. ``lengths``: tokens per sample, for
    ``data.max_tokens``. ``__getitems__(indices)``: a list of samples, if reading several at once is faster; used if
    samples draw no random numbers, and if at the start it returned those of ``__getitem__``. ``fingerprint``: a text
    that changes with the data. ``locate(index)``: where a sample is stored, for messages.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A sample that could not be read, where it is stored, the error, and the index of its substitute if any."""

    position: int
    index: int
    location: str
    error: str
    substitute: int | None


@dataclass(frozen=True, slots=True)
class ReadTime:
    """How long a batch took to read, and the share of this time on a core if it was measured. Any two are equal, so
    that batches are compared without it.
    """

    seconds: float = field(compare=False)
    busy: float | None = field(compare=False)


class FetchedBatch(NamedTuple):
    """A collated micro-batch, the position of its first sample, and the digest of its samples' indices.

    Digests of slices add up, modulo 2^64, to the digest of all of them. There is no batch if one of the ``bad_records``
    has no substitute, or if the collate function raised ``failure``.
    """

    first: int
    batch: Any
    digest: int = 0
    bad_records: tuple[BadRecord, ...] = ()
    failure: str = ""
    time: ReadTime | None = None


class _Block(NamedTuple):
    """Neighbouring positions; ``digests[n]`` is the digest of the first n of them."""

    indices: list[int]
    keys: list[int]
    digests: list[int]


class Fetcher(Dataset[Any]):
    """Maps slices of positions to batches.

    Python's, numpy's and torch's generators are seeded from the position before each sample (``randomness=sample``),
    before each batch (``batch``), or never (``off``), and once more before a ``collate`` of the user. A generator is
    seeded only after a sample has drawn from it; the slice of this sample is then read again. ``label`` gives training
    and evaluation different seeds. A read is repeated after an error that may pass. With ``substitute`` a sample that
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
        self.by_batch = False  # whether to call ``__getitems__``; decided by ``probe.check_samples``
        self.generators = frozenset[str]()  # names of the random generators that samples have drawn from
        self.timed = False  # whether batches say how long they took to read
        self._reads = 0
        self._blocks = LRUCache[_Block](4)  # neighbouring slices share a block; one may cross into the next
        self._bad_records: list[BadRecord] = []  # bad records of the current slice
        self._digest = 0  # digest of the current slice

    def __getitem__(self, item: "Slice | Callable[[Fetcher], Any]") -> Any:
        """The batch of a slice; for a function its result, called with this fetcher in the process that reads."""
        return item(self) if callable(item) else self.batch(item)

    def batch(self, piece: Slice) -> FetchedBatch:
        """The batch of a slice, or why there is none."""
        with one_thread(), signals.reading():
            if self.plan.randomness == "off":
                return self._batch(piece, self._read)
            seeds_numpy = "numpy" in self.generators or self.collate is not default_collate
            with private_generators(look=seeds_numpy):
                return self._batch(piece, self._read_seeded)

    def _batch(self, piece: Slice, read: Callable[[Slice], list[Any]]) -> FetchedBatch:
        self._reads += 1
        measures = self.timed and self._reads % _MEASURE_EVERY == 1
        began, on_core = time.perf_counter(), time.thread_time() if measures else 0.0
        rows = read(piece)
        if len(rows) < piece.count:
            return FetchedBatch(piece.first, None, bad_records=(self._bad_records[-1],))
        if self.plan.randomness != "off" and self.collate is not default_collate:
            seed_host(self._key("collate", piece))  # else its draws would depend on those of the last sample
        try:
            batch = _collate(rows) if self.collate is default_collate else self.collate(rows)
        except Exception as error:
            failure = (
                f"the {len(rows)} samples from position {piece.first} on cannot be collated to a batch:\n"
                f"{_traceback(error)}\n{self._remedy(error)}"
            )
            return FetchedBatch(piece.first, None, failure=failure)
        read_time = None
        if self.timed:
            seconds = time.perf_counter() - began
            read_time = ReadTime(seconds, (time.thread_time() - on_core) / seconds if measures else None)
        return FetchedBatch(piece.first, batch, self._digest, tuple(self._bad_records), time=read_time)

    def _remedy(self, error: Exception) -> str:
        if self.collate is not default_collate:
            return remedy_for(error) or "data.collate raised it"
        shapes = "give all samples the same shape, or " if "equal size" in str(error) else ""
        return remedy_for(error) or f"To make a batch of them, {shapes}{_COLLATE_REMEDY}"

    def _read_seeded(self, piece: Slice) -> list[Any]:
        """The samples of the slice; read again if one has drawn from a generator that was not seeded."""
        while True:
            seed = seeding(self.generators) if self.generators else None
            if self.plan.randomness == "batch":
                if seed is not None:
                    seed(self._key("batch", piece))
                seed = None
            rows = self._read(piece, seed)
            unseeded = changed_generators() - self.generators
            if not unseeded:
                return rows
            self.generators |= unseeded

    def _read(self, piece: Slice, seed: "Callable[[int], object] | None" = None) -> list[Any]:
        """The samples of the slice, each drawn after ``seed`` was called with the key of its position; those before
        the first sample that has no substitute either.
        """
        indices, keys, self._digest = self._lookup(piece)
        self._bad_records = []
        if seed is None and not self.generators and not self.substitutions:
            try:
                rows = self._items(indices)
            except Exception:  # read one by one below
                rows = [None]
            if not any(map(is_, rows, repeat(None))):
                return rows
        rows = []
        for position, (index, key) in enumerate(zip(indices, keys, strict=True), piece.first):
            row = self._row(position, index, key, seed)
            if row is None:
                break
            rows.append(row)
        return rows

    def _items(self, indices: list[int]) -> list[Any]:
        """The samples, by one call if the data set allows it."""
        if not self.by_batch:
            return [self.samples[index] for index in indices]
        rows = [*self.samples.__getitems__(indices)]  # type: ignore[attr-defined]
        if len(rows) != len(indices):
            raise ValueError("not one sample for each index")
        return rows

    def _lookup(self, piece: Slice) -> tuple[list[int], list[int], int]:
        """Indices, seeds and digest of a slice, from cached blocks: a block takes hardly longer to compute."""
        indices: list[int] = []
        keys: list[int] = []
        digest = 0
        for epoch, start, stop in self.plan.spans(piece):
            for number in range(start // _BLOCK, (stop - 1) // _BLOCK + 1):
                block, first = self._block(epoch, number), number * _BLOCK
                start_in, stop_in = max(start - first, 0), min(stop - first, _BLOCK)
                indices += block.indices[start_in:stop_in]
                keys += block.keys[start_in:stop_in]
                digest += block.digests[stop_in] - block.digests[start_in]
        return indices, keys, digest % 2**64

    def _block(self, epoch: int, number: int) -> "_Block":
        def compute() -> _Block:
            places = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.plan.epoch_size))
            indices = self.order(epoch, places)
            keys = splitmix64(places.astype(np.uint64) ^ np.uint64(derive(self.label, self.plan.seed, epoch)))
            words = digest_words(epoch * self.plan.epoch_size + places, indices)
            return _Block(indices.tolist(), keys.tolist(), [0, *np.cumsum(words, dtype=np.uint64).tolist()])

        return self._blocks.get((epoch, number), compute)

    def _row(self, position: int, index: int, key: int, seed: "Callable[[int], object] | None") -> Any:
        """The sample of a position, or its substitute; None if there is neither."""
        candidate, cause, row = index, "", None
        if position in self.substitutions:
            candidate, cause = self.substitutions[position], "an earlier attempt replaced it in this step"
        for attempt in range(1 + MAX_SUBSTITUTES * self.substitute):
            try:
                row = self.sample(candidate, key, seed)
                if row is None:
                    raise ValueError("__getitem__ returned None; expected a sample")
            except MemoryError:
                raise
            except Exception as error:
                cause = cause if attempt else _traceback(error)
                candidate = derive("substitute", key, attempt) % self.plan.samples
            else:
                break
        if cause:
            substitute = None if row is None else candidate
            self._bad_records.append(BadRecord(position, index, sample_name(self.samples, index), cause, substitute))
        return row

    def sample(self, index: int, key: int, seed: "Callable[[int], object] | None") -> Any:
        """A sample, read after ``seed(key)``, and read again after an error that may pass."""
        attempt = 0
        while True:
            if seed is not None:
                seed(key)
            try:
                return self.samples[index]
            except Exception as error:
                pauses = _retry_pauses(error)[attempt:]
                if not pauses:
                    raise
            time.sleep(pauses[0])
            attempt += 1

    def _key(self, purpose: str, piece: Slice) -> int:
        return derive(f"{self.label} {purpose}", self.plan.seed, piece.first)


def _collate(rows: list[Any]) -> Any:
    """``default_collate``, in half the time for tuples of tensors and integers in the training process."""
    if type(rows[0]) is tuple and get_worker_info() is None:
        try:
            return [_COLUMNS[type(column[0])](column) for column in zip(*rows, strict=True)]
        except Exception:  # torch's function gives the result, or the message
            return default_collate(rows)
    return default_collate(rows)


def _stack(column: Sequence[Tensor]) -> Tensor:
    if column[0].layout is not torch.strided or column[0].is_nested:
        raise ValueError("default_collate refuses it")
    return torch.stack(column)  # type: ignore[arg-type]


_COLUMNS: dict[type, Callable[[Any], Tensor]] = {
    Tensor: _stack,
    int: lambda column: torch.frombuffer(array("q", column), dtype=torch.int64),
}


def sample_name(samples: Samples, index: int) -> str:
    """Where a sample is stored, if its data set can tell, else its index."""
    locate = getattr(samples, "locate", None)
    return str(locate(index)) if locate is not None else f"sample {index}"


def bad_record_error(record: BadRecord, samples: Samples, *, remedy: str) -> DataError:
    """The error for a bad record that ends the run."""
    name = f"{record.location} of {type(samples).__qualname__}"
    return DataError(f"{name} cannot be read (position {record.position}):\n{record.error}\n{remedy}")


def _traceback(error: Exception) -> str:
    """An exception and the lines of the user's code that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return "".join(traceback.format_list(frames) + traceback.format_exception_only(error)).rstrip()


def _retry_pauses(error: Exception) -> Sequence[float]:
    """Pauses before further attempts to read: none if the data itself is wrong, one if the cause is unclear."""
    if isinstance(error, _PERMANENT):
        return ()
    system_error = isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno)
    if system_error or type(error).__module__.split(".")[0] in _NETWORK_CLIENTS:
        return _RETRY_PAUSES
    return _RETRY_PAUSES[:1] if type(error) is OSError else ()

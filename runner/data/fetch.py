"""From positions to a batch, as a pure function: the same in a worker or here, now or after a resume."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from runner import signals
from runner.cache import LRUCache
from runner.data.order import Indices, Words, digest_words, mix
from runner.data.plan import Plan, Slice
from runner.data.sandbox import peek, sandboxed, seed_host, seed_others
from runner.data.workers import remedy
from runner.errors import DataError
from runner.rng import derive

Collate = Callable[[list[Any]], Any]

_BLOCK = 1024  # neighbouring positions that are looked up together
_SHAPES = "Give all samples the same shape, or set data.collate to a function that makes a batch of a list of them"
SUBSTITUTES = 8  # tried for one bad record
_PAUSES = (0.1, 0.5, 2.0)  # seconds before further tries to read a sample
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_BEFORE = "replaced when this step was done before"
_CLIENTS = {"aiohttp", "botocore", "httpcore", "httpx", "requests", "urllib3"}  # packages that read over a network


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
class Bad:
    """A sample that could not be read: where, why, and the sample taken instead (None: nothing was)."""

    position: int
    index: int
    where: str
    why: str
    instead: int | None


class Fetched(NamedTuple):
    """A collated micro-batch, the position of its first sample, and the digest of its samples' indices.

    Digests of slices add up (modulo 2^64) to that of all, in whatever order. ``bad`` tells of samples that could not be
    read; one without a substitute leaves no batch. ``failure`` is the message of a collate function that raised.
    """

    first: int
    batch: Any
    digest: int = 0
    bad: tuple[Bad, ...] = ()
    failure: str = ""


class Fetcher(Dataset[Fetched]):
    """Maps slices of positions to batches.

    Python's, numpy's and torch's generators are seeded from the position before each sample (``randomness=sample``),
    before each batch (``batch``), or never (``off``), and once more before collating. ``label`` gives training and
    evaluation different seeds. A read error that may pass is tried again. With ``substitute`` a sample that cannot be
    read is replaced by another, a pure function of the position; positions in ``recorded`` take the sample that is
    there, because the error may be gone when a step is done again.
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
        self.recorded: dict[int, int] = {}
        self.torch_suffices = True  # until a sample is seen to draw from python's or numpy's generator
        self._blocks = LRUCache[tuple[Indices, Words, Words]](4)
        self._bad: list[Bad] = []  # of the slice being fetched, as is its digest
        self._digest = 0

    def __getitem__(self, piece: Slice) -> Fetched:
        with sandboxed(draws=self.plan.randomness != "off"), signals.reading():
            try:
                rows = self._rows(piece)
            except _Unreadable as error:
                return Fetched(piece.first, None, bad=(error.bad,))
            if self.plan.randomness != "off":
                seed_host(self._key("collate", piece))
            try:
                batch = self.collate(rows)
            except Exception as error:
                return Fetched(piece.first, None, failure=_not_collated(rows, piece.first, error))
            return Fetched(piece.first, batch, self._digest % 2**64, tuple(self._bad))

    def sample(self, index: int, key: int) -> Any:
        """One sample as ``randomness=sample`` draws it with that key."""
        return self._read(index, key, seed_host)

    def _rows(self, piece: Slice) -> list[Any]:
        if self.plan.randomness == "off":
            return self._drawn(piece, _seed_nothing)
        if self.plan.randomness == "batch":
            seed_host(self._key("batch", piece))
            return self._drawn(piece, _seed_nothing)
        if self.torch_suffices:
            # Seeding python's and numpy's generators is most of the cost of seeding, and few data sets use them. So
            # seed only torch's; if the others turn out to have been used, draw the samples again.
            mark = self._key("mark", piece)
            untouched = peek(mark)
            seed_others(mark)
            rows = self._drawn(piece, torch.default_generator.manual_seed)
            if peek() == untouched:
                return rows
            self.torch_suffices = False
        return self._drawn(piece, seed_host)

    def _drawn(self, piece: Slice, seed: Callable[[int], object]) -> list[Any]:
        """The samples of the slice, each after a call of ``seed`` with the key of its position."""
        rows: list[Any] = []
        self._bad, self._digest = [], 0
        for indices, keys, words in self._known(piece):
            self._digest += int(words.sum(dtype=np.uint64))
            for key, index in zip(keys.tolist(), indices.tolist(), strict=True):
                position = piece.first + len(rows)
                instead = self.recorded.get(position) if self.recorded else None
                try:
                    rows.append(_something(self._read(index if instead is None else instead, key, seed)))
                except MemoryError:
                    raise
                except Exception as error:
                    rows.append(self._instead(position, index, key, seed, error))
                else:
                    if instead is not None:
                        self._bad.append(Bad(position, index, location(self.samples, index), _BEFORE, instead))
        return rows

    def _read(self, index: int, key: int, seed: Callable[[int], object]) -> Any:
        """A sample, drawn after a call of ``seed`` with the key."""
        for number in count():
            seed(key)
            try:
                return self.samples[index]
            except Exception as error:
                pauses = _pauses(error)
                if number >= len(pauses):
                    raise
                time.sleep(pauses[number])
        raise AssertionError("unreachable")

    def _known(self, piece: Slice) -> Iterator[tuple[Indices, Words, Words]]:
        """Indices, seeds and parts of the digest for the positions of a slice, part by part. Computed for a block of
        neighbours at a time, which takes hardly longer than for a few of them.
        """
        for epoch, start, stop in self.plan.spans(piece):
            while start < stop:
                number = start // _BLOCK
                block = self._blocks.get((epoch, number), lambda at=(epoch, number): self._block(*at))  # type: ignore[misc]
                end = min(stop, (number + 1) * _BLOCK)
                part = slice(start - number * _BLOCK, end - number * _BLOCK)
                yield block[0][part], block[1][part], block[2][part]
                start = end

    def _block(self, epoch: int, number: int) -> tuple[Indices, Words, Words]:
        places = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.plan.epoch_size))
        indices = self.order(epoch, places)
        keys = mix(places.astype(np.uint64) ^ np.uint64(derive(self.label, self.plan.seed, epoch)))
        return indices, keys, digest_words(epoch * self.plan.epoch_size + places, indices)

    def _instead(self, position: int, index: int, key: int, seed: Callable[[int], object], error: Exception) -> Any:
        """The sample in place of one that cannot be read. Raises _Unreadable if there is none."""
        where, why = location(self.samples, index), _told(error)
        if self.substitute:
            for attempt in range(SUBSTITUTES):
                other = derive("substitute", key, attempt) % self.plan.samples
                try:
                    row = _something(self._read(other, key, seed))
                except Exception:
                    continue
                self._bad.append(Bad(position, index, where, why, other))
                return row
        raise _Unreadable(Bad(position, index, where, why, None))

    def _key(self, purpose: str, piece: Slice) -> int:
        return derive(f"{self.label} {purpose}", self.plan.seed, piece.first)


class _Unreadable(Exception):
    """A bad record without a substitute; sent to the training process as a value instead of a worker's traceback."""

    def __init__(self, bad: Bad) -> None:
        self.bad = bad


def location(samples: Samples, index: int) -> str:
    """Where a sample is stored, if its data set can tell, else its index."""
    locate = getattr(samples, "locate", None)
    return str(locate(index)) if locate is not None else f"sample {index}"


def unreadable(bad: Bad, samples: Samples, *, remedy: str) -> DataError:
    """The error for a bad record that ends the run."""
    return DataError(
        f"{bad.where} of {type(samples).__qualname__} cannot be read (position {bad.position}):\n{bad.why}\n{remedy}"
    )


def _not_collated(rows: list[Any], first: int, error: Exception) -> str:
    return (
        f"the {len(rows)} samples from position {first} on cannot be collated to a batch:\n{_told(error)}\n"
        f"{remedy(error) or _SHAPES}"
    )


def _told(error: Exception) -> str:
    """An exception with the lines of the data set's code that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _something(row: Any) -> Any:
    if row is None:
        raise ValueError("__getitem__ returned None; expected a sample")
    return row


def _pauses(error: Exception) -> Sequence[float]:
    """Before further tries, where the error may pass: none for one of the data, one where that cannot be told."""
    if isinstance(error, _LASTING):
        return ()
    of_network = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _CLIENTS
    if of_network or (isinstance(error, OSError) and error.errno):
        return _PAUSES
    return _PAUSES[:1] if type(error) is OSError else ()


def _seed_nothing(key: int) -> None:
    pass

"""Batches of variable size by a budget of tokens, planned for a whole epoch from the lengths: a pure function of both.

Within pools of ``POOL_SAMPLES`` samples of the epoch's order, samples are sorted by length and cut into batches whose
padded size (longest times count) keeps the budget; then the batches of the pool are shuffled, so that what the order
reads in sequence still is. The plan takes memory in proportion to the samples, as the lengths do.

Which sample is at which position, and which positions form a batch: all that the sample stream depends on besides
the data itself.
"""

import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.cache import LRUCache
from runner.data.mixture import Mixed
from runner.data.order import Indices, Order, Permuted, Streams, Windowed, permutation
from runner.distributed.environment import World
from runner.errors import DataError
from runner.rng import derive

POOL_SAMPLES = 4096


class Budgeted:
    """An order in which samples of like length stand together, and where its batches end.

    No batch has more than ``max_tokens`` tokens, padding included, or ``max_samples`` samples. Raises DataError for a
    sample that is longer than the budget.
    """

    def __init__(
        self, order: Order, lengths: NDArray[np.int64], *, max_tokens: int, max_samples: int, seed: int, shuffle: bool
    ) -> None:
        if len(lengths) != order.size:
            raise DataError(f"data.train has {order.size} samples and {len(lengths)} lengths; give one for each sample")
        if lengths.min() < 0:
            raise DataError(f"sample {int(lengths.argmin())} has a length of {lengths.min()}; lengths count tokens")
        longest = int(lengths.argmax())
        if lengths[longest] > max_tokens:
            raise DataError(
                f"sample {longest} has {lengths[longest]} tokens, more than data.max_tokens={max_tokens}; "
                "cut or leave out such samples, or raise the budget"
            )
        self.size = order.size
        self._order = order
        self._lengths = lengths
        self._max_tokens = max_tokens
        self._max_samples = max_samples
        self._seed = seed
        self._shuffle = shuffle
        self._plans = LRUCache[tuple[Indices, Indices]](2)

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""
        return self._order(epoch, self._plan(epoch)[0][places])

    def passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """As the order underneath."""
        return self._order.passes(epoch, self._plan(epoch)[0][places])

    def ends(self, epoch: int) -> Indices:
        """The places at which the batches of an epoch end, ascending; the last is ``size``."""
        return self._plan(epoch)[1]

    def _plan(self, epoch: int) -> tuple[Indices, Indices]:
        return self._plans.get(epoch, lambda: self._make(epoch))

    def _make(self, epoch: int) -> tuple[Indices, Indices]:
        """The places of the order underneath in the order of this one, and where batches end."""
        lengths = self._lengths[self._order(epoch, np.arange(self.size))]
        batches: list[Indices] = []
        for start in range(0, self.size, POOL_SAMPLES):
            pool = start + np.argsort(lengths[start : start + POOL_SAMPLES], kind="stable")
            cut = np.split(pool, self._cuts(lengths[pool]))
            if self._shuffle:
                cut = [cut[i] for i in permutation(len(cut), "batches", self._seed, epoch, start)]
            batches += cut
        return np.concatenate(batches), np.cumsum([len(batch) for batch in batches])

    def _cuts(self, lengths: NDArray[np.int64]) -> list[int]:
        """Where to cut ascending lengths so that every piece is as large as the budget allows."""
        cuts: list[int] = []
        start = 0
        counts = np.arange(1, self._max_samples + 1)
        while True:
            ahead = lengths[start : start + self._max_samples]
            start += int(np.searchsorted(ahead * counts[: len(ahead)], self._max_tokens, side="right"))
            if start == len(lengths):
                return cuts
            cuts.append(start)


_MOST_BYTES = 1 << 29  # of an unpacked list: a stored plan may be hostile, and a few bytes can expand to many


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive positions of the endless sample stream; one micro-batch."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a mixture: its number of samples, its share of a block's positions, and its samples per shard."""

    samples: int
    share: int
    shards: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that determines which sample is at which position.

    Position q lies in epoch ``q // epoch_size``. A step consumes ``batch_size`` positions in equal slices,
    ``micro_batches`` for each of the ``world.size`` processes: slice k of a step is that of rank ``k % world.size``.
    With ``max_tokens`` (and a length for each sample) slices have as many samples as the budget allows, and a step at
    most ``batch_size``. ``streams`` are for samples that lie in ``shards``, or whose ``sources`` do.
    """

    samples: int
    seed: int
    batch_size: int
    micro_batches: int = 1
    shuffle: bool = True
    tail: str = "carry"
    randomness: str = "sample"
    shards: tuple[int, ...] = ()
    streams: Streams | None = None
    sources: tuple[Source, ...] = ()
    max_tokens: int | None = None
    lengths: tuple[int, ...] = ()
    world: World = field(default=World())

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.micro_batches < 1 or self.batch_size % self.slices_per_step:
            processes = f" in each of {self.world.size} processes" if self.world.size > 1 else ""
            raise DataError(
                f"data.batch_size={self.batch_size} cannot be split into trainer.accumulate={self.micro_batches} equal "
                f"micro-batches{processes}; make the one a multiple of the other"
            )
        for samples, shards in [(self.samples, self.shards), *((one.samples, one.shards) for one in self.sources)]:
            if shards and sum(shards) != samples:
                raise DataError(
                    f"the counts of a data set are the samples in each of its shards; they add up to {sum(shards)}, "
                    f"its length is {samples}. Mend the attribute, or rename it, or set data.streams.count=0"
                )
        if self.tail == "drop" and self.samples < self.batch_size:
            raise DataError(
                f"data.tail=drop drops every sample: there are {self.samples}, data.batch_size={self.batch_size}. "
                "Use data.tail=carry or a smaller batch."
            )
        if self.tail == "drop" and (self.sources or self.max_tokens):
            raise DataError(
                f"data.tail=drop has no meaning for {'a mixture' if self.sources else 'data.max_tokens'}, "
                "whose batches are always whole; use data.tail=carry"
            )

    @property
    def slices_per_step(self) -> int:
        """Micro-batches of all processes."""
        return self.micro_batches * self.world.size

    @property
    def epoch_size(self) -> int:
        """Positions per epoch: all samples, or with ``drop`` those of its full batches."""
        return self.samples - self.samples % self.batch_size if self.tail == "drop" else self.samples

    @property
    def portion(self) -> str:
        """What a step takes, for people."""
        if self.max_tokens is None:
            return f"{self.batch_size} per step"
        return f"up to {self.batch_size} per step and {self.max_tokens} tokens per micro-batch"

    @property
    def guarantee(self) -> str:
        """What holds for the samples of an epoch, for people."""
        if self.tail == "drop":
            return f"each at most once per epoch ({self.samples - self.epoch_size} dropped), any number of workers"
        once = "each exactly once per pass of its source" if self.sources else "each exactly once per epoch"
        split = "; random by batch: another split into batches draws others" if self.randomness == "batch" else ""
        return f"{once}, any number of workers{split}"

    def order(self) -> Order:
        """Which sample stands where."""
        order = self._order()
        if self.max_tokens is None:
            return order
        return Budgeted(
            order,
            np.asarray(self.lengths, dtype=np.int64),
            max_tokens=self.max_tokens,
            max_samples=self.batch_size // self.slices_per_step,
            seed=self.seed,
            shuffle=self.shuffle,
        )

    def steps(self, consumed: int, order: Order) -> Iterator[list[Slice]]:
        """The slices of all processes, step by step from ``consumed`` on, for ever."""
        slices = self._planned(consumed, order) if isinstance(order, Budgeted) else self._equal(consumed)
        while True:
            yield [next(slices) for _ in range(self.slices_per_step)]

    def spans(self, piece: Slice) -> Iterator[tuple[int, int, int]]:
        """The slice as (epoch, first place, end place): one span, or more where it crosses into another epoch."""
        position, end = piece.first, piece.first + piece.count
        while position < end:
            epoch, place = divmod(position, self.epoch_size)
            stop = min(self.epoch_size, place + end - position)
            yield epoch, place, stop
            position += stop - place

    def steps_of(self, epochs: int) -> int | None:
        """The steps after which ``epochs`` are finished; None where batches vary in size."""
        return None if self.max_tokens else -(-epochs * self.epoch_size // self.batch_size)

    def state(self) -> dict[str, Any]:
        """What must not change during a run, with digests in place of long lists. With ``tail=carry`` the batch size
        may change, so it is left out.
        """
        return self._described(_digest)

    def recipe(self) -> dict[str, Any]:
        """The same with the lists themselves, compressed; ``Plan.of`` reconstructs the order of samples from it."""
        return self._described(_packed)

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> "Plan":
        """A plan with the same order of samples as a recipe's; its batches may differ."""
        values = {"batch_size": 1, **recipe, "micro_batches": recipe.get("slices_per_step", 1)}
        values.pop("slices_per_step", None)
        for name in ("shards", "lengths"):
            values[name] = _unpacked(values.get(name))
        values["sources"] = tuple(
            Source(source["samples"], source["share"], _unpacked(source.get("shards")))
            for source in recipe.get("sources", ())
        )
        if "streams" in recipe:
            values["streams"] = Streams(**recipe["streams"])
        return cls(**values)

    def _described(self, long: Callable[[tuple[int, ...]], str]) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: getattr(self, name) for name in ("samples", "seed", "shuffle", "tail", "randomness")
        }
        if self.max_tokens is not None:
            found |= {"max_tokens": self.max_tokens, "lengths": long(self.lengths)}
            found |= {"batch_size": self.batch_size, "slices_per_step": self.slices_per_step}
        elif self.tail == "drop":
            found["batch_size"] = self.batch_size
        if self.shards:
            found["shards"] = long(self.shards)
        if self.sources:
            found["sources"] = [
                {"samples": source.samples, "share": source.share, "shards": long(source.shards)}
                for source in self.sources
            ]
        if self.streams is not None:
            found["streams"] = asdict(self.streams)
        return found

    def _order(self) -> Order:
        if not self.sources:
            return self._single(self.samples, self.shards, self.seed)
        orders = [
            self._single(source.samples, source.shards, derive("source", self.seed, number))
            for number, source in enumerate(self.sources)
        ]
        return Mixed(orders, [source.share for source in self.sources], seed=self.seed)

    def _single(self, samples: int, shards: tuple[int, ...], seed: int) -> Order:
        if shards and self.shuffle and self.streams is not None:
            return Windowed(shards, self.streams, seed=seed)
        return Permuted(samples, seed=seed, shuffle=self.shuffle)

    def _equal(self, consumed: int) -> Iterator[Slice]:
        size = self.batch_size // self.slices_per_step
        while True:
            yield Slice(consumed, size)
            consumed += size

    def _planned(self, consumed: int, order: Budgeted) -> Iterator[Slice]:
        epoch, place = divmod(consumed, self.samples)
        while True:
            ends = order.ends(epoch)
            for end in ends[np.searchsorted(ends, place, side="right") :].tolist():
                yield Slice(epoch * self.samples + place, end - place)
                place = end
            epoch, place = epoch + 1, 0


def _packed(numbers: tuple[int, ...]) -> str:
    return b64encode(zlib.compress(_bytes(numbers))).decode()


def _unpacked(text: str | None) -> tuple[int, ...]:
    """The numbers in a packed text. Raises ValueError for any other text, and for too many numbers."""
    if not text:
        return ()
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(b64decode(text), _MOST_BYTES)
    except zlib.error as error:
        raise ValueError(f"not compressed numbers: {error}") from error
    if not unpacker.eof:
        raise ValueError(f"compressed numbers of more than {_MOST_BYTES} bytes, or cut")
    return tuple(np.frombuffer(raw, dtype="<i8").tolist())


def _digest(numbers: tuple[int, ...]) -> str:
    return blake2b(_bytes(numbers), digest_size=8).hexdigest()


def _bytes(numbers: tuple[int, ...]) -> bytes:
    return np.asarray(numbers, dtype="<i8").tobytes()

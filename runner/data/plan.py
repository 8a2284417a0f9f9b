"""Positions, epochs and steps: which positions make a step, and which place of which epoch a position is."""

import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import numpy as np

from runner.data.order import (
    BudgetOrder,
    Interleaving,
    MixtureOrder,
    Order,
    PermutationOrder,
    WeightedOrder,
    WindowOrder,
)
from runner.distributed.world import World
from runner.errors import DataError
from runner.hashing import derive, hex_digest

_MAX_UNPACKED = 1 << 29  # bytes: a stored plan may be hostile, and a few compressed bytes can expand to many


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive positions of the endless stream of samples: a micro-batch."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Source:
    """A source of a mixture: its number of samples, its positions in a block of the mixture, its samples per shard."""

    samples: int
    share: int
    shards: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the samples of a run depend on, besides the data itself.

    Position q is in epoch ``q // epoch_size``. A step consumes ``batch_size`` positions in equal slices,
    ``micro_batches`` for each of the ``world.size`` processes; slice k of a step belongs to rank ``k % world.size``.
    With ``max_tokens`` (and the length of each sample) a slice has as many samples as the budget allows, and a step at
    most ``batch_size``. ``interleaving`` applies to samples in ``shards``, or in the shards of ``sources``.

    Raises DataError for values that do not fit each other.
    """

    samples: int
    seed: int
    batch_size: int
    micro_batches: int = 1
    shuffle: bool = True
    tail: str = "carry"
    randomness: str = "sample"
    shards: tuple[int, ...] = ()
    interleaving: Interleaving | None = None
    sources: tuple[Source, ...] = ()
    max_tokens: int | None = None
    lengths: tuple[int, ...] = ()
    weights: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # first epoch -> weights from there on
    world: World = field(default=World())

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.micro_batches < 1 or self.batch_size % self.slices_per_step:
            processes = f" in each of {self.world.size} processes" if self.world.size > 1 else ""
            raise DataError(
                f"data.batch_size={self.batch_size} cannot be split into trainer.accumulate={self.micro_batches} equal "
                f"micro-batches{processes}; make it a multiple of {self.slices_per_step}"
            )
        if self.weights and (self.sources or self.shards):
            raise DataError("data.weights are for samples one by one: neither for a mixture nor for samples in shards")
        for numbers in self.weights.values():
            if len(numbers) != self.samples or min(numbers) < 0 or not 0 < sum(numbers) * self.samples < 1 << 63:
                raise DataError(f"the weights do not fit the {self.samples} samples")
        for samples, shards in [(self.samples, self.shards), *((each.samples, each.shards) for each in self.sources)]:
            if shards and sum(shards) != samples:
                raise DataError(
                    f"the counts of a data set are the samples in each of its shards; they add up to {sum(shards)}, "
                    f"its length is {samples}. Fix the attribute, or rename it, or set data.streams.count=0"
                )
        if self.tail == "drop" and self.samples < self.batch_size:
            few = f"there are {self.samples}, data.batch_size={self.batch_size}"
            raise DataError(f"data.tail=drop drops every sample: {few}. Use data.tail=carry or a smaller batch.")
        if self.tail == "drop" and (self.sources or self.max_tokens):
            kind = "a mixture" if self.sources else "data.max_tokens"
            raise DataError(f"data.tail=drop has no meaning for {kind}: batches are always whole; use data.tail=carry")

    @property
    def slices_per_step(self) -> int:
        """Micro-batches of all processes."""
        return self.micro_batches * self.world.size

    @property
    def epoch_size(self) -> int:
        """Positions per epoch: all samples, or with ``tail=drop`` the samples in full batches."""
        return self.samples - self.samples % self.batch_size if self.tail == "drop" else self.samples

    @property
    def guarantee(self) -> str:
        """The promise about the samples of an epoch, for the log."""
        tokens = f" and {self.max_tokens} tokens per micro-batch" if self.max_tokens is not None else ""
        step = f"{self.samples} samples, {'up to ' if tokens else ''}{self.batch_size} per step{tokens}"
        if self.tail == "drop" and not self.weights:
            dropped = self.samples - self.epoch_size
            return f"{step}; each at most once per epoch ({dropped} dropped), any number of workers"
        once = "each exactly once per pass of its source" if self.sources else "each exactly once per epoch"
        once = "each as often as data.weights say, rounded up or down" if self.weights else once
        split = "; random by batch: another split into batches draws others" if self.randomness == "batch" else ""
        return f"{step}; {once}, any number of workers{split}"

    def order(self) -> Order:
        """The order of samples."""
        if self.sources:
            seeds = [derive("source", self.seed, number) for number in range(len(self.sources))]
            orders = [
                self._source_order(s.samples, s.shards, seed) for s, seed in zip(self.sources, seeds, strict=True)
            ]
            order: Order = MixtureOrder(orders, [source.share for source in self.sources], seed=self.seed)
        else:
            order = self._source_order(self.samples, self.shards, self.seed)
        if self.weights:
            order = WeightedOrder(order, self.weights, seed=self.seed)
        if self.max_tokens is None:
            return order
        return BudgetOrder(
            order,
            np.asarray(self.lengths, dtype=np.int64),
            max_tokens=self.max_tokens,
            max_samples=self.batch_size // self.slices_per_step,
            seed=self.seed,
            shuffle=self.shuffle,
        )

    def steps(self, consumed: int, order: Order) -> Iterator[list[Slice]]:
        """The slices of all processes, step by step from position ``consumed`` on, endlessly."""
        size = self.batch_size // self.slices_per_step
        slices: Iterator[Slice] = (Slice(first, size) for first in count(consumed, size))
        if isinstance(order, BudgetOrder):
            slices = self._budget_slices(consumed, order)
        while True:
            yield [next(slices) for _ in range(self.slices_per_step)]

    def spans(self, piece: Slice) -> list[tuple[int, int, int]]:
        """The slice as (epoch, first place, end place), split where an epoch ends."""
        position, end, size = piece.first, piece.first + piece.count, self.epoch_size
        spans = []
        while position < end:
            epoch, place = divmod(position, size)
            stop = min(size, place + end - position)
            spans.append((epoch, place, stop))
            position += stop - place
        return spans

    def steps_of(self, epochs: int) -> int | None:
        """The number of steps that finish ``epochs`` epochs; None where the size of batches varies."""
        return None if self.max_tokens else -(-epochs * self.epoch_size // self.batch_size)

    def state(self) -> dict[str, Any]:
        """The values that must not change during a run, lists as digests. With ``carry`` the batch size may change."""
        return self._values(lambda numbers: hex_digest(_bytes(numbers)))

    def recipe(self) -> dict[str, Any]:
        """The same values with compressed lists; ``Plan.of`` reconstructs the order of samples from it."""
        return self._values(_pack)

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> "Plan":
        """The plan of a recipe, except its batches. Raises ValueError, TypeError, KeyError or DataError."""
        values = {"batch_size": 1, **recipe, "micro_batches": recipe.get("slices_per_step", 1)}
        values.pop("slices_per_step", None)
        values |= {name: _unpack(values.get(name)) for name in ("shards", "lengths")}
        sources = recipe.get("sources", ())
        values["weights"] = {int(epoch): _unpack(text) for epoch, text in dict(recipe.get("weights", ())).items()}
        values["sources"] = tuple(Source(s["samples"], s["share"], _unpack(s.get("shards"))) for s in sources)
        streams = values.pop("streams", None)  # its name in the configuration
        values["interleaving"] = Interleaving(**streams) if streams is not None else None
        return cls(**values)

    def _values(self, encode_list: Callable[[tuple[int, ...]], str]) -> dict[str, Any]:
        names = "samples", "seed", "shuffle", "tail", "randomness"
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.max_tokens is not None:
            values |= {"max_tokens": self.max_tokens, "lengths": encode_list(self.lengths)}
            values |= {"batch_size": self.batch_size, "slices_per_step": self.slices_per_step}
        elif self.tail == "drop":
            values["batch_size"] = self.batch_size
        if self.shards:
            values["shards"] = encode_list(self.shards)
        if self.weights:
            values["weights"] = {str(epoch): encode_list(weights) for epoch, weights in self.weights.items()}
        if self.sources:
            values["sources"] = [asdict(source) | {"shards": encode_list(source.shards)} for source in self.sources]
        if self.interleaving is not None:
            values["streams"] = asdict(self.interleaving)
        return values

    def _source_order(self, samples: int, shards: tuple[int, ...], seed: int) -> Order:
        if shards and self.shuffle and self.interleaving is not None:
            return WindowOrder(shards, self.interleaving, seed=seed)
        return PermutationOrder(samples, seed=seed, shuffle=self.shuffle)

    def _budget_slices(self, consumed: int, order: BudgetOrder) -> Iterator[Slice]:
        epoch, place = divmod(consumed, self.samples)
        while True:
            ends = order.ends(epoch)
            for end in ends[np.searchsorted(ends, place, side="right") :].tolist():
                yield Slice(epoch * self.samples + place, end - place)
                place = end
            epoch, place = epoch + 1, 0


def _pack(numbers: tuple[int, ...]) -> str:
    return b64encode(zlib.compress(_bytes(numbers))).decode()


def _unpack(text: str | None) -> tuple[int, ...]:
    """The inverse of ``_pack``. Raises ValueError for any other text, and for too many numbers."""
    if not text:
        return ()
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(b64decode(text), _MAX_UNPACKED)
    except zlib.error as error:
        raise ValueError(f"not compressed numbers: {error}") from error
    if not unpacker.eof:
        raise ValueError(f"truncated, or compressed numbers of more than {_MAX_UNPACKED} bytes")
    return tuple(np.frombuffer(raw, dtype="<i8").tolist())


def _bytes(numbers: tuple[int, ...]) -> bytes:
    return np.asarray(numbers, dtype="<i8").tobytes()

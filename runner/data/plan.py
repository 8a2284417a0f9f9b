"""Which positions make which batch: arithmetic on a counter."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from runner.errors import DataError


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive positions of the endless sample stream; one micro-batch."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides which sample stands where, beside the data itself.

    Position q lies in epoch ``q // epoch_size``. A step consumes ``batch_size`` positions, in ``micro_batches`` equal
    slices.
    """

    samples: int
    seed: int
    batch_size: int
    micro_batches: int = 1
    shuffle: bool = True
    tail: str = "carry"
    randomness: str = "sample"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.micro_batches < 1 or self.batch_size % self.micro_batches:
            raise DataError(
                f"data.batch_size={self.batch_size} cannot be split into trainer.accumulate={self.micro_batches} equal "
                "micro-batches; make the one a multiple of the other"
            )
        if self.tail == "drop" and self.samples < self.batch_size:
            raise DataError(
                f"data.tail=drop drops every sample: there are {self.samples}, data.batch_size={self.batch_size}. "
                "Use data.tail=carry or a smaller batch."
            )

    @property
    def epoch_size(self) -> int:
        """Positions per epoch: all samples, or with ``drop`` those of its full batches."""
        return self.samples - self.samples % self.batch_size if self.tail == "drop" else self.samples

    @property
    def guarantee(self) -> str:
        """What holds for the samples of an epoch, for people."""
        if self.tail == "drop":
            return f"each at most once per epoch ({self.samples - self.epoch_size} dropped), any number of workers"
        return "each exactly once per epoch, any number of workers"

    def slices(self, consumed: int) -> Iterator[Slice]:
        """The micro-batches from ``consumed`` on, for ever."""
        size = self.batch_size // self.micro_batches
        while True:
            yield Slice(consumed, size)
            consumed += size

    def spans(self, piece: Slice) -> Iterator[tuple[int, int, int]]:
        """The slice as (epoch, first place, end place): one span, or more where it crosses into another epoch."""
        position, end = piece.first, piece.first + piece.count
        while position < end:
            epoch, place = divmod(position, self.epoch_size)
            stop = min(self.epoch_size, place + end - position)
            yield epoch, place, stop
            position += stop - place

    def steps(self, epochs: float) -> int:
        """The steps after which ``epochs`` are finished."""
        return -(-int(epochs * self.epoch_size) // self.batch_size)

    def state(self) -> dict[str, Any]:
        """What must not change while a run lives. Under ``carry`` that leaves out how positions are grouped into
        batches.
        """
        state = asdict(self)
        del state["micro_batches"]
        if self.tail == "carry":
            del state["batch_size"]
        return state

"""What a training loop needs from the other processes, with the implementation for a single process.

``Team`` has the exchanges of every step; ``Parallelism`` says how the model is distributed over the processes. Imports
nothing of ``torch.distributed``, which a single process does not need and which costs a second.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from runner import signals
from runner.distributed.communicator import SINGLE_PROCESS, Communicator
from runner.distributed.world import World

if TYPE_CHECKING:
    from torch import Tensor

    from runner.distributed.stall import Stall


@dataclass(frozen=True, slots=True)
class StepReport:
    """The report of one process after a step; combined over all processes it is the answer of ``Team.exchange``.

    ``digest`` and ``swaps`` describe the samples that were read (``TrainingStream.step_samples``), ``elapsed`` is
    the training time on rank 0 in seconds, ``metrics`` are the names of the step's metrics.
    """

    digest: int
    swaps: str
    elapsed: float
    metrics: tuple[str, ...]


class Team(Protocol):
    """The processes of a run. All of them make the same calls in the same order.

    ``comm`` is the communicator of the training thread. ``stop`` is the name of the stop signal that any process had
    received at the last ``exchange`` or ``poll``.
    """

    world: World
    comm: Communicator

    @property
    def stop(self) -> str | None: ...

    def channel(self, name: str) -> Communicator:
        """A communicator for another thread, of that name."""

    def begin(self, device: Any) -> None:
        """Set up process groups for tensors on that device."""

    def exchange(self, report: StepReport) -> StepReport:
        """Combine the reports of all processes; once after every step."""

    def poll(self) -> str | None:
        """The stop signal that any process has received, or None."""

    def union(self, names: Sequence[str]) -> list[str]:
        """The names of all processes, each once, in the same order on all."""

    def sum_tensors(self, values: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """The sums over all processes, in double precision; all processes pass the same names."""

    def rest(self) -> None:
        """Training is over: the timeout does not hold any more."""

    def on_failure(self, last_words: Callable[[str, int], None]) -> None:
        """Register a function that the watchdog calls with the reason before it ends this process."""

    def blame_peer(self) -> AbstractContextManager[Any]:
        """Within the block, an error that follows from the failure of another process becomes PeerFailed."""


class SingleProcessTeam:
    """The team of a single process. From ``begin`` on, ``stall`` watches that training moves."""

    def __init__(self, *, timeout: float = inf, patience: float = 0.0) -> None:
        self.world = World()
        self.comm: Communicator = SINGLE_PROCESS
        self._limits = timeout, patience
        self._stall: Stall | None = None

    @property
    def stop(self) -> str | None:
        return signals.received()

    def channel(self, name: str) -> Communicator:
        return SINGLE_PROCESS

    def begin(self, device: Any) -> None:
        from runner.distributed.stall import Stall

        self._stall = Stall(*self._limits)

    def exchange(self, report: StepReport) -> StepReport:
        self.poll()
        return report

    def poll(self) -> str | None:
        if self._stall is not None:
            self._stall.note_progress()
        return signals.received()

    def union(self, names: Sequence[str]) -> list[str]:
        return [*names]

    def sum_tensors(self, values: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        return values

    def rest(self) -> None:
        if self._stall is not None:
            self._stall.rest()

    def on_failure(self, last_words: Callable[[str, int], None]) -> None:
        if self._stall is not None:
            self._stall.last_words = last_words

    def blame_peer(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def leave(self) -> None:
        """The run has ended, with or without an error."""
        if self._stall is not None:
            self._stall.close()


class Parallelism(Protocol):
    """How the model is distributed over the processes. All processes make the same calls in the same order."""

    description: str  # for the log; empty for a single process

    def iterate(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        """The micro-batches of a step, marked so that only the last backward pass reduces gradients over processes."""

    def reduce_gradients(self) -> None:
        """After the last backward pass: finish the reduction, so that every gradient is the sum over all processes."""

    def full_tensor(self, value: "Tensor") -> "Tensor":
        """The full tensor of a value of which each process may hold a slice."""

    def all_true(self, verdict: "Tensor") -> "Tensor":
        """Whether ``verdict`` (bool, shape []) is true in all processes."""

    def sync_buffers(self) -> None:
        """After a step: copy rank 0's buffers, such as running means, to all processes."""

    def optimizer_part(self, optimizer: Any) -> Any:
        """The optimizer in the form in which the training state saves it."""


class SingleDevice:
    """A single process with the whole model."""

    description = ""

    def iterate(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        return micro_batches

    def reduce_gradients(self) -> None:
        pass

    def full_tensor(self, value: "Tensor") -> "Tensor":
        return value

    def all_true(self, verdict: "Tensor") -> "Tensor":
        return verdict

    def sync_buffers(self) -> None:
        pass

    def optimizer_part(self, optimizer: Any) -> Any:
        return optimizer

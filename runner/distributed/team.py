"""What a training loop needs from the other processes, with the implementation for a single process.

``Team`` has the exchanges of every step; ``Parallelism`` says how the model is distributed over the processes. Imports
nothing of ``torch.distributed``, which a single process does not need and which costs a second.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any

from runner import signals
from runner.distributed.communicator import SINGLE_PROCESS, Communicator
from runner.distributed.world import World

if TYPE_CHECKING:
    from torch import Tensor

    from runner.distributed.watchdog import Stall


@dataclass(frozen=True, slots=True)
class StepReport:
    """The report of one process after a step; combined over all processes it is the answer of ``Team.exchange``."""

    digest: int  # of the samples that were read (``TrainingStream.step_samples``), like ``substitutions``
    substitutions: str
    elapsed: float  # training time on rank 0 in seconds
    metrics: tuple[str, ...]  # names


class Team:
    """The processes of a run, which all make the same calls in the same order; this class is a single process."""

    watch: "Stall | None" = None  # watches that training moves; of a single process from ``begin`` on

    def __init__(self, *, timeout: float = inf, patience: float = 0.0) -> None:
        self.world = World()
        self.comm: Communicator = SINGLE_PROCESS  # of the training thread
        self._timeout = timeout
        self._patience = patience

    @property
    def stop(self) -> str | None:
        """The name of the stop signal that any process had received at the last ``exchange`` or ``poll``."""
        return signals.received()

    def channel(self, name: str) -> Communicator:
        """A communicator for another thread, of that name."""
        return SINGLE_PROCESS

    def begin(self, device: Any) -> None:
        """Set up process groups for tensors on that device, before the first attempt."""
        from runner.distributed.watchdog import Stall

        self.watch = self.watch or Stall(self._timeout, self._patience)

    def exchange(self, report: StepReport) -> StepReport:
        """Combine the reports of all processes; once after every step."""
        self.poll()
        return report

    def poll(self) -> str | None:
        """The stop signal that any process has received, or None."""
        if self.watch is not None:
            self.watch.note_progress()
        return signals.received()

    def union(self, names: Sequence[str]) -> list[str]:
        """The names of all processes, each once, in the same order on all."""
        return [*dict.fromkeys(chain.from_iterable(self.all_gather([*names])))]

    def sum_tensors(self, values: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """The sums over all processes, in double precision; all processes pass the same names."""
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes, which may hold tensors on the CPU, in the order of the ranks."""
        return [value]

    def disarm_timeout(self) -> None:
        """Training is over: the timeout does not hold any more."""
        if self.watch is not None:
            self.watch.disarm()

    def on_failure(self, last_words: Callable[[str, int], None]) -> None:
        """Register a function that is called with reason and exit status before ``watch`` ends this process."""
        if self.watch is not None:
            self.watch.last_words = last_words

    def blame_peer(self) -> AbstractContextManager[Any]:
        """Within the block, an error that follows from the failure of another process becomes PeerFailed."""
        return nullcontext()


class Parallelism:
    """How the model is distributed over the processes of a team; this class is a single process with all of it."""

    description = ""  # for the log

    def iterate(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        """The micro-batches of a step, marked so that only the last backward pass reduces gradients over processes."""
        return micro_batches

    def reduce_gradients(self) -> None:
        """After the last backward pass: finish the reduction, so that every gradient is the sum over all processes."""

    def full_tensor(self, value: "Tensor") -> "Tensor":
        """The full tensor of a value of which each process may hold a slice."""
        return value

    def all_true(self, verdict: "Tensor") -> "Tensor":
        """Whether ``verdict`` (bool, shape []) is true in all processes."""
        return verdict

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        return [value]

    def sync_buffers(self) -> None:
        """After a step: copy rank 0's buffers, such as running means, to all processes."""

    def optimizer_part(self, optimizer: Any) -> Any:
        """The optimizer in the form in which the training state saves it."""
        return optimizer

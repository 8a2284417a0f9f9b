"""What processes of a run exchange, and the implementations for a single process.

``Communicator`` exchanges JSON values: rank 0 decides, and an error on one rank is an error on all. ``Team`` has the
exchanges of every step. ``Parallelism`` says how the model is distributed over the processes. Imports nothing of
``torch.distributed``, which a single process does not need and which costs a second.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from runner import signals
from runner.distributed.world import World
from runner.errors import RunnerError, kind_of

if TYPE_CHECKING:
    from torch import Tensor

    from runner.distributed.watchdog import Stall


class Communicator:
    """Exchanges JSON values among ``size`` ranks, which all call the same methods in the same order; this class is for
    a run of one process. An instance belongs to one thread: messages of the commit thread and of the training
    thread must not mix.
    """

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0 the values of all ranks, in the order of the ranks; None on the others."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0; the values that other ranks pass are ignored."""
        return value

    def describe_wait(self) -> str:
        """For error messages, from any thread: the rank that a running exchange waits for, and where that rank is."""
        return ""


SINGLE_PROCESS = Communicator()


class PerRank(dict[str, Any]):
    """A state dict that differs between ranks, such as the state of the random generators."""


T = TypeVar("T")


def on_rank_zero(comm: Communicator, work: Callable[[], Any]) -> Any:
    """Do ``work`` on rank 0 only, and return its result (a JSON value) on all ranks. If it raises, all ranks raise: a
    RunnerError of the same class, any other error as RunnerError::

        names = on_rank_zero(comm, lambda: commits(location))  # one listing, the same names everywhere
    """
    if comm.size == 1:
        return work()
    own_report, error = _try(work) if comm.rank == 0 else (None, None)
    report = comm.broadcast(own_report)
    _raise(report["error"], error)
    return report["value"]


def on_all_ranks(comm: Communicator, work: Callable[[], T]) -> T:
    """Do ``work`` on every rank, and return this rank's result once all ranks are done. If one raises, all raise::

    on_all_ranks(comm, lambda: model.load_state_dict(state))  # all ranks have loaded, or none goes on
    """
    results: list[T] = []
    gather(comm, lambda: results.append(work()))
    return results[0]


def gather(comm: Communicator, work: Callable[[], Any]) -> list[Any] | None:
    """Do ``work`` on every rank; returns the results (JSON values) of all ranks on rank 0, and None on the others. If
    it raises on any rank, all ranks raise, with the number of that rank in the message.
    """
    if comm.size == 1:
        return [work()]
    report, error = _try(work, comm.rank)
    reports = comm.gather(report)
    failure = next((report["error"] for report in reports or () if report["error"]), None)
    _raise(comm.broadcast(failure), error)
    return None if reports is None else [report["value"] for report in reports]


def _try(work: Callable[[], Any], rank: int | None = None) -> tuple[dict[str, Any], Exception | None]:
    """The report for the other ranks, and the error, which is raised later: the others wait for the report."""
    try:
        return {"value": work(), "error": None}, None
    except Exception as error:
        text, status = f"{type(error).__name__}: {error}", RunnerError.status
        if isinstance(error, RunnerError):
            text, status = str(error), error.status
        text = text if rank is None else f"rank {rank}: {text}"
        facts = {"class": type(error).__name__, "kind": kind_of(error), "status": status}
        return {"value": None, "error": {**facts, "text": text}}, error


def _raise(message: dict[str, Any] | None, own_error: Exception | None) -> None:
    """Raise the error in ``message``, if there is one. ``own_error`` is the error of this rank."""
    if message is None:
        return
    classes = {kind.__name__: kind for kind in _with_subclasses(RunnerError)}
    if own_error is not None and message["class"] not in classes:
        raise own_error
    error = classes.get(message["class"], RunnerError)(message["text"])
    error.kind, error.status = message["kind"], message["status"]
    raise error from own_error


def _with_subclasses(kind: type[RunnerError]) -> list[type[RunnerError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _with_subclasses(child))]


@dataclass(frozen=True, slots=True)
class StepReport:
    """The report of one process after a step; ``Team.exchange`` combines the reports of all processes."""

    digest: int  # this and ``substitutions`` describe the samples that were read (``TrainingStream.step_samples``)
    substitutions: str
    elapsed: float  # training time on rank 0 in seconds
    metrics: tuple[str, ...]  # names of the step's metrics


class Team:
    """The processes of a run, which all make the same calls in the same order; this class is a single process."""

    watch: "Stall | None" = None  # ends the run if training stalls; a single process has one from ``begin`` on

    def __init__(self, *, timeout: float = inf, patience: float = 0.0) -> None:
        self.world = World()
        self.comm: Communicator = SINGLE_PROCESS  # for the training thread
        self._timeout = timeout
        self._patience = patience

    @property
    def stop(self) -> str | None:
        """The name of the stop signal that any process had received at the last ``exchange`` or ``poll``."""
        return signals.received()

    def channel(self, name: str) -> Communicator:
        """The communicator for the thread ``name``."""
        return SINGLE_PROCESS

    def begin(self, device: Any) -> None:
        """Set up process groups for tensors on ``device``, before the first attempt."""
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
        """Training is over: the timeout no longer holds."""
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
        """The full tensor of a value that may be sliced over the processes."""
        return value

    def all_true(self, verdict: "Tensor") -> "Tensor":
        """Whether ``verdict`` (bool, shape []) is true in all processes."""
        return verdict

    def sync_buffers(self) -> None:
        """After a step: copy rank 0's buffers, such as running means, to all processes."""

    def optimizer_part(self, optimizer: Any) -> Any:
        """The optimizer in the form in which the training state saves it."""
        return optimizer

"""How the processes of a run exchange values and act as one: rank 0 decides, an error on one rank is one on all.

Knows nothing of the transport, which is a network store and a process group, or threads in a test.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from runner.errors import RunnerError, kind_of


class Communicator:
    """The place of this process among ``size`` ranks; this class is that of a run with one process. All ranks call the
    same methods in the same order; values are JSON values. An instance belongs to one thread: messages of the
    checkpoint writer must not mix with those of the training thread.
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
    own, error = _attempt(work) if comm.rank == 0 else (None, None)
    report = comm.broadcast(own)
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
    report, error = _attempt(work, comm.rank)
    reports = comm.gather(report)
    failed = next((report["error"] for report in reports or () if report["error"]), None)
    _raise(comm.broadcast(failed), error)
    return None if reports is None else [report["value"] for report in reports]


def _attempt(work: Callable[[], Any], rank: int | None = None) -> tuple[dict[str, Any], Exception | None]:
    """The report for the other ranks, and the error, which is raised later: the others wait for the report."""
    try:
        return {"value": work(), "error": None}, None
    except Exception as error:
        text = str(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}"
        text = text if rank is None else f"rank {rank}: {text}"
        return {"value": None, "error": {"class": type(error).__name__, "text": text, "kind": kind_of(error)}}, error


def _raise(message: dict[str, Any] | None, own: Exception | None) -> None:
    """Raise the error in ``message``, if there is one. ``own`` is the error of this rank."""
    if message is None:
        return
    classes = {kind.__name__: kind for kind in _with_subclasses(RunnerError)}
    if own is not None and message["class"] not in classes:
        raise own
    error = classes.get(message["class"], RunnerError)(message["text"])
    error.kind = message["kind"]
    raise error from own


def _with_subclasses(kind: type[RunnerError]) -> list[type[RunnerError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _with_subclasses(child))]

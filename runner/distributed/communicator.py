"""How the processes of one run exchange values, and how they act as one: rank 0 decides, an error on one rank is an
error on all.

Knows nothing of the transport, which is a network store and a process group, or threads in a test.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from runner.errors import RunnerError, kind_of


class Communicator(Protocol):
    """The place of this process among ``size`` ranks. All ranks call the same methods in the same order; values are
    JSON values.

    An instance belongs to one thread: messages of the checkpoint writer must not mix with those of the training thread.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0 the values of all ranks, in the order of the ranks; None on the others."""

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0; the values that other ranks pass are ignored."""

    def describe_wait(self) -> str:
        """For error messages, from any thread: the rank that a running exchange waits for, and where that rank is."""


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """The communicator of a run with one process."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def describe_wait(self) -> str:
        return ""


class PerRank(dict[str, Any]):
    """A state dict that differs between ranks, such as the state of the random generators."""


SINGLE_PROCESS = SingleProcess()


T = TypeVar("T")
Kinds = tuple[type[Exception], ...]


def on_rank_zero(comm: Communicator, work: Callable[[], Any], *, kinds: Kinds = ()) -> Any:
    """Do ``work`` on rank 0 only, and return its result (a JSON value) on all ranks.

    If it raises, all ranks raise: a RunnerError and one of ``kinds`` as that class, any other error as RunnerError::

        names = on_rank_zero(comm, lambda: commits(location))  # one listing, the same names everywhere
    """
    if comm.size == 1:
        return work()
    value, error = _attempt(work) if comm.rank == 0 else (None, None)
    report = comm.broadcast({"value": value, "error": None if error is None else _message(error)})
    _raise(report["error"], error, kinds)
    return report["value"]


def on_all_ranks(comm: Communicator, work: Callable[[], T], *, kinds: Kinds = ()) -> T:
    """Do ``work`` on every rank, and return this rank's result once all ranks are done. If one raises, all raise::

    on_all_ranks(comm, lambda: model.load_state_dict(state))  # all ranks have loaded, or none goes on
    """
    results: list[T] = []
    gather(comm, lambda: results.append(work()), kinds=kinds)
    return results[0]


def gather(comm: Communicator, work: Callable[[], Any], *, kinds: Kinds = ()) -> list[Any] | None:
    """Do ``work`` on every rank; returns the results (JSON values) of all ranks on rank 0, and None on the others.

    If it raises on any rank, all ranks raise, with the number of that rank in the message.
    """
    if comm.size == 1:
        return [work()]
    value, error = _attempt(work)
    reports = comm.gather({"value": value, "error": None if error is None else _message(error, comm.rank)})
    failed = next((report["error"] for report in reports or () if report["error"]), None)
    _raise(comm.broadcast(failed), error, kinds)
    return None if reports is None else [report["value"] for report in reports]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # raised later: the other ranks wait for this rank's message
        return None, error


def _message(error: Exception, rank: int | None = None) -> dict[str, Any]:
    text = str(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}"
    text = text if rank is None else f"rank {rank}: {text}"
    return {"class": type(error).__name__, "text": text, "kind": kind_of(error)}


def _raise(message: dict[str, Any] | None, own: Exception | None, kinds: Kinds) -> None:
    """Raise the error in ``message``, if there is one. ``own`` is the error of this rank."""
    if message is None:
        return
    every: Kinds = (RunnerError, *_subclasses(RunnerError), *kinds)
    classes = {kind.__name__: kind for kind in every}
    if own is not None and message["class"] not in classes:
        raise own
    error: Any = classes.get(message["class"], RunnerError)(message["text"])
    if isinstance(error, RunnerError):
        error.kind = message["kind"]
    raise error from own


def _subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)

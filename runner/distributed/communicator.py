"""The interface between the processes of one run: which rank this process is, and how ranks exchange values.

Knows nothing of the transport: a network store and a process group, or threads in a test.

Communicator that act as one: rank 0 decides for all of them, and what fails on one rank fails on all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from runner.errors import RunnerError, kind_of


class Communicator(Protocol):
    """One of ``size`` ranks. All ranks call the same methods in the same order; values are JSON values.

    An instance belongs to one thread: messages of the checkpoint writer must not mix with those of the training thread.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0 the values of all ranks, in their order; None on the others."""

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0; the values that other ranks pass are ignored."""

    def describe_wait(self) -> str:
        """For error messages, from any thread: the rank that a running exchange waits for, and where that rank is."""


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """The only process of a run."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def describe_wait(self) -> str:
        return ""


class PerRank(dict[str, Any]):
    """A state dict that differs from rank to rank, such as that of the random generators."""


SINGLE_PROCESS = SingleProcess()


T = TypeVar("T")
Kinds = tuple[type[Exception], ...]


def on_rank_zero(comm: Communicator, work: Callable[[], Any], *, kinds: Kinds = ()) -> Any:
    """Do ``work`` on rank 0 only, and return its result (a JSON value) on all ranks.

    If it raises, all ranks raise: a RunnerError and one of ``kinds`` as that class, any other error as RunnerError.
    """
    if comm.size == 1:
        return work()
    value, error = _tried(work) if comm.rank == 0 else (None, None)
    told = comm.broadcast({"value": value, "error": None if error is None else _told(error)})
    _raise(told["error"], error, kinds)
    return told["value"]


def on_all_ranks(comm: Communicator, work: Callable[[], T], *, kinds: Kinds = ()) -> T:
    """Do ``work`` on every rank; returns this rank's result once all are done. If one rank raises, all ranks raise."""
    found: list[T] = []
    gather(comm, lambda: found.append(work()), kinds=kinds)
    return found[0]


def gather(comm: Communicator, work: Callable[[], Any], *, kinds: Kinds = ()) -> list[Any] | None:
    """Do ``work`` on every rank; returns the results (JSON values) of all ranks on rank 0, and None on the others.

    If it raises on any rank, all ranks raise, with the number of that rank in the message.
    """
    if comm.size == 1:
        return [work()]
    value, error = _tried(work)
    reports = comm.gather({"value": value, "error": None if error is None else _told(error, comm.rank)})
    failed = next((report["error"] for report in reports or () if report["error"]), None)
    _raise(comm.broadcast(failed), error, kinds)
    return None if reports is None else [report["value"] for report in reports]


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # raised later: the other ranks wait for this one's message
        return None, error


def _told(error: Exception, rank: int | None = None) -> dict[str, Any]:
    text = str(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}"
    text = text if rank is None else f"rank {rank}: {text}"
    return {"class": type(error).__name__, "text": text, "kind": kind_of(error)}


def _raise(told: dict[str, Any] | None, own: Exception | None, kinds: Kinds) -> None:
    """Raise the error that ``told`` describes, if any. ``own`` is this rank's own error, if it had one; without one the
    raised error is marked as from ``elsewhere``, so that only one rank prints it.
    """
    if told is None:
        return
    every: Kinds = (RunnerError, *_below(RunnerError), *kinds)
    found = {kind.__name__: kind for kind in every}.get(told["class"])
    if found is None and own is not None:
        raise own
    error: Any = (found or RunnerError)(told["text"])
    if isinstance(error, RunnerError):
        error.kind = told["kind"]
    error.elsewhere = own is None
    raise error from own


def _below(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)

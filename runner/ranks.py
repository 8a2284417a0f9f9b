"""The interface between the processes of one run: which rank this process is, and how ranks exchange values.

Knows nothing of the transport: a network store and a process group, or threads in a test.
"""

from dataclasses import dataclass
from typing import Any, Protocol


class Ranks(Protocol):
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

    def awaited(self) -> str:
        """For error messages, from any thread: the rank that a running exchange waits for, and where that rank is."""


@dataclass(frozen=True, slots=True)
class Alone:
    """The only process of a run."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def awaited(self) -> str:
        return ""


class Own(dict[str, Any]):
    """A state dict that differs from rank to rank, such as that of the random generators."""


ALONE = Alone()

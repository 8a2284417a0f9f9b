"""The processes of one run, as few words as possible: who this one is, and how they tell each other something.

Knows nothing of how: over a network store, or among threads in a test.
"""

from dataclasses import dataclass
from typing import Any, Protocol


class Ranks(Protocol):
    """One of ``size`` ranks, which all call the same verbs in the same order.

    Values are those of JSON. An instance belongs to one thread: what the thread that writes tells must not come between
    what training tells.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0 the values of all ranks, in their order; None on the others."""

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0; those of others are not looked at."""

    def awaited(self) -> str:
        """For people, from any thread: the rank that an exchange waits for, or this one, and where it is."""


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
    """The state dict of a part that each rank has to itself, like its random generators."""


ALONE = Alone()

"""What the loop asks of the other processes, and the answers of a process that is alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from runner import signals
from runner.distributed.world import World
from runner.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class News:
    """What one process has to tell after a step; and, as an answer, what all of them know together.

    ``digest`` and ``swaps`` are of the samples it read (``Stream.read``), ``elapsed`` is that of rank 0, ``metrics``
    the names of what the step measured.
    """

    digest: int
    swaps: str
    elapsed: float
    metrics: tuple[str, ...]


class Team(Protocol):
    """The processes of a run. All of them make the same calls in the same order.

    ``ranks`` is for the training thread. ``stop`` is the stop signal that all know of: what ``exchange`` and ``poll``
    found last.
    """

    world: World
    ranks: Ranks

    @property
    def stop(self) -> str | None: ...

    def channel(self, name: str) -> Ranks:
        """For another thread."""

    def begin(self, device: Any) -> None:
        """Be ready to add up tensors of that device."""

    def exchange(self, news: News) -> News:
        """Once after every step."""

    def poll(self) -> str | None:
        """The stop signal that arrived anywhere, if one did."""

    def union(self, names: Sequence[str]) -> list[str]:
        """All names that some process has, in one order."""

    def added(self, values: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Scalars of the same names, added up over all processes in double precision."""

    def rest(self) -> None:
        """From now on nobody is missed who takes long."""

    def at_failure(self, last_words: Callable[[str], None]) -> None:
        """Have this called with the reason, if this process must end and cannot do so by itself."""

    def explaining(self) -> AbstractContextManager[Any]:
        """Within, an error that is but the consequence of another process's becomes OthersFailed."""


class Alone:
    """The team of one."""

    def __init__(self) -> None:
        self.world = World()
        self.ranks: Ranks = ALONE

    @property
    def stop(self) -> str | None:
        return signals.received()

    def channel(self, name: str) -> Ranks:
        return ALONE

    def begin(self, device: Any) -> None:
        pass

    def exchange(self, news: News) -> News:
        return news

    def poll(self) -> str | None:
        return signals.received()

    def union(self, names: Sequence[str]) -> list[str]:
        return [*names]

    def added(self, values: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        return values

    def rest(self) -> None:
        pass

    def at_failure(self, last_words: Callable[[str], None]) -> None:
        pass

    def explaining(self) -> AbstractContextManager[Any]:
        return nullcontext()

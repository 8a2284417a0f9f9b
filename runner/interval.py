"""When a periodic action is due."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Interval:
    """Due every ``steps`` steps, ``epochs`` epochs or ``seconds`` seconds, whichever comes first; None: never.

    Steps and epochs depend on the position alone, so an action is due at the same steps in a resumed run as in an
    uninterrupted one. Seconds depend on the clock: use them only for actions that do not change the results.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def due(self, step: int, *, epochs_before: int = 0, epochs: int = 0) -> bool:
        """Whether it is due after ``step``, which raised the finished epochs from ``epochs_before`` to ``epochs``."""
        if self.steps is not None and step % self.steps == 0:
            return True
        if self.epochs is not None and epochs // self.epochs > epochs_before // self.epochs:
            return True
        return self.seconds is not None and self.clock() - self._since >= self.seconds

    def restart(self) -> None:
        """Count the seconds from now."""
        self._since = self.clock()


@dataclass(slots=True)
class CostBudget:
    """Due as often as possible while the cost of the action (reported by ``spent``) stays below ``share`` of the time.

    The seconds between two actions are at least ``least`` and at most ``most``; the first is due after ``least``.
    """

    share: float = 0.01
    least: float = 10.0
    most: float = 3600.0
    clock: Callable[[], float] = time.monotonic
    _since: float = field(init=False)
    _pause: float = field(init=False)

    def __post_init__(self) -> None:
        self._since, self._pause = self.clock(), self.least

    def due(self) -> bool:
        """Whether it is time again."""
        return self.clock() - self._since >= self._pause

    def restart(self) -> None:
        """Count from now."""
        self._since = self.clock()

    def spent(self, seconds: float) -> None:
        """Report the cost of the last action in seconds."""
        self._pause = min(max(seconds / self.share, self.least), self.most)

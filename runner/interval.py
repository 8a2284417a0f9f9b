"""When something is due, apart from what it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Interval:
    """Every so many steps, epochs or seconds, whichever comes first; what is ``None`` never comes.

    Steps and epochs are pure functions of the position, so a resumed run is due where the uninterrupted one is.
    Seconds are of this process's monotonic clock and may only drive what leaves no trace in the results.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def due(self, step: int, *, epochs_before: int = 0, epochs: int = 0) -> bool:
        """Whether the moment after ``step`` is due; the two epoch counts are of epochs finished before and after it."""
        if self.steps is not None and step % self.steps == 0:
            return True
        if self.epochs is not None and epochs // self.epochs > epochs_before // self.epochs:
            return True
        return self.seconds is not None and self.clock() - self._since >= self.seconds

    def restart(self) -> None:
        """Count the seconds from now."""
        self._since = self.clock()


@dataclass(slots=True)
class Affordable:
    """Due as often as keeps what is ``spent`` on it below ``share`` of the time.

    ``least`` and ``most`` are seconds between two; the first comes after ``least``.
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
        """What the last one cost."""
        self._pause = min(max(seconds / self.share, self.least), self.most)

"""Waiting for other processes and threads."""

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def until(
    condition: Callable[[], Any],
    *,
    seconds: float = 240,
    process: "subprocess.Popen[Any] | None" = None,
    log: Path | None = None,
) -> Any:
    """Wait until ``condition`` returns a true value, and return it. Fails after so many seconds, or once ``process``
    has ended, and then shows the file ``log``.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, log and log.read_text(errors="replace")
        assert time.monotonic() < deadline, log and log.read_text(errors="replace")
        time.sleep(0.02)
    return value


class Clock:
    """In place of the module ``time`` where the runner watches the beats of another machine: pauses take no time.

    ``pause`` is called in each pause. In sum they may last for ``seconds``, after which ``late`` is raised.
    """

    def __init__(
        self,
        pause: Callable[[], object] = lambda: None,
        *,
        seconds: float = 60,
        late: type[BaseException] = TimeoutError,
    ) -> None:
        self.pause = pause
        self.paused = 0.0
        self._seconds, self._late = seconds, late
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        """Real time and all pauses."""
        return time.monotonic() + self.paused

    def time(self) -> float:
        """The time of day."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """A pause."""
        with self._lock:
            self.paused += seconds
            if self.paused > self._seconds:
                raise self._late(f"pauses of {self.paused} s")
            self.pause()

"""Waiting for other processes and threads."""

import subprocess
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

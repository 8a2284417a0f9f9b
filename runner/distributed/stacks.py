"""The stacks of data workers, written by each on SIGQUIT into a file in memory that the training process reads.

Not to stderr, where the lines of workers would mix. The C code of ``faulthandler`` writes also while Python is stuck.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

_NAME = "worker-stacks"
_POLL_SECONDS = 0.02
_files: list[IO[bytes]] = []


def write_on_request() -> None:
    """Called in a data worker: write its stacks whenever ``request`` is called with its pid. Linux only."""
    with suppress(Exception):  # no such call, too many open files
        file = os.fdopen(os.memfd_create(_NAME), "wb", buffering=0)
        faulthandler.register(signal.SIGQUIT, file)
        _files.append(file)  # registered by its number: it must stay open


def request(pids: Iterable[int], seconds: float) -> dict[int, str]:
    """The stacks of those processes that write them within ``seconds``: pid -> text, innermost frames first."""
    files = {pid: path for pid in pids for path in _find(pid)}
    for pid in files:
        with suppress(OSError):
            os.kill(pid, signal.SIGQUIT)
    until = time.monotonic() + seconds
    while not all(map(_complete, files, files.values())) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return {pid: text for pid, path in files.items() if (text := _read(path))}


def _find(pid: int) -> list[Path]:
    with suppress(OSError):
        files = Path(f"/proc/{pid}/fd").iterdir()
        return [file for file in files if os.readlink(file).startswith(f"/memfd:{_NAME}")][-1:]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:  # the process has ended
        return ""


def _complete(pid: int, path: Path) -> bool:
    """Whether a process waits again after it has written. Writing into memory is no wait."""
    try:
        return bool(_read(path)) and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return True

"""Requests to stop, noted by a handler and acted on at a step boundary.

Nothing happens inside a handler: an exception or an exit from there could leave half a file behind. Signals belong
to the process, so this is the one module with global state.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from runner.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
NAMES = frozenset(number.name for number in STOP_SIGNALS)

_received: str | None = None
_arrived: list[str] = []
_before: dict[str, Any] = {}


def install() -> None:
    """Note the stop signals from now on, but not SIGHUP under nohup. Does nothing outside the main thread, where Python
    forbids handlers.
    """
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            before = signal.signal(number, _note)
            if before is not _note:
                _before[number.name] = before


def hand_over() -> None:
    """Call the handlers that were installed before ours for the signals that arrived, and forget these signals.

    For use after everything is committed: submitit's handler then queues the job again. May end the process, or raise.
    """
    global _received
    arrived = [*_arrived]
    _arrived.clear()
    _received = None
    for name in arrived:
        handler = _before.get(name)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(signal.Signals[name], None)


def request(name: str) -> None:
    """Act as if the stop signal of that name had arrived."""
    global _received
    _received = _received or name


def ignore() -> None:
    """Ignore the stop signals; for data workers, which also receive the terminal's Ctrl-C and Slurm's SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> str | None:
    """The name of the stop signal that arrived, if one did."""
    return _received


def raise_if_received(where: str) -> None:
    """Raise Interrupted if a stop signal arrived; for places where nothing has to be committed first."""
    if _received is not None:
        raise Interrupted(f"{_received} {where}; run the same command again to go on")


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if number == signal.SIGINT and _received == "SIGINT":  # the second Ctrl-C: do not wait for the step
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    _received = signal.Signals(number).name
    _arrived.append(_received)

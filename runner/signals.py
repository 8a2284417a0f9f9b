"""Requests to stop, noted by a handler and acted on at a step boundary.

Nothing happens inside a handler: an exception or an exit from there could leave half a file behind. There are two
exceptions. Where data is waited for or read, which may last for ever, a stop signal raises ``Stopped``. And a second
SIGTERM or Ctrl-C ends the process, whatever it does. Signals belong to the process, so this is the one module with
global state.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from runner.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
NAMES = frozenset(number.name for number in STOP_SIGNALS)

_PATIENCE_SECONDS = 10.0  # for the batch that a begun step waits for
# torchrun, timeout(1) and schedulers send the same signal twice: to the process, and to its group.
_TWICE_SECONDS = {signal.SIGTERM: 0.5, signal.SIGINT: 0.0}
if "TORCHELASTIC_RUN_ID" in os.environ:
    _TWICE_SECONDS = dict.fromkeys(_TWICE_SECONDS, 5.0)
_WAKE = signal.SIGURG  # ignored by default

_received: str | None = None
_arrived: list[str] = []
_before: dict[str, Any] = {}
_first: dict[str, float] = {}  # when the first of the signals that end the process twice came to the handler, the guard
_late = False  # no more patience
_at_once = False
_reading: Callable[[], None] | None = None  # raises what else ends the wait
_pipe: tuple[int, int] | None = None


class Stopped(BaseException):
    """A stop signal arrived where data is read. No Exception, because the data set's code would handle it."""


def install() -> None:
    """Note the stop signals from now on, but not SIGHUP under nohup. Does nothing outside the main thread, where Python
    forbids handlers.
    """
    global _pipe
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            before = signal.signal(number, _note)
            if before is not _note:
                _before[number.name] = before
        signal.signal(_WAKE, _look)
        if _pipe is None:
            _pipe = os.pipe()
            os.set_blocking(_pipe[1], False)
            signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=_guard, args=[_pipe[0]], name="signals", daemon=True).start()


def hand_over() -> None:
    """Call the handlers that were installed before ours for the signals that arrived, and forget these signals.

    For use after everything is committed: submitit's handler then queues the job again. May end the process, or raise.
    """
    arrived = [*_arrived]
    _forget()
    for name in arrived:
        handler = _before.get(name)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(signal.Signals[name], None)


def request(name: str) -> None:
    """Act as if the stop signal of that name had arrived."""
    global _received
    if _received is None:
        _received = name
        _hurry()
        wake()


def ignore() -> None:
    """Ignore the stop signals; for data workers, which also receive the terminal's Ctrl-C and Slurm's SIGTERM. Not by
    SIG_IGN, which programs that they start would inherit.
    """
    _forget()
    for number in STOP_SIGNALS:
        signal.signal(number, _pass)
        signal.siginterrupt(number, False)


def received() -> str | None:
    """The name of the stop signal that arrived, if one did."""
    return _received


def raise_if_received(where: str) -> None:
    """Raise Interrupted if a stop signal arrived; for places where nothing has to be committed first."""
    if (name := received()) is not None:
        raise Interrupted(f"{name} {where}; run the same command again to go on")


@contextmanager
def at_once(really: bool = True) -> Iterator[None]:
    """Within the block nothing is half done: reading data there is broken off at once, and elsewhere after a while."""
    global _at_once
    before, _at_once = _at_once, really
    try:
        yield
    finally:
        _at_once = before


@contextmanager
def reading(broken: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block, data is read or waited for: a stop signal raises Stopped there. So does whatever ``broken``
    raises, which is called after a signal or ``wake``.
    """
    global _reading
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _reading
    try:
        _reading = broken
        _stop()
        yield
    finally:
        _reading = before


def wake() -> None:
    """Interrupt the main thread in what it waits for, so that it looks why."""
    if signal.getsignal(_WAKE) is _look:
        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)


def _stop() -> None:
    global _reading
    if _reading is not None and _received is not None and (_at_once or _late):
        _reading = None  # once: what follows must not be broken off
        raise Stopped(_received)


def _look(number: int, frame: FrameType | None) -> None:
    _stop()
    if _reading is not None:
        _reading()


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if _again(number, "handler"):  # do not wait for the step
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if _received is None:
        _hurry()
    _received = signal.Signals(number).name
    _arrived.append(_received)
    _stop()


def _again(number: int, witness: str) -> bool:
    """Whether this is the second signal, which ends the process."""
    if number not in _TWICE_SECONDS:
        return False
    now = time.monotonic()
    if witness not in _first:
        _first[witness] = now
        return False
    return now - _first[witness] >= _TWICE_SECONDS[signal.Signals(number)]


def _hurry() -> None:
    """Lose patience in a while with a step that waits for data."""

    def lose() -> None:
        global _late
        _late = _received is not None
        wake()

    timer = threading.Timer(_PATIENCE_SECONDS, lose)
    timer.daemon = True
    timer.start()


def _guard(arrivals: int) -> None:
    """End the process at the second signal also where the main thread does not come to run a handler."""
    while numbers := os.read(arrivals, 64):
        for number in numbers:
            if _again(number, "guard"):
                time.sleep(1.0)  # for the handler, which ends it by the signal itself
                os._exit(128 + number)


def _pass(number: int, frame: FrameType | None) -> None:
    pass


def _forget() -> None:
    global _received, _late
    _received, _late = None, False
    _arrived.clear()
    _first.clear()


def _block() -> None:
    """Before a fork: a signal that reaches the child before its handlers are put back would be swallowed."""
    _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop(threading.get_ident()))


def _put_back() -> None:
    """In a forked child of somebody's code: it ends by signals, as its parent expects."""
    global _pipe, _reading, _at_once
    _forget()
    _reading, _at_once = None, False
    for number in (*STOP_SIGNALS, _WAKE):
        if signal.getsignal(number) in (_note, _look, _pass):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            ignored = _before.get(number.name) is signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN if ignored else default)
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        for end in _pipe:
            os.close(end)
        _pipe = None
    _unblock()


_masks: dict[int, Any] = {}  # by thread
os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_put_back)

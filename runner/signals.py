"""Requests to stop, noted by a signal handler and acted on at a step boundary.

The handler only sets a flag, since raising or exiting there could leave half a file behind. It does more in two cases:
it ends a read of data, which may last forever, by raising ``Stopped``; and it ends the process at a second SIGTERM or
Ctrl-C. Signals belong to the process, so this module has global state.
What follows, from the signal to the exit, is described in ``app``.

Signals reach only processes of the same machine: to its jobs elsewhere a sweep sends a ``StopRequest``.
"""

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from runner.errors import Interrupted, StorageError
from runner.storage.location import Location

SWEEP_VARIABLE = "HYDRA_RUNNER_SWEEP"  # environment variable of a job: the name of its sweep's stop request

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
NAMES = frozenset(number.name for number in STOP_SIGNALS)

_PATIENCE_SECONDS = 10.0  # for the batch that a begun step waits for
# torchrun, timeout(1) and schedulers send one signal twice, to the process and to its group: only after this many
# seconds is another signal a second request.
_REPEAT_SECONDS = {signal.SIGTERM: 0.5, signal.SIGINT: 0.0}
if "TORCHELASTIC_RUN_ID" in os.environ:
    _REPEAT_SECONDS = dict.fromkeys(_REPEAT_SECONDS, 5.0)
_WAKE = signal.SIGURG  # ignored by default

_stop_name: str | None = None  # of the last stop signal or request
_arrivals: list[str] = []  # names of all stop signals
_previous: dict[str, Any] = {}  # signal name -> handler before ``install``
_first_times: dict[str, float] = {}  # time of the first SIGTERM or Ctrl-C, by observer: the handler or the guard
_is_deadline_over = False  # whether a step must not wait for data any longer
_reads_end_at_once = False  # see ``stop_reads``
_wait_check: Callable[[], None] | None = None  # within ``reading``: raises other reasons to end the wait
_wakeup_pipe: tuple[int, int] | None = None  # Python writes the number of each signal into it, and ``_guard`` reads

_LIMIT = 1 << 10  # bytes of a stop request
_LISTEN_SECONDS = 0.2
_parents: dict[int, int] = {}  # pid -> pid of its parent at the first call of ``orphaned``


class Stopped(BaseException):
    """A stop signal arrived while data was read. No Exception, because the data set's code might handle it."""


def install() -> None:
    """Note the stop signals from now on, but not SIGHUP under nohup. Does nothing outside the main thread, where Python
    forbids handlers.
    """
    global _wakeup_pipe
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            previous = signal.signal(number, _handle_stop)
            if previous is not _handle_stop:
                _previous[number.name] = previous
        signal.signal(_WAKE, _handle_wake)
        if _wakeup_pipe is None:
            _wakeup_pipe = os.pipe()
            os.set_blocking(_wakeup_pipe[1], False)
            signal.set_wakeup_fd(_wakeup_pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=_guard, args=[_wakeup_pipe[0]], name="signals", daemon=True).start()


def call_previous_handlers() -> None:
    """Call the handlers that were installed before ``install`` for the signals that arrived, and forget the signals.

    For use after everything is committed: submitit's handler then queues the job again. May end the process, or raise.
    """
    names = [*_arrivals]
    _forget()
    for name in names:
        if callable(handler := _previous.get(name)) and handler is not signal.default_int_handler:
            handler(signal.Signals[name], None)


def request(name: str) -> None:
    """Act as if the stop signal of that name had arrived."""
    global _stop_name
    if _stop_name is None:
        _stop_name = name
        _start_deadline()
        wake()


def ignore() -> None:
    """Ignore the stop signals; for data workers, which also receive the terminal's Ctrl-C and Slurm's SIGTERM. Not by
    SIG_IGN, which programs that they start would inherit.
    """
    _forget()
    for number in STOP_SIGNALS:
        signal.signal(number, _ignore)
        signal.siginterrupt(number, False)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def received() -> str | None:
    """The name of the stop signal that arrived, if one did."""
    return _stop_name


def raise_if_received(where: str) -> None:
    """Raise Interrupted if a stop signal arrived; for places where nothing has to be committed first."""
    if (name := received()) is not None:
        raise Interrupted(f"{name} {where}; run the same command again to continue")


class stop_reads:  # noqa: N801
    """Within the block, a stop signal ends reads of data ``at_once``, because no step is half done. Otherwise, and
    outside, it ends them only at the deadline, so that a step can be finished.

    A class, as is ``reading``: each step has some of these blocks, and a generator takes twice as long.
    """

    def __init__(self, *, at_once: bool = True) -> None:
        self._at_once = at_once

    def __enter__(self) -> None:
        global _reads_end_at_once
        self._before, _reads_end_at_once = _reads_end_at_once, self._at_once

    def __exit__(self, *error: object) -> None:
        global _reads_end_at_once
        _reads_end_at_once = self._before


class reading:  # noqa: N801
    """Within the block, data is read or waited for, and a stop signal raises Stopped. ``check`` is called after a
    signal or ``wake``, and may raise other reasons to end the wait.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check

    def __enter__(self) -> None:
        global _wait_check
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if not self._in_main_thread:
            return
        self._before, _wait_check = _wait_check, self._check
        try:
            _raise_if_stopped()
        except BaseException:
            _wait_check = self._before
            raise

    def __exit__(self, *error: object) -> None:
        global _wait_check
        if self._in_main_thread:
            _wait_check = self._before


def wake() -> None:
    """Interrupt a wait of the main thread, so that it calls the ``check`` of ``reading``."""
    if signal.getsignal(_WAKE) is _handle_wake:
        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A sweep's request to its jobs to stop: an object under the root of the runs. It exists from the moment when the
    sweep receives a signal until the sweep has ended; every sweep uses a new name.
    """

    location: Location
    name: str = field(default_factory=lambda: f"s{secrets.token_hex(8)}")

    @contextmanager
    def forward_signals(self) -> Iterator[None]:
        """Within the block, write the request once this process has received a stop signal."""

        def forward() -> bool:
            if name := received():
                self.location.replace(self._object, [name.encode()])
            return name is not None

        with _repeating(forward, _LISTEN_SECONDS):
            yield

    def withdraw(self) -> None:
        """Remove the request, after the last job that could obey it has ended."""
        with suppress(StorageError):
            self.location.remove(self._object)

    @contextmanager
    def obey(self) -> Iterator[None]:
        """Within the block, the request stops this process like a signal. So does the death of its parent, because then
        nobody else could stop it.
        """
        orphaned()  # remembers the parent

        def check() -> bool:
            stop = orphaned() or self.location.read(self._object, limit=_LIMIT) is not None
            if stop:
                request("SIGTERM")
            return stop

        with suppress(StorageError):
            check()
        with _repeating(check, self.location.beat_seconds):
            yield

    @property
    def _object(self) -> str:
        return f"sweeps/{self.name}.stop"


def orphaned() -> bool:
    """Whether the parent that this process had at the first call is gone."""
    return _parents.setdefault(os.getpid(), os.getppid()) != os.getppid()


@contextmanager
def _repeating(action: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Within the block, call ``action`` every ``seconds`` in a thread until it returns True."""
    end = threading.Event()

    def work() -> None:
        while not end.wait(seconds):
            with suppress(StorageError):
                if action():
                    return

    thread = threading.Thread(target=work, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()


def _raise_if_stopped() -> None:
    global _wait_check
    if _wait_check is not None and _stop_name is not None and (_reads_end_at_once or _is_deadline_over):
        _wait_check = None  # raise once: the clean-up must not be broken off
        raise Stopped(_stop_name)


def _handle_wake(number: int, frame: FrameType | None) -> None:
    _raise_if_stopped()
    if _wait_check is not None:
        _wait_check()


def _handle_stop(number: int, frame: FrameType | None) -> None:
    global _stop_name
    if _note_and_is_second(number, "handler"):  # do not wait for the step
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if _stop_name is None:
        _start_deadline()
    _stop_name = signal.Signals(number).name
    _arrivals.append(_stop_name)
    _raise_if_stopped()


def _note_and_is_second(number: int, observer: str) -> bool:
    """Whether this is the second signal, which ends the process."""
    if number not in _REPEAT_SECONDS:
        return False
    now = time.monotonic()
    if observer not in _first_times:
        _first_times[observer] = now
        return False
    return now - _first_times[observer] >= _REPEAT_SECONDS[signal.Signals(number)]


def _start_deadline() -> None:
    """Start the time in which a step may still wait for data."""
    timer = threading.Timer(_PATIENCE_SECONDS, _end_deadline)
    timer.daemon = True
    timer.start()


def _end_deadline() -> None:
    global _is_deadline_over
    _is_deadline_over = _stop_name is not None
    wake()


def _guard(pipe: int) -> None:
    """End the process at the second signal even if the main thread never returns to Python to run a handler."""
    while numbers := os.read(pipe, 64):
        for number in numbers:
            if _note_and_is_second(number, "guard"):
                time.sleep(1.0)  # for the handler, which ends the process by the signal itself
                os._exit(128 + number)


def _forget() -> None:
    global _stop_name, _is_deadline_over
    _stop_name, _is_deadline_over = None, False
    _arrivals.clear()
    _first_times.clear()


def _block() -> None:
    """Before a fork: the child would swallow a signal that arrives before its handlers are restored."""
    _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop(threading.get_ident()))


def _restore_handlers() -> None:
    """In a child that a user's code forked: it ends by signals, as its parent expects."""
    global _wakeup_pipe, _wait_check, _reads_end_at_once
    _forget()
    _wait_check, _reads_end_at_once = None, False
    for number in (*STOP_SIGNALS, _WAKE):
        if signal.getsignal(number) in (_handle_stop, _handle_wake, _ignore):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            ignored = _previous.get(number.name) is signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN if ignored else default)
    if _wakeup_pipe is not None:
        signal.set_wakeup_fd(-1)
        for end in _wakeup_pipe:
            os.close(end)
        _wakeup_pipe = None
    _unblock()


_masks: dict[int, Any] = {}  # by thread
os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_restore_handlers)

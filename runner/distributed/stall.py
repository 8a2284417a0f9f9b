"""The watchdog of a run of one process: if training stands still, it says what every thread does and ends the process.

Twice a second a thread adds up the time since the last step or evaluation batch: for steps, for batches, and for what
may take ``patience`` longer, which is saving and the end of an evaluation. Building the parts is not watched. What
takes long by right does not count: compiling, reading again to resume, a debugger; nor the time for which the process
was stopped or the machine slept.
"""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch

from runner.distributed import outside
from runner.distributed.watchdog import JOINS, SAVES, activity, end_process, stack

_LOOK_SECONDS = 0.5
_SLACK_SECONDS = 5.0  # longer wait from outside, so that the thread speaks first
_DUMP_SECONDS = 2.0  # for data workers to print where they are
_STEP, _BATCH, _END, _SAVE = "no step", "no batch of an evaluation", "no end of an evaluation", "no end of a save"
_EVALUATION = f"{Path(__file__).parents[1]}/evaluation.py"
_AGAIN = f"{Path(__file__).parents[1]}/data/"
_TORCH = Path(torch.__file__).parent
_COMPILERS = {f"{_TORCH}/_dynamo/convert_frame.py", f"{_TORCH}/_inductor/compile_fx.py"}
_DEBUGGERS = ("/pdb.py", "/bdb.py", "/pydevd.py")


class Stall:
    """The watchdog's thread, for the thread that made it. ``last_words`` is called with the reason before the end."""

    def __init__(self, timeout: float, patience: float) -> None:
        self.last_words: Callable[[str], None] = lambda reason: None
        self._timeout = timeout
        self._patience = patience
        self._training = threading.get_ident()
        self._watching = False  # from the first step or batch on
        self._moved = False
        self._telling = threading.Lock()
        self._outside = _Outside(timeout + _SLACK_SECONDS)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall", daemon=True)
        self._thread.start()

    def note_progress(self) -> None:
        """A step or a batch is done; costs nothing but the first time."""
        first, self._watching, self._moved = not self._watching, True, True
        if first:  # from this thread: the next step may keep Python's lock before the other one looks
            self._tell_outside()

    def rest(self) -> None:
        """Training is over."""
        self._watching = False

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(2 * _LOOK_SECONDS)
        self._watching = False
        self._tell_outside()

    def _tell_outside(self) -> None:
        with self._telling:
            self._outside.tell(watching=self._watching)

    def _watch(self) -> None:
        spent: Counter[str] = Counter()
        last = time.monotonic()
        while not self._ended.wait(_LOOK_SECONDS):
            self._tell_outside()
            # More has not passed for the training thread either, whatever the clock says: both were stopped.
            passed, last = min(time.monotonic() - last, 2 * _LOOK_SECONDS), time.monotonic()
            if self._moved or not self._watching:
                spent.clear()
                self._moved = False
                continue
            what = self._lacks()
            if what is None:
                continue
            spent[what] += passed  # type: ignore[assignment]
            if spent[what] > self._timeout + self._patience * (what in (_END, _SAVE)):
                self._end(what, spent[what])

    def _lacks(self) -> str | None:
        """What has not come while the training thread is where it is; None if it may be there as long as it likes."""
        frames = stack(self._training)
        if any(_at_leisure(frame) for frame in frames) or any(map(_compiles, sys._current_frames().values())):
            return None
        if activity(self._training).does in (SAVES, JOINS):
            return _SAVE
        inside = [frame.f_code.co_name for frame in frames if frame.f_code.co_filename == _EVALUATION]
        return (_BATCH if "_means" in inside else _END) if inside else _STEP

    def _end(self, what: str, seconds: float) -> None:
        key = "runtime.timeout and checkpoint.max_unsaved" if what in (_END, _SAVE) else "runtime.timeout"
        with suppress(Exception):  # stderr may be anything
            faulthandler.dump_traceback(all_threads=True)
        reason = (
            f"{what} for {seconds:.0f} s ({key}); the training thread is at {activity(self._training).line}.\n"
            f"{chr(10).join([*_threads(), *_children()])}\n"
            "If that takes so long by right, set a longer runtime.timeout. "
            "The same command goes on from the last checkpoint."
        )
        end_process(reason, 1, self.last_words)


class _Outside:
    """The process that runs ``outside``, while there is something to watch."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None

    def tell(self, *, watching: bool) -> None:
        """This process is not stuck."""
        if self._process is None and watching:
            command = [sys.executable, "-I", "-S", outside.__file__, str(os.getpid()), str(self._limit)]
            with suppress(Exception):  # no room for another process; stderr may be anything
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
                faulthandler.enable()
        elif self._process is not None and watching:
            with suppress(OSError):
                os.write(self._process.stdin.fileno(), b".")  # type: ignore[union-attr]
        elif self._process is not None:
            self._process.kill()  # it would not learn from its input that this is the end: data workers hold it, too
            self._process.communicate()
            self._process = None


def _at_leisure(frame: FrameType) -> bool:
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    return file.endswith(_DEBUGGERS) or (name == "_read_again" and file.startswith(_AGAIN))


def _compiles(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename not in _COMPILERS:
        frame = frame.f_back
    return frame is not None


def _threads() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident in sys._current_frames():
        if ident != threading.get_ident():
            yield f"  thread {names.get(ident, ident)} is at {activity(ident).line}"


def _children() -> Iterator[str]:
    """The child processes that live; data workers among them print where they are."""
    children = multiprocessing.active_children()
    asked = [child for child in children if child.pid and _handles(child.pid, signal.SIGQUIT)]
    for child in asked:
        os.kill(child.pid or 0, signal.SIGQUIT)
    time.sleep(_DUMP_SECONDS if asked else 0)
    for child in children:
        yield f"  process {child.name} (pid {child.pid}) lives{', and printed where it is' if child in asked else ''}"


def _handles(pid: int, number: int) -> bool:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False

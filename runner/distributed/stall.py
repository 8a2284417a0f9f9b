"""The watchdog of a run of one process: if training stalls, it prints what every thread does and ends the process.

Twice a second a thread adds up the time since the last step or evaluation batch, separately for steps, for batches, and
for saving and the end of an evaluation, which may take ``patience`` seconds longer. Not counted: building the parts,
compiling, reading again to resume, a debugger, and the time for which the process was stopped or the machine slept.

Data workers write their stacks on SIGQUIT, each into a file in memory that the training process reads. Not to stderr,
where their lines would mix. The C code of ``faulthandler`` writes also while Python is stuck.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch

from runner.activity import activities
from runner.distributed import outside
from runner.distributed.watchdog import dumped_line, end_process, process_state, stack, thread_status

_LOOK_SECONDS = 0.5
_SLACK_SECONDS = 5.0  # longer wait from outside, so that the thread, which prints more, acts first
_DUMP_SECONDS = 2.0  # for data workers to write where they are
_DUMP_POLL_SECONDS = 0.02
_DUMP = "worker-stacks"
_dumps: list[IO[bytes]] = []  # registered by their numbers: they must stay open
_STEP = "no step"
_PATIENT = {"saves": "no end of a save", "joins": "no end of a save", "ends evaluation": "no end of an evaluation"}
_LACKING = _PATIENT | {"evaluates": "no batch of an evaluation"}
_TORCH = Path(torch.__file__).parent
_COMPILERS = {f"{_TORCH}/_dynamo/convert_frame.py", f"{_TORCH}/_inductor/compile_fx.py"}
_DEBUGGERS = ("/pdb.py", "/bdb.py", "/pydevd.py")


class Stall:
    """Watches the thread that creates it. ``last_words`` gets reason and exit status before the process is ended."""

    def __init__(self, timeout: float, patience: float) -> None:
        self.last_words: Callable[[str, int], None] = lambda reason, status: None
        self._timeout = timeout
        self._patience = patience
        self._training = threading.get_ident()
        self._watching = False  # from the first step or batch on
        self._progressed = False
        self._signalling = threading.Lock()
        self._outside: subprocess.Popen[bytes] | None = None  # runs ``outside`` while there is something to watch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall", daemon=True)
        self._thread.start()

    def note_progress(self) -> None:
        """A step or a batch is done. Cheap except the first time."""
        first, self._watching, self._progressed = not self._watching, True, True
        if first:  # from this thread: the next step may keep Python's lock before the other thread looks
            self._signal_outside()

    def rest(self) -> None:
        self._watching = False

    def close(self) -> None:
        self._ended.set()
        self._thread.join(2 * _LOOK_SECONDS)
        self._watching = False
        self._signal_outside()

    def _signal_outside(self) -> None:
        """Show that this process is not stuck: start, feed, or end the process beside it."""
        with self._signalling:
            if self._outside is None and self._watching:
                limit = self._timeout + _SLACK_SECONDS
                command = [sys.executable, "-I", "-S", outside.__file__, str(os.getpid()), str(limit)]
                with suppress(Exception):  # no room for another process; stderr may be anything
                    self._outside = subprocess.Popen(command, stdin=subprocess.PIPE)
                    faulthandler.enable()
            elif self._outside is not None and self._watching:
                with suppress(OSError):
                    os.write(self._outside.stdin.fileno(), b".")  # type: ignore[union-attr]
            elif self._outside is not None:
                self._outside.kill()  # its input stays open, because data workers hold it, too
                self._outside.communicate()
                self._outside = None

    def _watch(self) -> None:
        spent: Counter[str] = Counter()
        last = time.monotonic()
        while not self._ended.wait(_LOOK_SECONDS):
            self._signal_outside()
            # If the clock says more, the process was stopped, and no more time has passed for the training thread.
            passed, last = min(time.monotonic() - last, 2 * _LOOK_SECONDS), time.monotonic()
            if self._progressed or not self._watching:
                spent.clear()
                self._progressed = False
            elif (lack := self._lack()) is not None:
                spent[lack] += passed  # type: ignore[assignment]
                if spent[lack] > self._timeout + self._patience * (lack in _PATIENT.values()):
                    self._end(lack, spent[lack])

    def _lack(self) -> str | None:
        """What is overdue while the training thread does what it does; None if that may take any time."""
        declared = activities(self._training)
        debugged = any(frame.f_code.co_filename.endswith(_DEBUGGERS) for frame in stack(self._training))
        compiles = any(
            frame.f_code.co_filename in _COMPILERS for thread in sys._current_frames() for frame in stack(thread)
        )
        if debugged or compiles or "reads again" in declared:
            return None
        return _LACKING[declared[-1]] if declared else _STEP

    def _end(self, lack: str, seconds: float) -> None:
        key = "runtime.timeout and checkpoint.max_unsaved" if lack in _PATIENT.values() else "runtime.timeout"
        with suppress(Exception):  # stderr may be anything
            faulthandler.dump_traceback(all_threads=True)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = sys._current_frames().keys() - {threading.get_ident()}
        threads = [f"  thread {names.get(each, each)} is at {thread_status(each)[1]}" for each in others]
        training = f"the training thread is at {thread_status(self._training)[1]}."
        remedy = "If the work there needs that long, set a longer runtime.timeout."
        again = "The same command goes on from the last checkpoint."
        lines = [f"{lack} for {seconds:.0f} s ({key}); {training}", *threads, *_children(), f"{remedy} {again}"]
        end_process("\n".join(lines), 1, self.last_words)


def _children() -> Iterator[str]:
    """Lines on the living child processes. Prints the stacks of data workers, each as a whole."""
    children = multiprocessing.active_children()
    written = _stacks_of(child.pid for child in children if child.pid)
    for child in children:
        text = written.get(child.pid or 0, "")
        with suppress(Exception):  # stderr may be anything
            print(f"{child.name} (pid {child.pid}):\n{text}" if text else "", end="", file=sys.stderr, flush=True)
        yield f"  process {child.name} (pid {child.pid}) {f'is at {dumped_line(text)}' if text else 'lives'}"


def write_stacks_on_request() -> None:
    """Called in a data worker: write its stacks whenever a stalled run asks for them. Linux only."""
    with suppress(Exception):  # no such call, too many open files
        file = os.fdopen(os.memfd_create(_DUMP), "wb", buffering=0)
        faulthandler.register(signal.SIGQUIT, file)
        _dumps.append(file)


def _stacks_of(pids: Iterable[int]) -> dict[int, str]:
    """The stacks of those processes that write them in time: pid -> text, innermost frames first."""
    files: dict[int, Path] = {}
    for pid in pids:
        with suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(file).startswith(f"/memfd:{_DUMP}"):
                    files[pid] = file
            if pid in files:
                os.kill(pid, signal.SIGQUIT)
    until = time.monotonic() + _DUMP_SECONDS
    while time.monotonic() < until:
        # A process that waits again has written all: writing into memory is no wait.
        if all(_read(path) and process_state(pid) in "S?" for pid, path in files.items()):
            break
        time.sleep(_DUMP_POLL_SECONDS)
    return {pid: text for pid, path in files.items() if (text := _read(path))}


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:  # the process has ended
        return ""

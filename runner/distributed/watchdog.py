"""Watchdogs, so that no process waits forever. They name the code line where a process is, and the option to raise.

``Stall`` is for a run of one process: if training stalls, it prints what every thread does and ends the process. Twice
a second a thread adds up the time since the last step or evaluation batch, separately for steps, for batches, and for
saving and the end of an evaluation, which may take ``patience`` seconds longer. Not counted: building the parts,
compiling, reading again to resume, a debugger, and the time for which the process was stopped or the machine slept.
Data workers write their stacks on SIGQUIT, each into a file in memory that the training process reads. Not to stderr,
where their lines would mix. The C code of ``faulthandler`` writes also while Python is stuck.

``Watchdog`` is in every process of a run of several, for one that died, was stopped or hangs. Twice a second a thread
writes a beat (a sign of life, and where the process is) and reads the beat of the next rank. A process that has waited
too long for others looks at the beats of all ranks. While training runs, all processes must meet within the timeout; at
other times a process may take longer, unless another one waits for it. The first failure is stored for all. A process
that reads it gives its training thread some seconds to end by itself (usually its collectives fail), and then ends the
process. A second thread does that, which waits for nothing.
"""

import faulthandler
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from os import getpid
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal, NoReturn

import torch
from torch._C._distributed_c10d import Store

from runner.activity import Activity, activities
from runner.distributed import outside
from runner.distributed.world import World

GRACE_SECONDS = 10.0  # for ``last_words``, and for a process to end by itself after the failure of another


def end_process(message: str, status: int, last_words: Callable[[str, int], None], *, who: str) -> NoReturn:
    """Call ``last_words`` with message and status, print the message, and end the process and its children at once."""

    def speak() -> None:
        with suppress(Exception):
            last_words(message, status)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    speaker.join(GRACE_SECONDS)  # the storage may hang
    print(f"{who} ends: {message}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # data workers, which might notice late or never
        child.kill()
    os._exit(status)


_TORCH = f"{Path(torch.__file__).parent}/"
_STANDARD_LIBRARY = (f"{Path(os.__file__).parent}/", "<frozen ")
_INSTALLED = ("/site-packages/", "/dist-packages/")
Frame = tuple[str, str, str]  # file, line, function
Stacks = Mapping[int, Sequence[Frame]]  # the frames of each thread by its ident, the innermost first
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+).*\n((?:  .*\n)*)", re.MULTILINE)
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")  # a character that is not ASCII
_OWN = f"{Path(__file__).parent}/"
_EXCHANGES = (_OWN, f"{_TORCH}distributed/", f"{_TORCH}autograd/", f"{_TORCH}_tensor.py")


def thread_status(thread: int, at: Stacks) -> tuple[Activity | Literal["waits", "works"], str]:
    """What a thread of this process does: it ``waits`` for other processes, or its innermost declared activity, or it
    just ``works``; and a code line for people, outside of torch and the standard library if possible.
    """
    frames = at.get(thread, ())
    files = takewhile(lambda file: file.startswith((_TORCH, _OWN)), (file for file, _, _ in frames))
    if any(file.startswith(_EXCHANGES) for file in files):
        return "waits", _line(frames)
    declared = activities(thread)
    return declared[-1] if declared else "works", _line(frames)


def stacks() -> Stacks:
    """The innermost frames of each thread of this process; empty if no file can be opened.

    The C code of ``faulthandler`` walks them while no other thread runs. Walked from Python, frames may be left
    meanwhile, at which CPython 3.11 was seen to crash.
    """
    try:
        file = os.fdopen(os.memfd_create("stacks"), "r+b") if hasattr(os, "memfd_create") else TemporaryFile()
    except OSError:
        return {}
    with file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = _ESCAPE.sub(lambda match: chr(int(match[1][1:], 16)), file.read().decode("utf-8", "replace"))
    return {int(ident, 16): _FRAME.findall(frames) for ident, frames in _THREAD.findall(text)}


def _line(frames: Sequence[Frame]) -> str:
    """The first of the frames that is not of torch or the standard library, else the first."""
    frame_to_show = next((frame for frame in frames if not _is_library(frame[0])), frames[0] if frames else None)
    return "{}:{} in {}".format(*frame_to_show) if frame_to_show else "an unknown line"


def _is_library(file: str) -> bool:
    standard = file.startswith(_STANDARD_LIBRARY) and not any(part in file for part in _INSTALLED)
    return standard or file.startswith(_TORCH)


_BEAT_SECONDS = 0.5
_SLACK_SECONDS = 5.0  # longer wait from outside, so that the thread, which prints more, acts first
_DUMP_SECONDS = 2.0  # for data workers to write where they are
_DUMP_POLL_SECONDS = 0.02  # between two checks whether they have written
_DUMP = "worker-stacks"
_dumps: list[IO[bytes]] = []  # ``faulthandler`` knows their numbers: they must stay open
# Activity -> what is overdue; the first activities may take ``patience`` longer than the timeout.
_OVERDUE_LATER = dict.fromkeys(("saves", "joins"), "no end of a save") | {"ends evaluation": "no end of an evaluation"}
_OVERDUE = _OVERDUE_LATER | {"evaluates": "no batch of an evaluation"}
_COMPILERS = {f"{_TORCH}_dynamo/convert_frame.py", f"{_TORCH}_inductor/compile_fx.py"}
_DEBUGGERS = ("/pdb.py", "/bdb.py", "/pydevd.py")
_REMEDY = "If the work there needs that long, set a longer runtime.timeout."


class Stall:
    """Watches the thread that creates it. ``last_words`` gets reason and exit status before the process is ended."""

    def __init__(self, timeout: float, patience: float) -> None:
        self.last_words: Callable[[str, int], None] = lambda reason, status: None
        self._timeout = timeout
        self._patience = patience
        self._training = threading.get_ident()
        self._watching = False  # true from the first step or batch on
        self._progressed = False
        self._signalling = threading.Lock()
        self._outside: subprocess.Popen[bytes] | None = None  # runs ``outside`` while there is something to watch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall", daemon=True)
        self._thread.start()

    def note_progress(self) -> None:
        """A step or a batch is done. Cheap except the first time."""
        first, self._watching, self._progressed = not self._watching, True, True
        if first:  # not from the other thread: the next step may keep Python's lock before that looks
            self._signal_outside()

    def disarm(self) -> None:
        self._watching = False

    def close(self) -> None:
        self._ended.set()
        self._thread.join(2 * _BEAT_SECONDS)
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
        while not self._ended.wait(_BEAT_SECONDS):
            self._signal_outside()
            # If the clock says more, the process was stopped, and no more time has passed for the training thread.
            passed, last = min(time.monotonic() - last, 2 * _BEAT_SECONDS), time.monotonic()
            if self._progressed or not self._watching:
                spent.clear()
                self._progressed = False
            elif (overdue := self._overdue(spent)) is not None:
                spent[overdue] += passed  # type: ignore[assignment]
                if spent[overdue] > self._timeout + self._patience * (overdue in _OVERDUE_LATER.values()):
                    self._end(overdue, spent[overdue])

    def _overdue(self, spent: Mapping[str, float]) -> str | None:
        """The event that is overdue, by the activity of the training thread; None if that may take any time.

        Stacks are looked at only when half of the time is over, because the other threads wait for that.
        """
        declared = activities(self._training)
        if "reads again" in declared:
            return None
        overdue = _OVERDUE[declared[-1]] if declared else "no step"
        return None if spent[overdue] > self._timeout / 2 and self._may_take_any_time() else overdue

    def _may_take_any_time(self) -> bool:
        at = stacks()
        debugs = any(file.endswith(_DEBUGGERS) for file, _, _ in at.get(self._training, ()))
        return debugs or any(file in _COMPILERS for frames in at.values() for file, _, _ in frames)

    def _end(self, overdue: str, seconds: float) -> None:
        key = "runtime.timeout and checkpoint.max_unsaved" if overdue in _OVERDUE_LATER.values() else "runtime.timeout"
        with suppress(Exception):  # stderr may be anything
            faulthandler.dump_traceback(all_threads=True)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        at = stacks()
        others = at.keys() - {threading.get_ident()}
        threads = [f"  thread {names.get(ident, ident)} is at {_line(at[ident])}" for ident in others]
        head = f"{overdue} for {seconds:.0f} s ({key}); the training thread is at {_line(at.get(self._training, ()))}."
        lines = [head, *threads, *_children(), f"{_REMEDY} The same command continues from the last checkpoint."]
        end_process("\n".join(lines), 1, self.last_words, who="this process")


def _children() -> Iterator[str]:
    """Lines on the living child processes. Prints the stacks of data workers, each as a whole."""
    children = multiprocessing.active_children()
    texts = worker_stacks(child.pid for child in children if child.pid)
    for child in children:
        text = texts.get(child.pid or 0, "")
        with suppress(Exception):  # stderr may be anything
            print(f"{child.name} (pid {child.pid}):\n{text}" if text else "", end="", file=sys.stderr, flush=True)
        yield f"  process {child.name} (pid {child.pid}) {f'is at {dumped_line(text)}' if text else 'lives'}"


def dumped_line(text: str) -> str:
    """The code line of the main thread, or of the only thread, in the output of ``faulthandler``."""
    return _line(_FRAME.findall(text.rpartition("Current thread")[2]))


def write_stacks_on_request() -> None:
    """Called in a data worker: write its stacks whenever a stalled run asks for them. Linux only."""
    with suppress(Exception):  # no such call, too many open files
        file = os.fdopen(os.memfd_create(_DUMP), "wb", buffering=0)
        faulthandler.register(signal.SIGQUIT, file)
        _dumps.append(file)


def worker_stacks(pids: Iterable[int]) -> dict[int, str]:
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
        # A process that waits again has written everything, because a write into memory does not wait.
        if all(_read(path) and process_state(pid) in "S?" for pid, path in files.items()):
            break
        time.sleep(_DUMP_POLL_SECONDS)
    return {pid: text for pid, path in files.items() if (text := _read(path))}


def _read(path: Path) -> str:
    with suppress(OSError):  # the process has ended
        return path.read_bytes().decode("utf-8", "replace")
    return ""


_FUTILE_BEATS = 4  # a training thread that waits for others this many times in a row gets no more time to end
_FAILURE = "failure"
_LAG_SECONDS = 2.0  # all ranks are looked at so much later, so that its neighbour reports a silent process first
_CROWD = 64  # among more processes than this, each looks at all of them less often than at every beat
_HOST = socket.gethostname()
MAIN = "main"  # the training thread


@dataclass(frozen=True, slots=True)
class Failure:
    """Why all processes have to end, and their exit status. ``printed``: the failed rank prints the message itself."""

    rank: int
    status: int
    message: str
    printed: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life of a process. Every beat has a new number. ``threads``: name -> (activity, code line)."""

    number: int
    pid: int
    host: str
    threads: Mapping[str, tuple[str, str]]

    @property
    def thread(self) -> str:
        """The name of the thread that others may be waiting for: the writer, if the training thread waits for it."""
        others = [name for name in self.threads if name != MAIN]
        return others[0] if others and self.threads[MAIN][0] == "joins" else MAIN

    def describe(self, rank: int, thread: str = "") -> str:
        """Rank, pid, host and, of a thread, code line, for messages."""
        line = f" is at {self.threads[thread][1]}" if thread in self.threads else ""
        return f"rank {rank} (pid {self.pid} on {self.host}){line}"


class Watchdog:
    """Writes beats, looks at others' beats, and ends this process, after ``last_words``, once ``failure`` is set. A
    process that reads or writes a checkpoint may take ``patience`` seconds longer than ``timeout``.
    """

    def __init__(self, store: Store, world: World, *, timeout: float, patience: float) -> None:
        self.failure: Failure | None = None
        self.last_words: Callable[[str, int], None] = lambda reason, status: None
        self._store = store
        self._world = world
        self._timeout = timeout
        self._patience = patience
        self._next = (world.rank + 1) % world.size
        self._last_beat = (b"", time.monotonic())  # the next rank's, and when it came
        self._idents = {MAIN: threading.main_thread().ident or 0}  # threads that exchange values
        self._training = False  # whether the training thread must meet the others within the timeout
        self._since = time.monotonic()  # when it last met them, or last was busy with something else
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._answer_time = time.monotonic()  # when the store last answered
        targets = (self._write_beats, self._guard)
        self._threads = [threading.Thread(target=target, name="watch", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def note_exchange(self, thread: str, *, training: bool = False) -> None:
        """The calling thread is at an exchange. ``training``: it must from now on reach the next within the timeout."""
        self._idents[thread] = threading.get_ident()
        if thread == MAIN:
            self._training = self._training or training
            self._since = time.monotonic()

    def disarm(self) -> None:
        """Training is over: processes no longer have to meet within the timeout."""
        self._training = False

    def whereabouts(self, rank: int, thread: str) -> str:
        with suppress(RuntimeError):  # the store is gone
            if self._store.check([f"beat/{rank}"]):
                return _parse_beat(self._store.get(f"beat/{rank}")).describe(rank, thread)
        return f"rank {rank}"

    def fail(self, failure: Failure) -> Failure:
        """Store why all processes have to end; returns the failure that was stored first."""
        text = json.dumps(asdict(failure))
        with self._lock:
            if self.failure is None:
                try:
                    self.failure = Failure(**json.loads(self._store.compare_set(_FAILURE, "", text)))
                except RuntimeError:  # the store is gone with its process
                    self.failure = failure
            return self.failure

    def wait(self, seconds: float) -> Failure | None:
        """Wait up to ``seconds`` for a failure; None if there is none."""
        until = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.failure

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * _BEAT_SECONDS)

    def _write_beats(self) -> None:
        number = 0
        while self.failure is None and not self._ended.wait(_BEAT_SECONDS if number else 0):
            number += 1
            try:
                at = stacks()
                threads = {name: thread_status(ident, at) for name, ident in [*self._idents.items()]}
                if not self._training and threads[MAIN][0] != "waits":
                    self._since = time.monotonic()
                beat = asdict(Beat(number, getpid(), _HOST, threads))
                self._store.set(f"beat/{self._world.rank}", json.dumps(beat))
                self._look_at_next()
                if number % (1 + self._world.size // _CROWD) == 0:
                    self._look_at_all()
                self._answer_time = time.monotonic()
            except RuntimeError:  # the store is gone with its process, unless all processes are just ending
                if not self._ended.wait(_BEAT_SECONDS) and self.failure is None:
                    self.failure = _lost("is gone")

    def _guard(self) -> None:
        while self.failure is None and not self._ended.wait(_BEAT_SECONDS):
            silent = time.monotonic() - self._answer_time
            if silent > self._timeout + _LAG_SECONDS:
                self.failure = _lost(f"has not answered for {silent:.0f} s ({_TIMEOUT})")
        failure = self.failure
        if failure is None or self._ended.is_set():
            return
        at_fault = failure.rank == self._world.rank and not failure.printed
        until, waiting = time.monotonic() + (0 if at_fault else GRACE_SECONDS), 0
        while waiting < _FUTILE_BEATS and time.monotonic() < until:
            if self._ended.wait(_BEAT_SECONDS):
                return
            waiting = waiting + 1 if thread_status(self._idents[MAIN], stacks())[0] == "waits" else 0
        end_process(failure.message, failure.status, self.last_words, who=f"rank {self._world.rank}")

    def _look_at_next(self) -> None:
        """Take over a failure that another process stored; else report the next rank if it died or is silent."""
        with self._lock:
            if self.failure is None and self._store.check([_FAILURE]):
                self.failure = Failure(**json.loads(self._store.get(_FAILURE)))
        name, now = f"beat/{self._next}", time.monotonic()
        beat = self._store.get(name) if self._store.check([name]) else b""
        if beat != self._last_beat[0]:
            self._last_beat = (beat, now)
        silent = now - self._last_beat[1]
        if self.failure is not None or not silent or self._has_left(self._next):
            return
        last = _parse_beat(beat) if beat else None
        process = last.describe(self._next) if last else f"rank {self._next}"
        if last and last.host == _HOST and not _lives(last.pid):
            self._blame(self._next, f"{process} died.")
        elif silent > self._timeout:
            fault = "has shown no sign of life" if beat else "has not come"
            self._blame(self._next, f"{process} {fault} for {silent:.0f} s ({_TIMEOUT}).")

    def _look_at_all(self) -> None:
        """End all processes if one of them has kept this process waiting for too long."""
        waited = time.monotonic() - self._since
        if self.failure is not None or waited <= self._timeout + _LAG_SECONDS:
            return
        names = [f"beat/{rank}" for rank in range(self._world.size)]
        if not self._store.check(names):
            return  # a rank that never came is reported by its neighbour
        beats = dict(enumerate(map(_parse_beat, self._store.multi_get(names))))
        does = {rank: beat.threads[beat.thread][0] for rank, beat in beats.items()}
        # Those that wait for others are not to blame, unless all do.
        busy = {rank: beat for rank, beat in beats.items() if does[rank] != "waits" and not self._has_left(rank)}
        late = busy or beats
        bound, key = self._timeout, _TIMEOUT
        if all(does[rank] == "saves" for rank in late):
            bound, key = self._timeout + self._patience, f"{_TIMEOUT} and checkpoint.max_unsaved"
        if waited > bound:
            lines = "\n".join(f"  {beat.describe(rank, beat.thread)}" for rank, beat in late.items())
            reason = f"for {waited:.0f} s the processes have waited for one of them ({key}):"
            self._blame(min(late), f"{reason}\n{lines}\n{_REMEDY}")

    def _blame(self, rank: int, reason: str) -> None:
        self.fail(Failure(rank, 1, f"{reason} {_AGAIN}"))

    def _has_left(self, rank: int) -> bool:
        return self._store.check([f"left/{rank}"])


_TIMEOUT = "runtime.timeout"
_AGAIN = "All processes of the run end; the same command continues from the last checkpoint."


def _lost(event: str) -> Failure:
    return Failure(0, 1, f"rank 0, or the launcher that started it, {event}. {_AGAIN}")


def _lives(pid: int) -> bool:
    """Whether a process of this host lives; a zombie does not."""
    try:
        os.kill(pid, 0)
        return process_state(pid) not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True


def process_state(pid: int) -> str:
    """The letter for the state of a process of this host; ``?`` if it has ended, or where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _parse_beat(raw: bytes) -> Beat:
    return Beat(**json.loads(raw))

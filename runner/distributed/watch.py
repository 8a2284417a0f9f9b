"""Each process watches over the next one, and over itself: nobody waits for ever for one that died, stopped or hangs.

A thread shows every half second that its process lives, and reads the same of the next one in the ring. The first
failure is written down once for all. Every process that reads it lets its training thread come to an end by itself (its
collectives fail, as a rule) and ends the process when it does not; that is done by a second thread, which asks nobody.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import getpid
from pathlib import Path
from types import FrameType
from typing import Any

from torch._C._distributed_c10d import Store

from runner.distributed.world import World

_BEAT_SECONDS = 0.5
_GRACE_SECONDS = 10.0  # for a training thread that has to end; one that waits for a storage may take that long
_FUTILE_BEATS = 4  # of a training thread that waits for other processes, which do not come
_FAILURE = "failure"
_WAITING = ("torch/distributed/", "torch/autograd/", "torch/_tensor.py", "runner/distributed/")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why this life of all processes has to end, and their exit status. ``told``: that rank itself tells people."""

    rank: int
    status: int
    message: str
    told: bool = False


class Watch:
    """The threads. ``failure`` is what ended this life, once something has.

    ``last_words`` is called with its message before the process is ended from here.
    """

    def __init__(self, store: Store, world: World, *, timeout: float) -> None:
        self.failure: Failure | None = None
        self.last_words: Callable[[str], None] = lambda reason: None
        self._store = store
        self._world = world
        self._timeout = timeout
        self._next = (world.rank + 1) % world.size
        self._seen = (b"", time.monotonic())  # the last beat of the next one, and since when
        self._moved: float | None = None  # when the training thread last came to the others; None: it need not
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._answered = time.monotonic()  # when the store last did
        self._threads = [threading.Thread(target=run, name="watch", daemon=True) for run in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()

    def moved(self) -> None:
        """The training thread was with the others just now, and will be again within the time-out."""
        self._moved = time.monotonic()

    def rest(self) -> None:
        """The training thread may take its time from now on."""
        self._moved = None

    def fail(self, failure: Failure) -> Failure:
        """Write down why all have to end, if nobody did before; what is written."""
        text = json.dumps(asdict(failure))
        with self._lock:
            if self.failure is None:
                try:
                    found = self._store.compare_set(_FAILURE, "", text)
                    self.failure = Failure(**json.loads(found))
                except RuntimeError:  # the store is gone with its process
                    self.failure = failure
            return self.failure

    def wait(self, seconds: float) -> Failure | None:
        """The failure, for which so many seconds are waited."""
        until = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.failure

    def close(self) -> None:
        """Let the threads end."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * _BEAT_SECONDS)

    def _beat(self) -> None:
        number = 0
        while self.failure is None and not self._ended.wait(_BEAT_SECONDS if number else 0):
            number += 1
            try:
                self._store.set(f"beat/{self._world.rank}", json.dumps([number, getpid(), _host()]))
                self._look()
                self._answered = time.monotonic()
            except RuntimeError:
                self._lose()

    def _guard(self) -> None:
        while self.failure is None and not self._ended.wait(_BEAT_SECONDS):
            silent = time.monotonic() - self._answered
            if silent > self._timeout + 4 * _BEAT_SECONDS:
                self.failure = self._lost(f"has not answered for {silent:.0f} s ({_TIMEOUT})")
        if self.failure is not None and not self._ended.is_set():
            self._end(self.failure)

    def _look(self) -> None:
        with self._lock:
            if self.failure is None and self._store.check([_FAILURE]):
                self.failure = Failure(**json.loads(self._store.get(_FAILURE)))
        if self.failure is None:
            self._look_at_next()
        if self.failure is None and self._moved is not None and time.monotonic() - self._moved > self._timeout:
            self._hang()

    def _look_at_next(self) -> None:
        name, now = f"beat/{self._next}", time.monotonic()
        beat = self._store.get(name) if self._store.check([name]) else b""
        if beat != self._seen[0]:
            self._seen = (beat, now)
            return
        silent = now - self._seen[1]
        if self._store.check([f"left/{self._next}"]):
            return
        _, pid, host = json.loads(beat) if beat else (0, 0, "")
        who = f"rank {self._next} (pid {pid} on {host})" if beat else f"rank {self._next}"
        if host == _host() and not _lives(pid):
            self.fail(Failure(self._next, 1, f"{who} died. {_AGAIN}"))
        elif silent > self._timeout:
            what = "has shown no sign of life" if beat else "has not come"
            self.fail(Failure(self._next, 1, f"{who} {what} for {silent:.0f} s ({_TIMEOUT}). {_AGAIN}"))

    def _hang(self) -> None:
        """Everybody waits for somebody, so that each says where it is, and the first one draws the conclusion."""
        frame = sys._current_frames().get(self._main or 0)
        waits, where = _place(frame)
        self._store.set(f"place/{self._world.rank}", json.dumps([waits, getpid(), _host(), where]))
        time.sleep(4 * _BEAT_SECONDS)
        found: dict[int, Any] = {}
        for rank in range(self._world.size):
            if self._store.check([f"place/{rank}"]):
                found[rank] = json.loads(self._store.get(f"place/{rank}"))
        late = {rank: place for rank, place in found.items() if not place[0]} or found
        lines = [f"  rank {rank} (pid {pid} on {host}) is at {where}" for rank, (_, pid, host, where) in late.items()]
        absent = [str(rank) for rank in range(self._world.size) if rank not in found]
        lines += [f"  rank {', '.join(absent)} did not say where"] if absent else []
        told = "\n".join(lines)
        message = f"for {self._timeout:.0f} s the processes wait for one of them ({_TIMEOUT}):\n{told}\n{_AGAIN}"
        self.fail(Failure(min(late), 1, message))

    def _lose(self) -> None:
        """The store does not answer: the process that keeps it is gone, unless this one is about to leave, too."""
        if not self._ended.wait(_BEAT_SECONDS) and self.failure is None:
            self.failure = self._lost("is gone")

    def _lost(self, how: str) -> Failure:
        return Failure(0, 1, f"rank 0, or the launcher that started it, {how}. {_AGAIN}")

    def _end(self, failure: Failure) -> None:
        until, waiting = time.monotonic() + _GRACE_SECONDS, 0
        while waiting < _FUTILE_BEATS and time.monotonic() < until:
            if self._ended.wait(_BEAT_SECONDS):
                return
            waits, _ = _place(sys._current_frames().get(self._main or 0))
            waiting = waiting + 1 if waits else 0
        with suppress(Exception):
            self.last_words(failure.message)
        print(f"rank {self._world.rank} ends: {failure.message}", file=sys.stderr, flush=True)
        os._exit(failure.status)


_TIMEOUT = "runtime.timeout"
_AGAIN = "All processes of the run end; the same command goes on from the last checkpoint."


def _host() -> str:
    return socket.gethostname()


def _lives(pid: int) -> bool:
    """Whether a process of this host lives. One that is dead and that nobody has waited for yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's, no such file system
        return True


def _place(frame: FrameType | None) -> tuple[bool, str]:
    """Whether that code waits for other processes, and where it is outside of torch."""
    waits = frame is not None and any(part in frame.f_code.co_filename for part in _WAITING)
    while frame is not None and frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return waits, "an unknown place"
    return waits, f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"

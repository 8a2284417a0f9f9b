"""Opens run directories that a stranger may have written, as the runner does, in a process that stops at the first
forbidden act: running code, unpickling, leaving the directory, allocating without limit.

Run as a program, it reads the paths of run directories as JSON from stdin and writes how each view of each ended.
"""

import json
import marshal
import os
import pickle
import resource
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import yaml
from faults import save

from runner.checkpoint.store import CheckpointStore, Retention
from runner.checkpoint.tensor_file import Damaged
from runner.data import ledger
from runner.errors import RunnerError, printable
from runner.run import attempts
from runner.run.directory import RunDirectory
from runner.runs.audit import audit
from runner.runs.listing import details
from runner.storage import LocalLocation

MEMORY = 1 << 30  # bytes that the views may allocate

_NEVER = ("exec", "compile", "import", "subprocess", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn")
_NEVER += ("pickle", "marshal", "socket.connect", "socket.bind", "ctypes", "code", "os.putenv", "shutil", "tempfile")
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """A forbidden act. Not an ``Exception``, so that no handler for errors swallows it."""


class Guard:
    """An audit hook; active while ``root`` names the folder that may not be left."""

    root = ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int):
                self._inside(event, path, reads=not flags & _WRITES)
        elif event in _CHANGES:
            for path in arguments[:2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._inside(event, path)
        elif event.startswith(_NEVER):
            self._stop(f"{event} {arguments[:1]}")

    def _inside(self, event: str, path: Any, *, reads: bool = False) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if not f"{real}/".startswith(f"{self.root}/") and not (reads and real.startswith("/proc/")):
            self._stop(f"{event} {real}")

    def _stop(self, action: str) -> None:
        self.root = ""
        raise Forbidden(action)


def bomb(*_: Any, **__: Any) -> None:
    """Replaces every function that builds objects from bytes."""
    raise Forbidden("unpickling")


def checkpoints(path: str) -> str:
    """Loads every part of every commit."""
    store, damaged, longest = CheckpointStore(LocalLocation(path)), 0, 0
    for commit in store.commits():
        try:
            checkpoint = store.open(commit)
            for part in checkpoint.parts:
                checkpoint.load(part)
        except Damaged as error:
            longest = max(longest, len(str(error)))
            damaged += 1
    assert longest < 1000, "a message that fills the terminal"
    return f"{damaged} damaged"


def records(path: str) -> None:
    """Reads the record, the configuration, the result and all attempts."""
    directory = RunDirectory("", "", "", LocalLocation(path))
    directory.record()
    directory.result(directory.identity() or {})
    for record in attempts.history(directory.location):
        assert (record.owner() + record.outcome()).isprintable()
        record.last_sign()


def show(path: str) -> None:
    """What ``runs show`` does."""
    json.dumps(details(RunDirectory.at(path)))


def audited(path: str) -> None:
    """What ``runs audit`` does."""
    audit(RunDirectory.at(path))


def segments(path: str) -> None:
    """The ledger, as a resume reads it."""
    ledger.read_segments(LocalLocation(path))


def saved(path: str) -> None:
    """Commits to the directory, and removes old commits."""
    store = CheckpointStore(LocalLocation(path))
    save(store, 9, attempt=9)
    store.retain(Retention(2), attempt=9)


VIEWS: list[Callable[[str], Any]] = [checkpoints, records, show, audited, segments, saved]


def views(path: str, guard: Guard) -> dict[str, str]:
    """How each view ended: ``clean`` with its result or an error of the runner, ``forbidden``, or ``crash``."""
    ends: dict[str, str] = {}
    for view in VIEWS:
        guard.root = os.path.realpath(path)
        try:
            ends[view.__name__] = f"clean: {view(path)}"
        except RunnerError as error:
            ends[view.__name__] = f"clean: {type(error).__name__}"
        except Forbidden as error:
            ends[view.__name__] = f"forbidden: {error}"
        except BaseException as error:
            ends[view.__name__] = f"crash: {error!r:.300}"
        guard.root = ""
    return ends


def main() -> None:
    """The first directory is an ordinary one: its views import the modules that Python loads late, unguarded."""
    ordinary, *paths = json.load(sys.stdin)
    guard = Guard()
    for view in VIEWS:
        view(ordinary)
    printable("\x1b")
    warnings.simplefilter("ignore")  # to print a warning reads its source file
    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler")]:
        setattr(module, name, bomb)
    for module, name in [(marshal, "loads"), (torch, "load"), (yaml, "unsafe_load"), (yaml, "full_load")]:
        setattr(module, name, bomb)
    pages = int(open("/proc/self/statm").read().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    sys.addaudithook(guard)
    print(json.dumps({path: views(path, guard) for path in paths}))


if __name__ == "__main__":
    main()

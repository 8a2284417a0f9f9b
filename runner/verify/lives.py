"""The client's side of ``runner.verify.server``: real processes of the runner, one after the other, to be killed.

Two servers stand ready, with hash seeds of their own, as two processes that a user starts have them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import RunnerError

_HASH_SEEDS = ("1", "2")


class Kill(NamedTuple):
    """A ``moment``, the ``step`` from which on it is waited for, and one ``after`` which the state is saved, too: the
    next life begins with what that step left in the state, and with nothing else of it.
    """

    moment: str
    step: int = 0
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Life:
    """What is asked of one life: the runner's ``arguments``, how much is recorded and where (``record``), and how it
    ends. ``steps`` is the last step of all; ``seconds`` ends training earlier; ``kill`` is the moment of its end, and
    ``victim`` the only rank that is killed, where not all of its ``processes`` are; ``pins`` are things that are held
    fast; ``dump`` is a step whose state is written beside the record. In a ``silent`` one neither the
    state nor what objects remember is looked at, since somebody's ``state_dict`` may change something.
    """

    name: str
    arguments: tuple[str, ...]
    record: Path
    steps: int | None = None
    seconds: float | None = None
    kill: Kill | None = None
    victim: int | None = None
    processes: int = 1
    pins: tuple[str, ...] = ()
    dump: int | None = None
    evaluations: int | None = None
    silent: bool = False
    does: str = "train"

    def request(self) -> dict[str, Any]:
        """The life as JSON."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"record": None, "records": [*map(str, self.records)], "log": str(self.log)}

    @property
    def records(self) -> list[Path]:
        """What each rank notes."""
        others = [self.record.with_name(f"{self.record.name}.rank{rank}") for rank in range(1, self.processes)]
        return [self.record, *others]

    @property
    def log(self) -> Path:
        """What it printed, all ranks together."""
        return self.record.with_suffix(".log")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a life ended: its exit status (None: by SIGKILL), how long it took, what it printed."""

    life: Life
    status: int | None
    seconds: float
    output: str = field(repr=False, default="")


class Server:
    """One process to fork lives from."""

    def __init__(self, hash_seed: str, cwd: Path | None) -> None:
        environment = {"PYTHONHASHSEED": hash_seed, **os.environ}  # one that the user sets is meant for every life
        self.import_seconds = 0.0
        self._began = time.monotonic()
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runner.verify.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            cwd=cwd,
        )

    def __call__(self, life: Life) -> Ended:
        """Live it."""
        self._ask(life.request())
        answer = self._answer()
        return Ended(life, answer["status"], answer["seconds"], life.log.read_text(errors="replace"))

    def import_modules(self, names: Sequence[str]) -> None:
        """Have the next lives find these modules imported; does not wait for it."""
        self._ask({"modules": [*names]})

    def close(self) -> None:
        """End it, and the life in hand."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> None:
        self._wait()
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _wait(self) -> None:
        if not self._ready:
            self._answer()
            self._ready, self.import_seconds = True, time.monotonic() - self._began

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RunnerError("the process from which lives are forked ended; what it printed last says why")
        found: dict[str, Any] = json.loads(line)
        return found


Servers = tuple[Server, Server]


@contextmanager
def servers(cwd: Path | None = None) -> Iterator[Servers]:
    """Two servers for the length of a block; their imports go on beside each other."""
    one, other = (Server(seed, cwd) for seed in _HASH_SEEDS)
    try:
        yield one, other
    finally:
        for server in (one, other):
            server.close()

"""The client's side of ``runner.verify.fork_server``: real processes of the runner, one after the other, to be killed.

Two servers stand ready, with hash seeds of their own, as two processes that a user starts have them.

One run of a proof: its lives, and what they told.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import RunnerError
from runner.storage.location import is_remote, local_root

_HASH_SEEDS = ("1", "2")


class Kill(NamedTuple):
    """A ``moment``, the ``step`` from which on it is waited for, and one ``after`` which the state is saved, too: the
    next life begins with what that step left in the state, and with nothing else of it.
    """

    moment: str
    step: int = 0
    after: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptRequest:
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
class AttemptEnd:
    """How a life ended: its exit status (None: by SIGKILL), how long it took, what it printed."""

    life: AttemptRequest
    status: int | None
    seconds: float
    output: str = field(repr=False, default="")


class ForkServer:
    """One process to fork lives from."""

    def __init__(self, hash_seed: str, cwd: Path | None) -> None:
        environment = {"PYTHONHASHSEED": hash_seed, **os.environ}  # one that the user sets is meant for every life
        self.import_seconds = 0.0
        self._began = time.monotonic()
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runner.verify.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            cwd=cwd,
        )

    def __call__(self, life: AttemptRequest) -> AttemptEnd:
        """Live it."""
        self._ask(life.request())
        answer = self._answer()
        return AttemptEnd(life, answer["status"], answer["seconds"], life.log.read_text(errors="replace"))

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


Servers = tuple[ForkServer, ForkServer]


@contextmanager
def servers(cwd: Path | None = None) -> Iterator[Servers]:
    """Two servers for the length of a block; their imports go on beside each other."""
    one, other = (ForkServer(seed, cwd) for seed in _HASH_SEEDS)
    try:
        yield one, other
    finally:
        for server in (one, other):
            server.close()


Event = dict[str, Any]

_COMPARED = ("step", "resumed")
# What every rank has to itself, and where it is put; ``state`` alone is compared to what a checkpoint holds.
_OF_EACH = {"batch": "batch", "generators": "generators", "gradients": "gradients", "state": "others"}


@dataclass(frozen=True, slots=True)
class AttemptTrace:
    """One life that has ended, and its record: events in the order in which they happened."""

    ended: AttemptEnd
    workers: int
    events: tuple[Event, ...]

    def of(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def first(self) -> int:
        """The step that it began after."""
        return next((event["step"] for event in self.of("resumed")), 0)

    @property
    def last(self) -> int:
        """The last step that it did."""
        return max((event["step"] for event in self.of("step")), default=self.first)

    @property
    def killed(self) -> str | None:
        """The moment at which it was killed, or one of its processes, if any was."""
        return next((event["moment"] for event in self.of("killed")), "?") if self.ended.status is None else None

    @property
    def victim(self) -> int | None:
        """The rank that was killed alone, if one was."""
        return self.ended.life.victim if self.ended.status is None and self.of("killed") else None


@dataclass(slots=True)
class RunTrace:
    """The lives of one run, oldest first."""

    name: str
    lives: list[AttemptTrace] = field(default_factory=list)
    command: AttemptRequest | None = None  # the one that was asked for last

    def steps(self) -> Iterator[tuple[int, Event]]:
        """Everything that was noted of steps and of states after loading: number of the life, event."""
        for number, life in enumerate(self.lives):
            yield from ((number, event) for event in life.events if event["event"] in _COMPARED)

    def removal(self) -> AttemptRequest:
        """A life that removes what this run has in its storage."""
        assert self.command
        return replace(self.command, does="remove", kill=None, victim=None, pins=(), processes=1)

    @property
    def evidence(self) -> Event | None:
        """What it left behind; None unless it finished."""
        found = self.lives[-1].of("finished") if self.lives else []
        return found[-1] if found else None

    @property
    def failed(self) -> AttemptEnd | None:
        """The life that ended with an error, if one did."""
        return next((life.ended for life in self.lives if life.ended.status not in (0, None)), None)


@dataclass(frozen=True, slots=True)
class Executor:
    """Where runs are made: the user's ``command``, ``scratch`` for records, ``root`` for run directories, and two
    servers to live in. ``runs`` are all that were made, each of so many ``processes``; two evaluations are
    ``evaluations`` steps apart at most.
    """

    command: tuple[str, ...]
    scratch: Path
    root: str
    servers: Servers
    runs: list[RunTrace]
    evaluations: int
    processes: int

    def live(self, run: RunTrace, *more: str, workers: int, server: int = 0, **how: Any) -> AttemptTrace:
        """One more life of a run."""
        record = self.scratch / f"{run.name}-{len(run.lives) + 1}.jsonl"
        arguments = (
            *self.command,
            f"run.root={self.root}",
            f"run.name={run.name}",
            f"hydra.run.dir={self.scratch}/hydra/{run.name}",
            f"runtime.num_workers={workers}",
            *more,
        )
        if run not in self.runs:
            self.runs.append(run)
        life = AttemptRequest(
            run.name, arguments, record, evaluations=self.evaluations, processes=self.processes, **how
        )
        run.command = life
        lived = AttemptTrace(self.servers[server](life), workers, _gathered(life.records))
        run.lives.append(lived)
        return lived

    def forget(self, *runs: RunTrace) -> None:
        """Remove what is large of runs that are done: dumped states, and checkpoints on a disk."""
        for run in runs:
            for life in run.lives:
                dumped(life).unlink(missing_ok=True)
            if not is_remote(self.root):
                for folder in [*Path(local_root(self.root)).rglob(run.name)]:
                    shutil.rmtree(folder, ignore_errors=True)


def dumped(life: AttemptTrace) -> Path:
    """Where a life wrote the tensors of a state, if it was asked to."""
    record = life.ended.life.record
    return record.with_name(f"{record.name}.pt")


def _gathered(records: Sequence[Path]) -> tuple[Event, ...]:
    """What the first rank noted, with what the others had to themselves, and which of them was killed."""
    events, *others = map(_read, records)
    for rank, noted in enumerate(others, 1):
        told = {(event["event"], event["step"]): event for event in noted if event["event"] in _COMPARED}
        for event in events:
            if event["event"] in _COMPARED:
                _add(event, rank, told.get((event["event"], event["step"])))
    return (*events, *(event for noted in others for event in noted if event["event"] == "killed"))


def _add(event: Event, rank: int, other: Event | None) -> None:
    """Put the rank's own under names of its own. An event that it did not come to note is ``cut`` short."""
    if other is None:
        event["cut"] = True
        return
    for its, ours in _OF_EACH.items():
        found = {f"{path} (rank {rank})": value for path, value in other.get(its, {}).items()}
        event[ours] = event.get(ours, {}) | found


def _read(record: Path) -> tuple[Event, ...]:
    """The whole lines of a record."""
    text = record.read_bytes() if record.exists() else b""
    return tuple(map(json.loads, text[: text.rfind(b"\n") + 1].splitlines()))


def by_step(run: RunTrace) -> dict[int, Event]:
    """The last that was noted of every step."""
    return {event["step"]: event for _, event in run.steps() if event["event"] == "step"}


def losses(run: RunTrace) -> Sequence[tuple[int, int, float]]:
    """AttemptRequest, step and loss of everything that was done."""
    return [
        (number, event["step"], event["metrics"]["loss"])
        for number, event in run.steps()
        if event["event"] == "step" and "loss" in event["metrics"]
    ]

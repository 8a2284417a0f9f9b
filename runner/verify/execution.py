"""The client's side of ``runner.verify.fork_server``: attempts at runs in real processes, to be killed.

Two servers with different hash seeds stand ready, like two processes that a user starts.
"""

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import Interrupted, RunnerError
from runner.hashing import hex_digest
from runner.storage.location import is_remote, local_root
from runner.verify.options import python

_HASH_SEEDS = ("1", "2")
_LAST_LINES = 12  # of a log, for the verdict
STOPS = ("stop", "evaluating")  # moments of SIGTERM; at all others the kill is SIGKILL
_STOPPED = Interrupted.status
_LONGEST_PATH = 70  # bytes of a temporary folder: a socket of multiprocessing below it needs 34 of at most 107


class OutOfTime(Exception):
    """The proof may not take the time of another attempt."""


class Kill(NamedTuple):
    """The ``moment`` of a kill, the first ``step`` at which it may come, and a step ``after`` which the state is saved,
    too: the next attempt begins with the state of that step, and without anything that is in no state. After a stop by
    SIGTERM it does so anyway.
    """

    moment: str
    step: int = 0
    after: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptRequest:
    """A request for one attempt, in ``processes`` processes: the runner's ``arguments``, and the file for its record.

    ``steps`` is the last step; ``seconds`` of training end it earlier. ``kill`` says when it is killed, and ``victim``
    which rank alone; None: all ranks. ``pins`` are held constant (``runner.verify.pins``), ``dump`` is a step whose
    state is written beside the record, ``take`` a step after which the memory at the paths ``suspects`` is, and ``put``
    the record of another attempt whose memory there is taken over. ``watch`` notes what the user's code reaches outside
    of the process. ``evaluations`` is the most steps between two of them. A ``silent`` attempt records
    neither states nor memory, because a user's ``state_dict`` may change something. ``shift`` is by how many seconds
    the user's clocks are ahead. After ``limit`` seconds the attempt is ended, as a failure. ``does``: "train" or
    "remove".
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
    take: int | None = None
    put: str | None = None
    suspects: tuple[str, ...] = ()
    watch: bool = False
    evaluations: int | None = None
    silent: bool = False
    shift: int = 0
    limit: float | None = None
    does: str = "train"

    def json(self) -> str:
        """The request as the server reads it."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        paths = {"log": str(self.log), "temporary": str(self.temporary), "title": f"attempt {self.record.stem}"}
        return json.dumps(fields | {"record": None, "records": [*map(str, self.records)]} | paths)

    @property
    def records(self) -> list[Path]:
        """The records of all ranks."""
        others = [self.record.with_name(f"{self.record.name}.rank{rank}") for rank in range(1, self.processes)]
        return [self.record, *others]

    @property
    def log(self) -> Path:
        """The output of all ranks."""
        return self.record.with_suffix(".log")

    @property
    def temporary(self) -> Path:
        """The folder for temporary files: empty at the start, and the same for all attempts, which may see its name. A
        short path, because data workers make sockets below it.
        """
        folder = self.record.with_name("tmp")
        if len(os.fsencode(folder)) <= _LONGEST_PATH or not os.access("/tmp", os.W_OK):
            return folder
        return Path("/tmp", f"runner-verify-{hex_digest(os.fsencode(folder), size=4)}")

    @property
    def dumped(self) -> Path:
        """The tensors of the state after the step ``dump``."""
        return self.record.with_name(f"{self.record.name}.pt")


class ForkServer:
    """One process to fork attempts from. Libraries write caches into the ``temporary`` folder while it imports them."""

    def __init__(self, hash_seed: str, cwd: Path | None, temporary: str) -> None:
        environment = {"PYTHONHASHSEED": hash_seed, **os.environ}  # a seed of the user is meant for every attempt
        environment["TMPDIR"] = temporary
        self.import_seconds = 0.0
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            python("from runner.verify.fork_server import serve\nserve()", first=[str(cwd)] if cwd else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            cwd=cwd,
        )

    def __call__(self, request: AttemptRequest) -> int | None:
        """Run an attempt; returns its exit status, or None after SIGKILL."""
        self._send(request.json())
        status: int | None = self._receive()["status"]
        return status

    def import_modules(self, names: Sequence[str]) -> None:
        """Have the next attempts find these modules imported; does not wait for it."""
        self._send(json.dumps({"modules": [*names]}))

    def close(self) -> None:
        """End the server, and with it a running attempt."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _send(self, line: str) -> None:
        if not self.import_seconds:
            self._receive()  # that it is ready
            self.import_seconds = time.monotonic() - self._began
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RunnerError("the process from which attempts are forked ended; its last output says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


Servers = tuple[ForkServer, ForkServer]


@contextmanager
def fork_servers(cwd: Path | None = None) -> Iterator[Servers]:
    """Two servers for the length of a block; they import at the same time."""
    with tempfile.TemporaryDirectory(prefix="runner-verify-", ignore_cleanup_errors=True) as temporary:
        first, second = (ForkServer(seed, cwd, temporary) for seed in _HASH_SEEDS)
        try:
            yield first, second
        finally:
            for server in (first, second):
                server.close()


Event = dict[str, Any]

_COMPARED = ("step", "resumed", "evaluated")
# Fields that every rank has for itself, and where they are merged to; only ``state`` is compared with a checkpoint.
_PER_RANK = {"batch": "batch", "generators": "generators", "gradients": "gradients", "state": "others"}


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """Why an attempt ended by itself with an error: exit ``status``, the error's ``kind``, its message (or the end of
    the output), and the line of the user's code that it came through.
    """

    status: int
    kind: str
    message: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class AttemptTrace:
    """An attempt that has ended, with the exit ``status`` (None: by SIGKILL), and the events of its record in order."""

    request: AttemptRequest
    status: int | None
    workers: int
    events: tuple[Event, ...]
    seconds: float = 0.0

    def select(self, name: str) -> list[Event]:
        """The events of one name."""
        return [event for event in self.events if event["event"] == name]

    @property
    def first(self) -> int:
        """The step after which it began."""
        return next((event["step"] for event in self.select("resumed")), 0)

    @property
    def last(self) -> int:
        """The last step that it did."""
        return max((event["step"] for event in self.select("step")), default=self.first)

    @property
    def killed(self) -> str | None:
        """The moment at which it, or one of its processes, was killed or stopped. "?": by somebody else. None: it was
        not.
        """
        moment = next((event["moment"] for event in self.select("killed")), "?")
        return moment if self.status is None or self.stopped else None

    @property
    def stopped(self) -> bool:
        """Whether it ended after SIGTERM, as promised: with its last step committed."""
        return self.status == _STOPPED and any(event["moment"] in STOPS for event in self.select("killed"))

    @property
    def victim(self) -> int | None:
        """The rank that was killed alone, if one was."""
        return self.request.victim if self.killed and self.select("killed") else None

    @property
    def failure(self) -> AttemptFailure | None:
        """Why it ended with an error; None if it did not. A process that a watchdog ended has only its output."""
        if self.status in (0, None) or self.stopped:
            return None
        event = next((event for event in self.select("failed") if event["message"]), None)
        if event:
            return AttemptFailure(self.status, event["kind"], event["message"].strip(), event.get("where", ""))
        lines = [line for line in self.request.log.read_text(errors="replace").splitlines() if line.strip()]
        return AttemptFailure(self.status, RunnerError.kind, "\n".join(lines[-_LAST_LINES:]))


@dataclass(slots=True)
class RunTrace:
    """The attempts at one run, oldest first."""

    name: str
    attempts: list[AttemptTrace] = field(default_factory=list)
    request: AttemptRequest | None = None  # the last one

    def compared(self) -> Iterator[tuple[int, Event]]:
        """All events of steps and of states after loading, with the number of the attempt (from 0). A step whose
        evaluation was interrupted is an event of the attempt that repeats the evaluation.
        """
        due: Event = {}
        for number, attempt in enumerate(self.attempts):
            for event in (event for event in attempt.events if event["event"] in _COMPARED):
                if event.get("due"):
                    due = event
                elif event["step"] != due.get("step") or event["event"] == "step":
                    if event["event"] != "evaluated":
                        yield number, event
                elif event["event"] == "evaluated":
                    yield number, {**due, **event, "event": "step"}
                else:  # the state before the evaluation, with which no state of the undisturbed run can be compared
                    yield number, {key: value for key, value in event.items() if key not in ("state", "others")}

    def steps(self) -> Iterator[tuple[int, Event]]:
        """The same for steps alone."""
        return ((number, event) for number, event in self.compared() if event["event"] == "step")

    def by_step(self) -> dict[int, Event]:
        """The last event of every step."""
        return {event["step"]: event for _, event in self.steps()}

    def removal(self) -> AttemptRequest:
        """The request to remove all objects of this run from its storage."""
        assert self.request
        return replace(self.request, does="remove", kill=None, victim=None, pins=(), processes=1)

    @property
    def evidence(self) -> Event | None:
        """Checkpoints, metric lines, result and audit of a finished run; None unless it finished."""
        events = self.attempts[-1].select("finished") if self.attempts else []
        return events[-1] if events else None

    @property
    def failure(self) -> AttemptFailure | None:
        """Why an attempt ended with an error, if one did."""
        return next((attempt.failure for attempt in self.attempts if attempt.failure), None)


@dataclass(frozen=True, slots=True)
class Executor:
    """Makes runs of the user's ``command``, with records in ``scratch`` and run directories below ``root``.

    ``runs`` collects all runs. Each has ``processes`` processes, and ``evaluations`` steps at most between evaluations.
    ``limit`` is the most seconds of an attempt, and ``deadline`` the end of all, by ``time.monotonic``.
    """

    command: tuple[str, ...]
    scratch: Path
    root: str
    servers: Servers
    runs: list[RunTrace]
    evaluations: int
    processes: int
    limit: float | None = None
    deadline: float = math.inf

    def left(self) -> float:
        """The seconds that are left."""
        return self.deadline - time.monotonic()

    def attempt(self, run: RunTrace, *overrides: str, workers: int, server: int = 0, **fields: Any) -> AttemptTrace:
        """Make the next attempt at a run; ``fields`` are those of an AttemptRequest. Raises OutOfTime."""
        limits = [limit for limit in (self.limit, self.left()) if limit is not None and limit < math.inf]
        if self.left() <= 0:
            raise OutOfTime
        arguments = (
            *self.command,
            f"run.root={self.root}",
            f"run.name={run.name}",
            f"hydra.run.dir={self.scratch}/hydra/{run.name}",
            f"runtime.num_workers={workers}",
            *overrides,
        )
        if run not in self.runs:
            self.runs.append(run)
        record = self.scratch / f"{run.name}-{len(run.attempts) + 1}.jsonl"
        run.request = request = AttemptRequest(
            run.name,
            arguments,
            record,
            evaluations=self.evaluations,
            processes=self.processes,
            limit=min(limits, default=None),
            **fields,
        )
        began = time.monotonic()
        try:
            status = self.servers[server](request)
        finally:
            shutil.rmtree(request.temporary, ignore_errors=True)
        trace = AttemptTrace(request, status, workers, _merged(request.records), time.monotonic() - began)
        run.attempts.append(trace)
        return trace

    def remove_large_files(self, *runs: RunTrace) -> None:
        """Remove dumped states, and run directories on a disk, of runs that are compared already."""
        for run in runs:
            for attempt in run.attempts:
                for copy in (attempt.request.dumped, *self.scratch.glob(f"{attempt.request.record.name}*.taken")):
                    copy.unlink(missing_ok=True)
            if not is_remote(self.root):
                for folder in [*Path(local_root(self.root)).rglob(run.name)]:
                    shutil.rmtree(folder, ignore_errors=True)


def _merged(records: Sequence[Path]) -> tuple[Event, ...]:
    """The events of rank 0, with the fields that other ranks have for themselves, and how the others ended."""
    events, *others = map(_read, records)
    for rank, record in enumerate(others, 1):
        by_step = {(event["event"], event["step"]): event for event in record if event["event"] in _COMPARED}
        for event in events:
            if event["event"] in _COMPARED:
                _merge(event, rank, by_step.get((event["event"], event["step"])))
    return (*events, *(event for record in others for event in record if event["event"] in ("killed", "failed")))


def _merge(event: Event, rank: int, other: Event | None) -> None:
    """Add the fields of a rank. An event that the rank did not come to record is ``cut`` short."""
    if other is None:
        event["cut"] = True
        return
    for name, target in _PER_RANK.items():
        if name in other:
            event[target] = event.get(target, {}) | {f"{p} (rank {rank})": v for p, v in other[name].items()}


def _read(record: Path) -> tuple[Event, ...]:
    """The complete lines of a record; a kill may have cut the last one."""
    text = record.read_bytes() if record.exists() else b""
    return tuple(map(json.loads, text[: text.rfind(b"\n") + 1].splitlines()))

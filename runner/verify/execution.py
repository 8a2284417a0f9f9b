"""Runs made of attempts in real processes, which ``fork_server`` forks, and the traces that they leave."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import Interrupted, RunnerError
from runner.hashing import hex_digest
from runner.storage.location import is_remote, local_root
from runner.verify.source import Lines

_HASH_SEEDS = ("1", "2")
_LONGEST_PATH = 70  # bytes of a temporary folder: a socket of multiprocessing below it needs 34 of at most 107
_LAST_LINES = 12  # at the end of a log, for the verdict
_SECOND = 15  # attempts seem to begin at this second of an hour, and attempts of half an hour end in the same hour
STOPS = ("stop", "evaluating")  # moments of SIGTERM; at all others the kill is SIGKILL


class Kill(NamedTuple):
    """A kill at a ``moment``, in ``step`` at the earliest. ``after`` is a step whose state is saved, too, so that the
    next attempt begins with it (after a stop by SIGTERM it does anyway). ``victim`` is a rank; None: all ranks.
    """

    moment: str
    step: int = 0
    after: int | None = None
    victim: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptRequest:
    """A request for one attempt at the run ``name``, with the runner's ``arguments`` and a ``file`` for its record.

    ``steps`` is the last step; ``seconds`` of training end it earlier. ``pins`` are held constant
    (``runner.verify.controls``). ``suspects`` are paths in memory, whose values are copied after the step ``take``, or
    replaced by the copies of the attempt with the record ``put``. ``evaluations``: at most so many steps between two.
    A ``silent`` attempt records neither states nor memory, because a user's ``state_dict`` may change something. The
    user's clocks are ``shift`` seconds ahead and ``late`` seconds behind. After ``limit`` seconds the attempt is ended,
    as a failure. ``imports`` are modules that it needs. It has the temporary files of the run's earlier attempts,
    but not on a ``new_machine``. With ``removes`` it removes the run instead.
    """

    name: str
    arguments: tuple[str, ...]
    file: str
    steps: int | None = None
    seconds: float | None = None
    kill: Kill | None = None
    processes: int = 1
    pins: tuple[str, ...] = ()
    take: int | None = None
    put: str | None = None
    suspects: tuple[str, ...] = ()
    evaluations: int | None = None
    silent: bool = False
    shift: int = 0
    late: int = 0
    limit: float | None = None
    imports: tuple[str, ...] = ()
    new_machine: bool = False
    removes: bool = False

    @classmethod
    def parse(cls, line: bytes) -> "AttemptRequest":
        """The request that a client sent."""
        fields = json.loads(line)
        return cls(**{**fields, "kill": Kill(*fields["kill"]) if fields["kill"] else None})

    def record(self, rank: int = 0) -> Path:
        """The record of a rank."""
        return Path(f"{self.file}.rank{rank}" if rank else self.file)

    def copies(self, rank: int = 0) -> Path:
        """The values of suspects that a rank copied."""
        return Path(f"{self.record(rank)}.copies")

    @property
    def log(self) -> Path:
        """The output of all ranks."""
        return Path(self.file).with_suffix(".log")

    @property
    def temporary(self) -> Path:
        """The folder for temporary files: the same for all runs, and short, because workers make sockets in it."""
        folder = Path(self.file).with_name("tmp")
        if len(os.fsencode(folder)) <= _LONGEST_PATH or not os.access("/tmp", os.W_OK):
            return folder
        return Path("/tmp", f"runner-verify-{hex_digest(os.fsencode(folder), size=4)}")


class ForkServer:
    """One process to fork attempts from. Libraries write caches into the ``temporary`` folder while it imports them."""

    def __init__(self, hash_seed: str, cwd: Path | None, temporary: str) -> None:
        # With ``python -m`` a ``runner.py`` of the user's in the working directory would hide the runner.
        path = [*([str(cwd)] if cwd else []), *sys.path]
        code = f"import sys\nsys.path[:] = {path!r}\nfrom runner.verify.fork_server import serve\nserve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": hash_seed, **os.environ, "TMPDIR": temporary},  # a seed of the user is for all
            start_new_session=True,
            cwd=cwd,
        )

    def __call__(self, request: AttemptRequest) -> int | None:
        """Run an attempt; returns its exit status, or None after SIGKILL."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RunnerError("the process from which attempts are forked ended; its last output says why")
        status: int | None = json.loads(line)
        return status

    def close(self) -> None:
        """End the server, and with it a running attempt."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


Servers = tuple[ForkServer, ForkServer]


@contextlib.contextmanager
def fork_servers(cwd: Path | None = None) -> Iterator[Servers]:
    """Two servers with different hash seeds for the length of a block, like two processes that a user starts."""
    with tempfile.TemporaryDirectory(prefix="runner-verify-", ignore_cleanup_errors=True) as temporary:
        first, second = (ForkServer(seed, cwd, temporary) for seed in _HASH_SEEDS)
        try:
            yield first, second
        finally:
            for server in (first, second):
                server.close()


class OutOfTime(Exception):
    """The proof may not take the time of another attempt."""


Event = dict[str, Any]

_COMPARED = ("step", "resumed", "evaluated")
_WITH_METRICS = ("metrics", "evaluation", "state", "others", "checkpoints", "lines", "result")
_OF_METRICS = ("train/", "callback.")
# Fields that differ between ranks, and the fields to merge them into: ``state`` must stay as in a checkpoint.
_PER_RANK = {"batch": "batch", "generators": "generators", "gradients": "gradients", "state": "others"}


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """The error that ended an attempt: exit ``status``, ``kind``, message (or end of the output), the user's line."""

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
        """The moment at which it or one of its processes was killed or stopped, if any; "?": by somebody else."""
        moment = next((event["moment"] for event in self.select("killed")), "?")
        return moment if self.status is None or self.stopped else None

    @property
    def stopped(self) -> bool:
        """Whether it ended after SIGTERM, as promised: with its last step committed."""
        return self.status == Interrupted.status and any(event["moment"] in STOPS for event in self.select("killed"))

    @property
    def victim(self) -> int | None:
        """The rank that was killed alone, if one was."""
        return self.request.kill.victim if self.request.kill and self.killed and self.select("killed") else None

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

    def compared(self) -> Iterator[tuple[int, Event]]:
        """The events of steps and of states after loading, with the number of the attempt, from 0. A step whose
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

    @property
    def sources(self) -> dict[str, list[Lines]]:
        """The lines of the user's classes of each object of the experiment."""
        instances = [event for attempt in self.attempts[:1] for event in attempt.select("instances")]
        return {key: lines for event in instances for key, lines in event["sources"].items()}

    @property
    def evidence(self) -> Event | None:
        """Checkpoints, metric lines, result and audit of a finished run; None unless it finished."""
        events = self.attempts[-1].select("finished") if self.attempts else []
        return events[-1] if events else None

    @property
    def failure(self) -> AttemptFailure | None:
        """Why an attempt ended with an error, if one did."""
        return next((attempt.failure for attempt in self.attempts if attempt.failure), None)


@dataclass(slots=True)
class Executor:
    """Makes runs of the user's ``command``, with records in ``scratch`` and run directories below ``root``.

    ``requests`` collects the last request for each run. Each run has ``processes`` processes, and ``evaluations``
    steps at most between evaluations. ``limit`` is the most seconds of an attempt, and ``deadline`` the end of all, by
    ``time.monotonic``. ``imports`` are modules that all attempts need. All attempts begin at the same time of the
    user's ``clock`` (seconds since the epoch), so that an hour that passes between them makes no difference.
    ``ignored`` are names of metrics that are left out of all records.
    """

    command: tuple[str, ...]
    scratch: Path
    root: str
    servers: Servers
    requests: dict[str, AttemptRequest]
    processes: int
    evaluations: int | None = None
    limit: float = math.inf
    deadline: float = math.inf
    imports: tuple[str, ...] = ()
    ignored: set[str] = field(default_factory=set)
    clock: int = field(default_factory=lambda: int(time.time()) // 3600 * 3600 + _SECOND)

    def seconds_left(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - time.monotonic()

    def attempt(self, run: RunTrace, *overrides: str, workers: int, server: int = 0, **fields: Any) -> AttemptTrace:
        """Make the next attempt at a run; ``fields`` are for its AttemptRequest. Raises OutOfTime."""
        limit = min(self.limit, self.seconds_left())
        if limit <= 0:
            raise OutOfTime
        arguments = (
            *self.command,
            f"run.root={self.root}",
            f"run.name={run.name}",
            f"hydra.run.dir={self.scratch}/hydra/{run.name}",
            f"runtime.num_workers={workers}",
            *overrides,
        )
        self.requests[run.name] = request = AttemptRequest(
            run.name,
            arguments,
            f"{self.scratch}/{run.name}-{len(run.attempts) + 1}.jsonl",
            evaluations=self.evaluations,
            processes=self.processes,
            limit=limit if limit < math.inf else None,
            imports=self.imports,
            late=round(time.time() - self.clock),
            **fields,
        )
        if request.new_machine or not run.attempts:
            shutil.rmtree(request.temporary, ignore_errors=True)
        began = time.monotonic()
        status = self.servers[server](request)
        trace = AttemptTrace(request, status, workers, _events(request), time.monotonic() - began)
        run.attempts.append(_without(trace, self.ignored) if self.ignored else trace)
        return run.attempts[-1]

    def ignore(self, metric: str, *runs: RunTrace) -> None:
        """Leave a metric out of these runs, and of later ones."""
        self.ignored.add(metric)
        for run in runs:
            run.attempts[:] = [_without(attempt, self.ignored) for attempt in run.attempts]

    def remove_files(self, *runs: RunTrace) -> None:
        """Remove copies of memory, and run directories on a disk, of runs that are compared already."""
        for run in runs:
            for copy in self.scratch.glob(f"{run.name}-*.copies"):
                copy.unlink()
            if not is_remote(self.root):
                for folder in [*Path(local_root(self.root)).rglob(run.name)]:
                    shutil.rmtree(folder, ignore_errors=True)


def _without(attempt: AttemptTrace, metrics: set[str]) -> AttemptTrace:
    """An attempt without metrics of these names, also in metric lines and in the windows of callbacks."""
    inner = tuple(f"/{name}" for name in metrics)

    def names(key: str) -> bool:
        return key in metrics or (key.startswith(_OF_METRICS) and key.endswith(inner))

    def rest(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rest(each) for key, each in value.items() if not names(key)}
        return [*map(rest, value)] if isinstance(value, list) else value

    events = ({k: rest(v) if k in _WITH_METRICS else v for k, v in event.items()} for event in attempt.events)
    return replace(attempt, events=tuple(events))


def _events(request: AttemptRequest) -> tuple[Event, ...]:
    """The events of rank 0, with the fields of all ranks that differ between them, and the ends of the other ranks."""
    events, *others = (_read(request.record(rank)) for rank in range(request.processes))
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


def _read(record: Path) -> list[Event]:
    """The complete lines of a record; a kill may have cut the last one."""
    text = record.read_bytes() if record.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

"""Metric writers for services outside, such as MLflow: a process of its own sends what is committed.

The training process has a ``ServiceProcess``. It tells its child after each commit how far the lines of
``metrics.lines`` are committed, and never waits for it. The child reads these lines, sends them, and notes in the run
directory the id of the run at the service and the last step sent:

    writers/mlflow.json    {"id": "4ae1...", "sent": 120}

So a service gets each point once, never a point that a kill takes back, and after an outage what it missed; ``runs
push`` sends the same way. The libraries of services draw from Python's random generator, which is a part of the state
that a run restores: in the training process, an unreachable server would change its results. Nor does the child share
the interpreter's lock, signals and exit with the training.
"""

import json
import logging
import math
import os
import pkgutil
import select
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from runner.errors import ConfigError, RunInUse, printable, redacted
from runner.metrics import lines
from runner.metrics.writer import WriterContext
from runner.plain import parse_object
from runner.storage import open_location
from runner.storage.location import Lock

log = logging.getLogger("runner")

FOLDER = "writers"
_PROGRAM = "from runner.metrics.service import main; main()"
_BATCH = 200  # points of one call of ``send``
_MAX_PAUSE = 60.0  # seconds between two tries to reach a service
_START_SECONDS = 120.0  # for the imports of a service's library
_LAST_SECONDS = 10.0  # for what is left to be sent when the attempt ends, or its process has died
_POLL_SECONDS = 0.5
_CONTEXT = ("experiment", "run", "id", "hyperparameters", "attempt", "step")


class Point(NamedTuple):
    """The metrics of a step. ``time``: when they were reported, in seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]


class ServiceWriter(ABC):
    """The metrics of a run for a service outside. A subclass is configured as a metric writer is, with plain values as
    arguments; its objects live in a process of their own, and may wait and draw random numbers.

    Whatever ``open`` and ``send`` raise counts as an outage: after a growing pause both are called again.
    """

    def __init__(self, context: WriterContext) -> None:
        self.context = context

    @abstractmethod
    def open(self, id: str | None) -> str:  # noqa: A002  (the word of the services)
        """Connect, and begin a run at the service (None), or continue with its run ``id``. Returns the id, which later
        attempts get. ``context.id`` is the run's own, which no other run has.
        """

    @abstractmethod
    def send(self, points: Sequence[Point]) -> None:
        """Send points, and return when the service has them. Steps only grow, unless the last points are sent again
        because the process died before it could note them.
        """

    def close(self, status: str) -> None:  # noqa: B027  (nothing, unless a service wants it)
        """All is sent. The ``status`` of the run: finished, interrupted, failed, killed, or running, where it is not
        known to have ended.
        """


class Sender:
    """Sends the lines of a run, and keeps the record of what is sent."""

    def __init__(self, name: str, writer: ServiceWriter) -> None:
        self._writer = writer
        self._location = writer.context.location
        self._record = f"{FOLDER}/{name}.json"
        self._id: str | None = None  # while the service is connected

    def push(self, end: Mapping[str, Any]) -> int:
        """Send all lines up to ``end``, a mark of ``LinesWriter``, that are not sent yet; returns their number. Raises
        what the service does.
        """
        before, sent = self._read()
        total, unsent = 0, self._points(end, sent)
        try:
            if self._id is None:
                self._id = self._writer.open(before)
                self._note(sent)
            while points := [*islice(unsent, _BATCH)]:
                self._writer.send(points)
                self._note(points[-1].step)
                total += len(points)
        except Exception:
            self._id = None
            raise
        return total

    def left(self, end: Mapping[str, Any]) -> int:
        """The number of points up to ``end`` that are not sent, as far as the record says."""
        return sum(1 for _ in self._points(end, self._read()[1]))

    def _points(self, end: Mapping[str, Any], sent: int) -> Iterator[Point]:
        for line in lines.committed(self._location, end, after=sent):
            step, moment = line.pop("step"), line.pop(lines.TIME, 0.0)
            yield Point(step, moment, {tag: math.nan if value is None else value for tag, value in line.items()})

    def _read(self) -> tuple[str | None, int]:
        """The id of the run at the service, and the last step sent."""
        record = parse_object(self._location.read(self._record, limit=1 << 16) or b"") or {}
        return record.get("id"), integer if isinstance(integer := record.get("sent"), int) else -1

    def _note(self, sent: int) -> None:
        self._location.replace(self._record, [json.dumps({"id": self._id, "sent": sent}).encode() + b"\n"])


def push(name: str, writer: ServiceWriter, end: Mapping[str, Any], status: str) -> int:
    """Send what a service does not have yet of a run; returns the number of points. Raises RunInUse while a process of
    this machine does so, and whatever the service raises.
    """
    location = writer.context.location
    lock = location.lock(f"{FOLDER}/{name}.lock")
    if lock is None:
        raise RunInUse(f"{location.url}: another process sends to {name}; it continues by itself")
    try:
        total = Sender(name, writer).push(end)
        writer.close(status)
    finally:
        lock.release()
    return total


def make(target: str, context: WriterContext, arguments: Mapping[str, Any]) -> ServiceWriter:
    """The writer that ``target``, a dotted path, names. Raises ConfigError."""
    try:
        writer = pkgutil.resolve_name(target)(context, **arguments)
    except Exception as error:
        raise ConfigError(f"{target}: {type(error).__name__}: {error}") from error
    if not isinstance(writer, ServiceWriter):
        raise ConfigError(f"{target} makes a {type(writer).__name__}; expected a subclass of {__name__}.ServiceWriter")
    return writer


class ServiceProcess:
    """The metric writer in the training process, for a ``ServiceWriter`` in a child. Raises ConfigError if the child
    cannot make it.
    """

    def __init__(self, name: str, target: str, arguments: Mapping[str, Any], context: WriterContext) -> None:
        self._name = name
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # signals for the group of the training are not for the child
        )
        facts = {field: getattr(context, field) for field in _CONTEXT}
        place = {"url": context.location.url, "options": dict(context.options or {})}
        try:
            self._ask({"name": name, "target": target, "arguments": dict(arguments), "context": facts, **place})
        except (ConfigError, TypeError) as error:
            self._child.kill()
            self._close()
            raise ConfigError(f"metrics.writers.{name}: {error}") from error
        self._reader = threading.Thread(target=self._show, name=f"writer {name}", daemon=True)
        self._reader.start()

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        """Nothing: the child reads what ``LinesWriter`` has written."""

    def mark(self, step: int) -> dict[str, Any]:
        """No mark: the record in the run directory has it."""
        return {}

    def flush(self) -> None:
        """Nothing: what is not committed is not sent."""

    def close(self) -> None:
        """Nothing: see ``end``."""

    def committed(self, end: Mapping[str, Any]) -> None:
        """The lines up to ``end`` are committed. Does not wait."""
        self._tell({"end": dict(end)})

    def end(self, status: str) -> None:
        """The attempt ended. Waits a few seconds until all is sent."""
        self._tell({"status": status})
        try:
            self._child.wait(_LAST_SECONDS + 1)
        except subprocess.TimeoutExpired:
            self._child.kill()
        self._reader.join(_LAST_SECONDS)
        self._close()

    def _ask(self, request: Mapping[str, Any]) -> None:
        """Have the child make the writer."""
        assert self._child.stdin
        assert self._child.stdout
        with suppress(BrokenPipeError):  # it has died, and its error is on the screen
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        ready, _, _ = select.select([self._child.stdout], [], [], _START_SECONDS)
        answer = self._child.stdout.readline() if ready else f"no answer in {_START_SECONDS:.0f} seconds".encode()
        if answer != b"ready\n":
            raise ConfigError(answer.decode().strip() or "its process ended at once")
        os.set_blocking(self._child.stdin.fileno(), False)

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin
        with suppress(OSError, ValueError):  # the child has died, or is so far behind that a later message will do
            os.write(self._child.stdin.fileno(), json.dumps(message).encode() + b"\n")

    def _show(self) -> None:
        """The thread: logs what the child says."""
        assert self._child.stdout
        for line in self._child.stdout:
            log.warning("metrics.writers.%s: %s", self._name, printable(redacted(line.decode().strip())))

    def _close(self) -> None:
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    """The child: makes the writer that the first line of its input describes, and sends until its parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    request = json.loads(sys.stdin.readline())
    context = WriterContext(open_location(request["url"], request["options"]), **request["context"])
    try:
        writer = make(request["target"], context, request["arguments"])
    except ConfigError as error:
        print(printable(str(error)), file=answers)
        return
    print("ready", file=answers)
    with suppress(BrokenPipeError):
        _Sender(request["name"], writer, lambda text: print(text, file=answers)).run()
    os._exit(0)  # without waiting for threads of the library


class _Sender:
    """Sends whenever the parent says that more is committed, until the attempt ends or the parent dies."""

    def __init__(self, name: str, writer: ServiceWriter, say: Callable[[str], None]) -> None:
        self._name, self._writer, self._say = name, writer, say
        self._sender = Sender(name, writer)
        self._end: dict[str, Any] = {}  # as far as lines are committed ...
        self._done: dict[str, Any] = {}  # ... and sent
        self._status: str | None = None  # of the run, once the attempt has ended
        self._due: float | None = None  # when to try again after an error (time.monotonic)
        self._lock: Lock | None = None
        self._changed = threading.Condition()
        self._parent = os.getppid()
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self) -> None:
        """Send until the end."""
        pause = 1.0
        while self._wait():
            try:
                self._push(self._end)
                pause = 1.0
            except Exception as error:
                if self._due is None:
                    self._say(f"{type(error).__name__}: {error}. Training continues; the points are sent later")
                self._due, pause = time.monotonic() + pause, min(2 * pause, _MAX_PAUSE)
        threading.Timer(_LAST_SECONDS, self._give_up).start()
        try:
            self._push(self._end)
            self._writer.close(self._status or "killed")
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")
            self._give_up()

    def _wait(self) -> bool:
        """Wait until there is something to send; False once the attempt has ended, or its process died."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._status or (self._ready() and self._due is None), _POLL_SECONDS)
            if self._status or os.getppid() != self._parent:
                return False
            if self._ready():
                return True

    def _ready(self) -> bool:
        return self._end != self._done and (self._due is None or time.monotonic() >= self._due)

    def _push(self, end: dict[str, Any]) -> None:
        while self._lock is None:  # the child of a killed attempt may still be sending
            self._lock = self._writer.context.location.lock(f"{FOLDER}/{self._name}.lock")
            time.sleep(0 if self._lock else _POLL_SECONDS)
        self._sender.push(end)
        if self._due is not None:
            self._say("the service has all points now")
        self._done, self._due = end, None

    def _listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            with self._changed:
                self._end, self._status = message.get("end", self._end), message.get("status")
                self._changed.notify_all()

    def _give_up(self) -> None:
        left, url = self._sender.left(self._end), self._writer.context.location.url
        if left:
            self._say(f"{left} points are not sent yet: the next attempt sends them, or runs push {url} {self._name}")
        os._exit(1)

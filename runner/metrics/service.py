"""Metric writers for services outside, such as MLflow: a process of its own sends what is committed.

The training process has a ``ServiceProcess``. After each commit it sends its child the mark up to which the lines of
``metrics.lines`` are committed, and never waits for it. The child reads these lines, sends them, and notes in the run
directory the id of the run at the service and the last step sent:

    writers/mlflow.json    {"id": "4ae1...", "sent": 120}

So a service gets each point once, never a point that a kill takes back, and after an outage all that it missed; ``runs
push`` sends the same way. The libraries of services draw from Python's random generator, which is a part of the state
that a run restores: in the training process, an unreachable server would change its results. Nor does the child share
the interpreter's lock, signals and exit with the training.
"""

import json
import logging
import math
import os
import pkgutil
import queue
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from runner.errors import ConfigError, RunInUse, import_hint, printable, redacted
from runner.metrics import lines
from runner.metrics.writer import MetricWriter, WriterContext
from runner.plain import parse_object
from runner.storage import open_location
from runner.storage.location import Lock

log = logging.getLogger("runner")

FOLDER = "writers"
_PROGRAM = "from runner.metrics.service import main; main()"
_BATCH = 200  # points of one call of ``send``; a process that dies before it notes them sends them again
_MAX_PAUSE = 60.0  # seconds between two tries to reach a service
_START_SECONDS = 120.0  # for the imports of a service's library
_LAST_SECONDS = 10  # to send the rest when the attempt ends, or its process has died
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
        attempts get. ``context.id`` is the id of the run here, which no other run has.
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
    """Sends the lines of a run, and keeps the record of what is sent. One process of a machine at a time does so."""

    def __init__(self, name: str, writer: ServiceWriter) -> None:
        self._writer = writer
        self._location = writer.context.location
        self._path = f"{FOLDER}/{name}"
        self._lock: Lock | None = None
        self._id: str | None = None  # while the service is connected

    def lock(self) -> Lock | None:
        """The lock of this sender; None while another process has it."""
        self._lock = self._lock or self._location.lock(f"{self._path}.lock")
        return self._lock

    def push(self, end: Mapping[str, Any]) -> int:
        """Send all lines up to ``end``, a mark of ``LinesWriter``, that are not sent yet; returns their number. Raises
        whatever the service raises.
        """
        while self.lock() is None:  # the child of a killed attempt may still be sending
            time.sleep(_POLL_SECONDS)
        record = parse_object(self._location.read(f"{self._path}.json", limit=1 << 16) or b"") or {}
        step = integer if isinstance(integer := record.get("sent"), int) else -1
        total, unsent = 0, self._points(end, step)
        try:
            if self._id is None:
                self._id = self._writer.open(record.get("id"))
                self._note(step)
            while points := [*islice(unsent, _BATCH)]:
                self._writer.send(points)
                self._note(points[-1].step)
                total += len(points)
        except Exception:
            self._id = None
            raise
        return total

    def _points(self, end: Mapping[str, Any], after: int) -> Iterator[Point]:
        for line in lines.committed(self._location, end, after=after):
            step, moment = line.pop("step"), line.pop(lines.TIME, 0.0)
            yield Point(step, moment, {tag: math.nan if value is None else value for tag, value in line.items()})

    def _note(self, step: int) -> None:
        self._location.replace(f"{self._path}.json", [json.dumps({"id": self._id, "sent": step}).encode() + b"\n"])


def push(name: str, writer: ServiceWriter, end: Mapping[str, Any], status: str) -> int:
    """Send the points of a run that a service does not have yet; returns their number. Raises RunInUse while another
    process of this machine does so, and whatever the service raises.
    """
    sender = Sender(name, writer)
    if (lock := sender.lock()) is None:
        raise RunInUse(f"{writer.context.location.url}: another process sends to {name}; it continues by itself")
    try:
        total = sender.push(end)
        writer.close(status)
    finally:
        lock.release()
    return total


def make(target: str, context: WriterContext, arguments: Mapping[str, Any]) -> ServiceWriter:
    """The writer that ``target``, a dotted path, names. Raises ConfigError."""
    try:
        writer = pkgutil.resolve_name(target)(context, **arguments)
    except Exception as error:
        hint = import_hint(error)
        raise ConfigError(f"{target}: {type(error).__name__}: {error}{'.' * bool(hint)}{hint}") from error
    if not isinstance(writer, ServiceWriter):
        raise ConfigError(f"{target} makes a {type(writer).__name__}; expected a subclass of {__name__}.ServiceWriter")
    return writer


class ServiceProcess(MetricWriter):
    """The metric writer in the training process, for a ``ServiceWriter`` in a child. Raises ConfigError if the child
    cannot make it. The child reads committed metrics from the file of ``LinesWriter``, so ``add`` does nothing.
    """

    def __init__(self, name: str, target: str, arguments: Mapping[str, Any], context: WriterContext) -> None:
        self._name, self._url = name, context.location.url
        facts = {field: getattr(context, field) for field in _CONTEXT}
        request = {"name": name, "target": target, "arguments": dict(arguments), "context": facts, "url": self._url}
        try:
            text = json.dumps({**request, "options": dict(context.options or {}), "parent": os.getpid()})
        except TypeError as error:
            raise ConfigError(f"metrics.writers.{name}: {error}") from error
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # signals for the group of the training are not for the child
        )
        assert self._child.stdin
        assert self._child.stdout
        self._input, self._output = self._child.stdin, self._child.stdout
        if (answer := self._ask(text)) != "ready":
            self._child.kill()
            self._wait()
            raise ConfigError(f"metrics.writers.{name}: {answer or 'its process ended at once'}")
        os.set_blocking(self._input.fileno(), False)
        self._reader = threading.Thread(target=self._show, name=f"writer {name}", daemon=True)
        self._reader.start()

    def committed(self, end: Mapping[str, Any]) -> None:
        """The lines up to ``end`` are committed. Does not wait."""
        self._tell({"end": dict(end)})

    def close(self, status: str) -> None:
        """The attempt ended. Waits a few seconds until all is sent."""
        self._tell({"status": status})
        try:
            self._child.wait(_LAST_SECONDS + 1)
        except subprocess.TimeoutExpired:
            self._child.kill()
        self._reader.join(_LAST_SECONDS)
        if (code := self._wait()) != 0:
            why = f" (no answer in {_LAST_SECONDS} seconds)" if code == -signal.SIGALRM else ""
            push = shlex.join(["python", "-m", "runner.runs", "push", self._url, self._name])
            remedy = f"the next attempt sends them, or\n  {push}\nwith the settings of the writer, as KEY=VALUE"
            log.warning("metrics.writers.%s: not all points are sent yet%s: %s", self._name, why, printable(remedy))

    def _ask(self, request: str) -> str:
        """The answer of the child to the request to make the writer."""
        with suppress(BrokenPipeError):  # the child has died, and its error is on the screen
            self._input.write(request.encode() + b"\n")
            self._input.flush()
        ready, _, _ = select.select([self._output], [], [], _START_SECONDS)
        return self._output.readline().decode().strip() if ready else f"no answer in {_START_SECONDS:.0f} seconds"

    def _tell(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError, ValueError):  # the child has died, or is so far behind that a later message will do
            os.write(self._input.fileno(), json.dumps(message).encode() + b"\n")

    def _show(self) -> None:
        """The thread: logs what the child prints."""
        for line in self._output:
            log.warning("metrics.writers.%s: %s", self._name, printable(redacted(line.decode().strip())))

    def _wait(self) -> int:
        status = self._child.wait()
        self._input.close()
        self._output.close()
        return status


def main() -> None:
    """The child: makes the writer that the first line of its input describes, and sends until its parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print
    say = partial(print, file=answers)
    request = json.loads(sys.stdin.readline())
    context = WriterContext(open_location(request["url"], request["options"]), **request["context"])
    try:
        writer = make(request["target"], context, request["arguments"])
    except ConfigError as error:
        say(printable(error))
        return
    say("ready")
    status = 1
    with suppress(BrokenPipeError):
        status = _follow(request["parent"], request["name"], writer, say)
    os._exit(status)  # without waiting for threads of the library


def _follow(parent: int, name: str, writer: ServiceWriter, say: Callable[[str], None]) -> int:
    """Send whenever the process ``parent`` says that more is committed, until the attempt ends or the parent dies;
    returns the exit status.
    """
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=[messages], daemon=True).start()
    sender = Sender(name, writer)
    state: dict[str, Any] = {}  # ``end``: the mark up to which lines are committed; ``status`` once the attempt ended
    last_end: dict[str, Any] | None = None  # the mark up to which lines are sent
    pause = retry = 0.0  # seconds after an error, and when to try again (time.monotonic)
    while True:
        orphaned = os.getppid() != parent  # asked before the last messages are read, so that none is missed
        with suppress(queue.Empty):
            state |= messages.get(timeout=_POLL_SECONDS)
            while True:
                state |= messages.get_nowait()
        if orphaned or "status" in state:
            break
        if state.get("end") == last_end or time.monotonic() < retry:
            continue
        try:
            sender.push(state["end"])
            last_end = state["end"]
        except Exception as error:
            if not pause:
                say(f"{type(error).__name__}: {error}. Training continues; the points are sent later")
            pause = min(2 * pause or 1.0, _MAX_PAUSE)
            retry = time.monotonic() + pause
        else:
            if pause:
                say("the service has all points now")
            pause = 0.0
    signal.alarm(_LAST_SECONDS)  # ends this process, for the service may hang
    try:
        sender.push(state.get("end", {}))
        writer.close(state.get("status", "killed"))
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _listen(messages: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        messages.put(json.loads(line))

"""Real processes to kill, started in a fraction of a second.

Run as a program it is a server: it imports everything once, then forks one life of the runner for each request, in a
process group of its own, and kills it as asked. A life is ``python -m runner`` to the last system call; only its
imports and the caches of Hydra's parser are inherited.
"""

import contextlib
import gc
import importlib.util
import itertools
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from counts import count

USER = Path(__file__).parent / "user"
LAST = ("runner.experiment.finish", 1)  # a ``call`` when all but the result is written
DETERMINED = {"checkpoint.background": "false", "checkpoint.every": "null", "runtime.num_workers": "0"}


@dataclass(frozen=True)
class Ended:
    """How a life ended: its exit status, or None when SIGKILL ended it; what it printed; how long it took."""

    status: int | None
    output: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Mines:
    """What ends or troubles a life.

    ``send`` is the signal that ends it: ``after`` so many seconds, or ``when`` a file matches a pattern; after an
    optimizer ``step``; at the n-th ``commit`` of a database. SIGKILL comes once it ``restored``; at the n-th ``call``
    of a function by its name; in the n-th remote ``put``; at the n-th storage ``operation``, which fails with the errno
    ``fail`` if that is set. The n-th local put does ``hang`` for ``hang_seconds``, by default forever. ``without``
    drops a part from the state. ``machine`` has it live on a machine of that name, whose locks no other sees.
    """

    after: float | None = None
    when: str | None = None
    send: int = signal.SIGKILL
    step: int | None = None
    restored: bool = False
    operation: int | None = None
    fail: int | None = None
    put: int | None = None
    commit: int | None = None
    call: tuple[str, int] | None = None
    hang: int | None = None
    hang_seconds: float | None = None
    without: str | None = None
    machine: str | None = None


class Life:
    """A process of the runner that goes on. As a context it is killed at the end."""

    def __init__(self, server: "Lives", number: int, pid: int, log: Path) -> None:
        self._server, self._number, self._log = server, number, log
        self.pid = pid
        self._ended: Ended | None = None

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def send(self, number: int) -> None:
        """Send a signal to its process group; does nothing if it has ended."""
        self._server.request({"to": self._number, "send": number})

    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def wait(self) -> Ended:
        """Wait until it has ended."""
        if self._ended is None:
            answer = self._server.answer(self._number)
            self._ended = Ended(output=self.output, **answer)
        return self._ended

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: object) -> None:
        if self._ended is None:
            self.send(signal.SIGKILL)
            self.wait()


class Lives:
    """The client's side. Lives may go on side by side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._answers: dict[int, list[dict[str, Any]]] = {}
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, *arguments: str, **options: Any) -> Ended:
        """One life from its start to its end; the same as ``start``."""
        return self.start(*arguments, **options).wait()

    def start(
        self, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None, **mines: Any
    ) -> Life:
        """Begin a life without waiting for its end, which ``mines`` may bring: the fields of ``Mines``.

        Unless the arguments say otherwise, checkpoints are waited for, so that it is certain what is committed after a
        step, and the training process reads, so that no test depends on how long that takes.
        """
        keys = {argument.partition("=")[0] for argument in arguments}
        determined = [f"{key}={value}" for key, value in DETERMINED.items() if key not in keys]
        place = next((n for n, argument in enumerate(arguments) if argument.startswith("experiment=")), None)
        if place is not None:
            arguments = (*arguments[:place], *determined, *arguments[place:])
        number = next(self._numbers)
        log = self._folder / f"life{number}.log"
        log.touch()
        request = {"number": number, "argv": ["runner", *arguments], "cwd": str(cwd or self._folder), "log": str(log)}
        self.request(request | {"environment": dict(environment or {}), "mines": asdict(Mines(**mines))})
        return Life(self, number, self.answer(number)["pid"], log)

    def request(self, request: dict[str, Any]) -> None:
        """Send a request to the server."""
        assert self._server.stdin
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()

    def answer(self, number: int) -> dict[str, Any]:
        """The next answer about one life. Answers about others are kept."""
        assert self._server.stdout
        while not self._answers.get(number):
            about, answer = json.loads(self._server.stdout.readline())
            self._answers.setdefault(about, []).append(answer)
        return self._answers[number].pop(0)

    def close(self) -> None:
        """End the server, and with it what still lives."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()


def preload() -> None:
    """Import all that a life will import, and have Hydra compose a configuration: it keeps what its parser learns."""
    optional = [name for name in ("optuna", "torchmetrics") if importlib.util.find_spec(name)]
    modules = ("sklearn.datasets", "sklearn.datasets.data", "sklearn.datasets.descr", "torch._dynamo", "tabulate")
    modules += ("tensorboard.plugins.hparams.api_pb2", "multiprocessing.popen_fork")
    modules += ("runner.app", "runner.experiment", "runner.schedules", "runner.sweep.jobs", "runner.sweep.launcher")
    modules += ("runner.datasets.digits", "runner.datasets.text", "runner.models.mlp", "runner.models.convnet")
    modules += ("runner.models.gan", "runner.models.gpt", "runner.tasks.classification", "runner.tasks.adversarial")
    modules += ("runner.tasks.language", "runner.metrics.tensorboard", "runner.rl")
    modules += ("runner.distributed.processes", "runner.distributed.parallel")
    for module in (*modules, *optional):
        importlib.import_module(module)

    from runner.app import warm_up
    from runner.run import code
    from runner.sweep import optuna

    sys.path.insert(0, str(USER))  # Hydra looks for plugins once
    optuna.register()
    warm_up()
    sys.path.remove(str(USER))
    code.running([])  # keeps which folders are those of installed packages
    gc.freeze()  # else the first collection in each life copies every page


class _Child:
    """The server's side of one life."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.number, self._mines = request["number"], request["mines"]
        self._began, self._sent = time.monotonic(), False
        self.pid = os.fork()
        if self.pid == 0:
            become(request)
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it does the same, and may be first
            os.setpgid(self.pid, self.pid)
        _answer(self.number, {"pid": self.pid})

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def has_ended(self) -> bool:
        """Whether it has ended, which is answered then; sends the signal if that is due."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done:
            if not self._sent and self._due():
                self._sent = True
                self.send(self._mines["send"])
            return False
        self.send(signal.SIGKILL)  # data workers that outlived it
        code = os.waitstatus_to_exitcode(status)
        ended = None if code == -signal.SIGKILL else code
        if ended is None:
            count("kills")
            if self._mines["operation"] is not None:
                count("kill points")
        if self._mines["fail"] is not None:
            count("faults")
        _answer(self.number, {"status": ended, "seconds": time.monotonic() - self._began})
        return True

    def _due(self) -> bool:
        after, when = self._mines["after"], self._mines["when"]
        if when is not None and any(Path("/").glob(when.lstrip("/"))):
            return True
        return after is not None and time.monotonic() - self._began >= after


def _answer(number: int, answer: dict[str, Any]) -> None:
    print(json.dumps([number, answer]), flush=True)


def serve() -> None:
    """Answer requests until the client goes away; then end all lives."""
    preload()
    children: dict[int, _Child] = {}
    buffer = b""
    while True:
        if select.select([0], [], [], 0.002 if children else None)[0]:
            if not (received := os.read(0, 1 << 16)):
                break
            *lines, buffer = (buffer + received).split(b"\n")
            for request in map(json.loads, lines):
                if "argv" in request:
                    children[request["number"]] = _Child(request)
                elif request["to"] in children:
                    children[request["to"]].send(request["send"])
        children = {number: child for number, child in children.items() if not child.has_ended()}
    for child in children.values():
        child.send(signal.SIGKILL)


def become(request: dict[str, Any]) -> None:
    """Become a process of the runner, and never return."""
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.path.insert(0, request["cwd"])
    sys.argv = request["argv"]
    _arm(Mines(**request["mines"]))

    from runner.__main__ import main

    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _arm(mines: Mines) -> None:
    """Lay the mines that a request asks for."""
    from runner.callbacks.base import observers
    from runner.state import TrainState
    from runner.storage import local

    if mines.operation is not None:
        local.os = _MortalOs(mines.operation, mines.fail)  # type: ignore[attr-defined]
    if mines.put is not None:
        _die_at_put(mines.put)
    if mines.commit is not None:
        _die_at_commit(mines.commit, mines.send)
    if mines.call is not None:
        _die_at_call(*mines.call)
    if mines.hang is not None:
        _hang_at_put(mines.hang, mines.hang_seconds)
    if mines.step is not None or mines.restored:
        observers.append(_mortal(mines))
    if mines.machine is not None:
        _move_to(mines.machine)
    if mines.without is not None:
        parts = TrainState.parts

        def fewer(self: TrainState) -> Any:
            return {name: part for name, part in parts(self).items() if name != mines.without}

        TrainState.parts = fewer  # type: ignore[method-assign]


def _move_to(machine: str) -> None:
    """Another machine: no lock holds between the two."""
    from runner.run import attempts
    from runner.storage.local import LocalLocation
    from runner.storage.location import Lock

    attempts.machine = lambda location: machine
    LocalLocation.lock = lambda self, name: Lock(os.open(os.devnull, os.O_RDONLY))  # type: ignore[method-assign]
    LocalLocation.is_locked = lambda self, name: False  # type: ignore[method-assign]


def _die_at_put(last: int) -> None:
    """The n-th object is the last that this life writes to a remote store: killed while it is on its way."""
    from runner.storage.remote import RemoteLocation

    put, left = RemoteLocation.put, [last]

    def mortal_put(self: RemoteLocation, name: str, chunks: Any) -> int:
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(0.005, _die).start()
        return put(self, name, chunks)

    RemoteLocation.put = mortal_put  # type: ignore[method-assign]


def _die_at_call(path: str, last: int) -> None:
    """The n-th call of a function or method is the last that this life begins."""
    place, _, name = path.rpartition(".")
    owner, calls = pkgutil.resolve_name(place), itertools.count(1)
    function = getattr(owner, name)

    def mortal(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == last:
            _die()
        return function(*arguments, **keywords)

    setattr(owner, name, mortal)


def _hang_at_put(last: int, seconds: float | None) -> None:
    """The n-th object gets onto the disk after so many seconds; by default never, and its thread never goes on."""
    from runner.storage.local import LocalLocation

    put, left = LocalLocation.put, [last]

    def stuck_put(self: LocalLocation, name: str, chunks: Any) -> int:
        left[0] -= 1
        if left[0] == 0:
            threading.Event().wait(seconds)
        return put(self, name, chunks)

    LocalLocation.put = stuck_put  # type: ignore[method-assign]


def _mortal(mines: Mines) -> Any:
    """An observer that sends the signal after an optimizer step, or kills once the state is restored."""
    from runner.callbacks.base import Observer

    class Mortal(Observer):
        def on_resume(self, state: Any) -> None:
            if mines.restored:
                _die()

        def on_update(self, loop: Any) -> None:
            if loop.step == mines.step:
                _die() if mines.send == signal.SIGKILL else os.killpg(0, mines.send)

    return Mortal()


def _die_at_commit(last: int, send: int) -> None:
    """The n-th transaction of a database is not committed; by another signal than SIGKILL it is."""
    from sqlalchemy.orm import Session

    commit, left = Session.commit, [last]

    def mortal_commit(self: Session) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.killpg(0, send)
        commit(self)

    Session.commit = mortal_commit  # type: ignore[method-assign]


class _MortalOs:
    """``os``, in which the n-th operation that changes the disk is the last: half a write, or the moment before any
    other call. With ``fail``, writes from then on fail with this errno instead.
    """

    def __init__(self, last: int, fail: int | None) -> None:
        self._last = last
        self._fail = fail
        self._count = itertools.count(1)  # several threads take from it

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in ("open", "write", "fsync", "replace", "unlink"):
            return call

        def mortal(*arguments: Any, **keywords: Any) -> Any:
            number = next(self._count)
            if number == self._last and self._fail is None:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                _die()
            if number >= self._last and self._fail is not None and name in ("write", "fsync"):
                raise OSError(self._fail, os.strerror(self._fail))
            return call(*arguments, **keywords)

        return mortal


def _die() -> None:
    os.killpg(0, signal.SIGKILL)
    time.sleep(60)


@contextlib.contextmanager
def lives(folder: Path) -> Iterator[Lives]:
    """A server for the length of a block."""
    server = Lives(folder)
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    serve()

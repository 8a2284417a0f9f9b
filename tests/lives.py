"""Real processes to kill, started in a fraction of a second.

Run as a program it is a server: it imports everything once, then forks one life of the runner for each request, in a
process group of its own, and kills it as asked. A life is ``python -m runner`` to the last system call; only its
imports are inherited.
"""

import contextlib
import gc
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counts import count

WAITED = {"checkpoint.background": "false", "checkpoint.every": "null"}


@dataclass(frozen=True)
class Ended:
    """How a life ended: its exit status, or None when SIGKILL ended it; what it printed; how long it took."""

    status: int | None
    output: str
    seconds: float


class Lives:
    """The client's side: one life after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "life.log"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )

    def __call__(self, *arguments: str, cwd: Path | None = None, **how: Any) -> Ended:
        """One life. How it ends: ``after`` seconds by a signal (``send``, default SIGKILL); at the n-th storage
        ``operation``, which fails with the errno ``fail`` if one is given; in the n-th remote ``put``; at
        the n-th ``commit`` of a database; after a ``step``; once it ``restored``; when all but the result is
        ``written``. ``without`` drops a part from the state, ``environment`` adds to the environment. Checkpoints are
        waited for unless the arguments say otherwise, so that it is known what is committed after a step.
        """
        given = {argument.partition("=")[0] for argument in arguments}
        waited = [f"{key}={value}" for key, value in WAITED.items() if key not in given]
        place = next((n for n, argument in enumerate(arguments) if argument.startswith("experiment=")), None)
        if place is not None:
            arguments = (*arguments[:place], *waited, *arguments[place:])
        assert self._server.stdin
        assert self._server.stdout
        request = {"argv": ["runner", *arguments], "cwd": str(cwd or self._folder), "log": str(self._log), **how}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Ended(output=self._log.read_text(errors="replace"), **answer)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()


def preload() -> None:
    """Import all that a life will import."""
    optional = [name for name in ("optuna",) if importlib.util.find_spec(name)]
    for module in ("sklearn.datasets", "torch._dynamo", "runner.app", "runner.experiment", *optional):
        importlib.import_module(module)
    gc.freeze()  # else the first collection in each life copies every page


def serve() -> None:
    """Answer requests until the client goes away."""
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            become(request)
        status = _wait(pid, request)
        if status is None:
            count("kills")
            if "operation" in request:
                count("kill points")
        if "fail" in request:
            count("faults")
        print(json.dumps({"status": status, "seconds": time.monotonic() - began}), flush=True)


def _wait(pid: int, request: dict[str, Any]) -> int | None:
    """The exit status of a life, None after SIGKILL; kills or signals it when its time has come."""
    due = time.monotonic() + request["after"] if "after" in request else None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if due is not None and time.monotonic() >= due:
            due = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, request.get("send", signal.SIGKILL))
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # data workers that outlived it
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def become(request: dict[str, Any]) -> None:
    """Become a process of the runner, and never return."""
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request.get("environment", {}))
    sys.path.insert(0, request["cwd"])
    sys.argv = request["argv"]
    _arm(request)

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


def _arm(request: dict[str, Any]) -> None:
    """Lay the mines that a request asks for."""
    from runner import experiment
    from runner.callbacks.base import observers
    from runner.state import TrainState
    from runner.storage import local

    if "operation" in request:
        local.os = _MortalOs(request["operation"], request.get("fail"))  # type: ignore[attr-defined]
    if "put" in request:
        _die_at_put(request["put"])
    if "commit" in request:
        _die_at_commit(request["commit"], request.get("send", signal.SIGKILL))
    if "hang" in request:
        _hang_at_put(request["hang"], request.get("seconds"))
    if request.get("written"):
        experiment.finish = lambda *_: _die()  # type: ignore[assignment]
    if "step" in request or request.get("restored"):
        observers.append(_mortal(request))
    if "without" in request:
        parts = TrainState.parts

        def fewer(self: TrainState) -> Any:
            return {name: part for name, part in parts(self).items() if name != request["without"]}

        TrainState.parts = fewer  # type: ignore[method-assign]


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


def _mortal(request: dict[str, Any]) -> Any:
    """An observer that kills after an optimizer step, or once the state is restored."""
    from runner.callbacks.base import Observer

    class Mortal(Observer):
        def on_resume(self, state: Any) -> None:
            if request.get("restored"):
                _die()

        def on_update(self, loop: Any) -> None:
            if loop.step == request.get("step"):
                _die()

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

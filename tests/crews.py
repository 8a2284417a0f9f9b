"""Runs of several real processes to kill, started in a fraction of a second: what ``lives`` is for one process.

Run as a program it is a server: for each request it forks as many ranks as were asked for, each in a process group of
its own, as a launcher would start them, and kills or stops those it is told to.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counts import count
from lives import WAITED, become, preload


@dataclass(frozen=True)
class Ended:
    """How each rank ended (its exit status, None by SIGKILL), what each printed, and how long the last one took."""

    statuses: list[int | None]
    outputs: list[str]
    seconds: float

    @property
    def output(self) -> str:
        """All that was printed."""
        return "\n".join(self.outputs)


class Crews:
    """The client's side: one crew after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, size: int, *arguments: str, cwd: Path | None = None, **how: Any) -> Ended:
        """One life of ``size`` ranks. ``send`` (SIGKILL) goes to the ranks ``to`` (all of them): ``after`` so many
        seconds, or once the file ``when`` is there. ``step`` kills rank ``to[0]`` by itself after that step,
        ``hang`` has its n-th put never return. A rank that was stopped is killed when the others have ended.
        """
        return self.side_by_side((size, *arguments), cwd=cwd, **how)[0]

    def side_by_side(self, *crews: Sequence[Any], cwd: Path | None = None, **how: Any) -> list[Ended]:
        """Several at the same time, each with a place of its own to meet."""
        assert self._server.stdin
        assert self._server.stdout
        requests = []
        for number, (size, *arguments) in enumerate(crews):
            given = {argument.partition("=")[0] for argument in arguments}
            waited = [f"{key}={value}" for key, value in WAITED.items() if key not in given]
            place = next(n for n, argument in enumerate(arguments) if argument.startswith("experiment="))
            argv = ["runner", *arguments[:place], *waited, *arguments[place:]]
            logs = [str(self._folder / f"crew{number}.rank{rank}.log") for rank in range(size)]
            requests.append({"argv": argv, "cwd": str(cwd or self._folder), "logs": logs, **how})
        self._server.stdin.write(json.dumps(requests) + "\n")
        self._server.stdin.flush()
        answers = json.loads(self._server.stdout.readline())
        return [
            Ended(outputs=[Path(log).read_text(errors="replace") for log in request["logs"]], **answer)
            for request, answer in zip(requests, answers, strict=True)
        ]

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()


def serve() -> None:
    """Answer requests until the client goes away."""
    preload()
    for module in ("processes", "parallel"):
        importlib.import_module(f"runner.distributed.{module}")
    for line in sys.stdin:
        requests = json.loads(line)
        began = time.monotonic()
        crews = [_Crew(request) for request in requests]
        while sum(crew.look(time.monotonic() - began) for crew in crews) < len(crews):
            time.sleep(0.002)
        print(
            json.dumps([{"statuses": crew.statuses, "seconds": time.monotonic() - began} for crew in crews]), flush=True
        )


class _Crew:
    """The ranks of one request."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.size = len(request["logs"])
        self.statuses: list[int | None] = [0] * self.size
        port = _free_port()
        self.alive = {_started(request, rank, self.size, port): rank for rank in range(self.size)}
        self.sent = False
        self.to = request.get("to", [*range(self.size)])

    def look(self, seconds: float) -> bool:
        """Do what is due; whether all have ended."""
        if not self.sent and self._due(seconds):
            self.sent = True
            self._send(self.to)
        for pid in [*self.alive]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._ended(self.alive.pop(pid), pid, os.waitstatus_to_exitcode(status))
        stopped = self.request.get("send") == signal.SIGSTOP and self.sent
        if stopped and self.alive and {*self.alive.values()} <= {*self.to}:
            for pid in self.alive:
                os.killpg(pid, signal.SIGKILL)
        return not self.alive

    def _due(self, seconds: float) -> bool:
        if "when" in self.request:
            return any(Path("/").glob(self.request["when"].lstrip("/")))
        return "after" in self.request and seconds >= self.request["after"]

    def _send(self, ranks: Sequence[int]) -> None:
        number = self.request.get("send", signal.SIGKILL)
        for pid, rank in self.alive.items():
            if rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)

    def _ended(self, rank: int, pid: int, code: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # data workers that outlived it
        self.statuses[rank] = None if code == -signal.SIGKILL else code
        if code == -signal.SIGKILL:
            count("kills")


def _started(request: dict[str, Any], rank: int, size: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = {"argv": request["argv"], "cwd": request["cwd"], "log": request["logs"][rank]}
        if rank == request.get("to", [0])[0]:
            own |= {how: request[how] for how in ("step", "hang") if how in request}
        become(own)
    return pid


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def crews(folder: Path) -> Iterator[Crews]:
    """A server for the length of a block."""
    server = Crews(folder)
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    serve()

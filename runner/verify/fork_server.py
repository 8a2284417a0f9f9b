"""A process that imports everything once and then forks one life of the runner for each request.

A life is ``python -m runner`` to the last system call, in a process group of its own; only its imports are inherited.
One of several processes is started as a launcher would start it: all are in one group, and know where to meet.
Requests come as lines of JSON on standard input; when that ends, so do the life in hand and this process: whoever asked
may have been killed.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TICK_SECONDS = 0.005
_PATIENCE_SECONDS = 60.0  # in which all processes end once one of them has failed or was killed
_MANY = ("runner.distributed.processes", "runner.distributed.parallel")


def serve() -> None:
    """Answer requests until the client goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the client
    for module in ("torch._dynamo", "runner.app", "runner.experiment", "runner.runs.audit", "runner.verify.recorder"):
        importlib.import_module(module)
    gc.freeze()  # else the first collection in each life copies every page
    print(json.dumps({"ready": True}), flush=True)
    for line in iter(_line, b""):
        request = json.loads(line)
        if "modules" in request:
            _import(request["modules"])
            continue
        if len(request["records"]) > 1:
            _import(_MANY)
        began = time.monotonic()
        pids = _forked(request)
        status = _wait(pids, Path(request["log"]))
        print(json.dumps({"status": status, "seconds": time.monotonic() - began}), flush=True)


def _import(modules: Sequence[str]) -> None:
    """Have libraries that lives were seen to import, so that the next ones need not."""
    for name in modules:
        with contextlib.suppress(Exception):  # a life that needs it will say what is wrong with it
            importlib.import_module(name)
    gc.freeze()


def _line() -> bytes:
    """The next request, past all buffers: ``select`` must see whether there is more."""
    found = bytearray()
    while not found.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        found += byte
    return bytes(found)


def _forked(request: Mapping[str, Any]) -> list[int]:
    """The processes of a life, in the order of their ranks; the first one's number is that of their group."""
    pids: list[int] = []
    for rank, environment in enumerate(_environments(len(request["records"]))):
        pid = os.fork()
        group = pids[0] if pids else pid  # in the first process itself 0, which means its own
        if pid == 0:
            os.environ |= environment
            _live({**request, "rank": rank, "record": request["records"][rank]}, group)
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(pid, group)  # so does the process; whoever is first
        pids.append(pid)
    return pids


def _environments(size: int) -> Iterator[dict[str, str]]:
    """What a launcher tells each of so many processes; nothing to one that is alone."""
    if size == 1:
        yield {}
        return
    with socket.socket() as recorder:
        recorder.bind(("127.0.0.1", 0))
        port = recorder.getsockname()[1]
    for rank in range(size):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        yield {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **place}


def _wait(pids: Sequence[int], log: Path) -> int | None:
    """The exit status of a life, which is over when all its processes are; None after SIGKILL of one or all."""
    codes: dict[int, int] = {}
    failed = 0.0  # when the first did
    while len(codes) < len(pids):
        for pid in pids:
            done, status = (0, 0) if pid in codes else os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                failed = failed or (time.monotonic() if codes[pid] else 0.0)
        if select.select([0], [], [], _TICK_SECONDS)[0]:  # nothing is asked while a life lives: the client is gone
            _kill(pids[0])
            sys.exit(0)
        if failed and len(codes) < len(pids) and time.monotonic() - failed > _PATIENCE_SECONDS:
            return _hung(pids, codes, log)
    _kill(pids[0])  # data workers that outlived it
    if -signal.SIGKILL in codes.values():
        return None
    return next((code for code in codes.values() if code), 0)


def _hung(pids: Sequence[int], codes: Mapping[int, int], log: Path) -> int:
    """End those that go on without the others, and say so where they would have."""
    _kill(pids[0])
    left = [pid for pid in pids if pid not in codes]
    for pid in left:
        os.waitpid(pid, 0)
    with log.open("a") as file:
        ranks = ", ".join(str(pids.index(pid)) for pid in left)
        file.write(f"\nrank {ranks} did not end within {_PATIENCE_SECONDS:.0f} s of the end of another process\n")
    return 1


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _live(request: Mapping[str, Any], group: int) -> None:
    """Become a process of the runner, and never return."""
    os.setpgid(0, group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["runner", *request["arguments"]]

    from runner.__main__ import main
    from runner.verify import recorder

    try:
        recorder.install(request)
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()

"""A process that imports everything once and then forks one life of the runner for each request.

A life is ``python -m runner`` to the last system call, in a process group of its own; only its imports are inherited.
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
import sys
import time
from collections.abc import Sequence
from typing import Any

_TICK_SECONDS = 0.005


def serve() -> None:
    """Answer requests until the client goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the client
    for module in ("torch._dynamo", "runner.app", "runner.experiment", "runner.runs.audit", "runner.verify.probe"):
        importlib.import_module(module)
    gc.freeze()  # else the first collection in each life copies every page
    print(json.dumps({"ready": True}), flush=True)
    for line in iter(_line, b""):
        request = json.loads(line)
        if "modules" in request:
            _import(request["modules"])
            continue
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _live(request)
        status = _wait(pid)
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


def _wait(pid: int) -> int | None:
    """The exit status of a life; None after SIGKILL."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if select.select([0], [], [], _TICK_SECONDS)[0]:  # nothing is asked while a life lives: the client is gone
            _kill(pid)
            sys.exit(0)
    _kill(pid)  # data workers that outlived it
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _live(request: dict[str, Any]) -> None:
    """Become a process of the runner, and never return."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["runner", *request["arguments"]]

    from runner.__main__ import main
    from runner.verify import probe

    try:
        probe.install(request)
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

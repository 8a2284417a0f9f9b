"""A process that imports everything once and then forks one attempt of the runner for each request.

An attempt is ``python -m runner`` to the last system call, in a process group of its own; only imports are inherited.
An attempt of several processes is started as by a launcher: all are in one group, and know the address of rank 0.
Requests are lines of JSON on standard input. When it ends, the client may have been killed, and the running attempt and
this process end, too. An attempt leaves no process behind, not even in a session of its own.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TICK_SECONDS = 0.005
_PATIENCE_SECONDS = 60.0  # in which all processes end once one of them has failed or was killed
_STACKS_SECONDS = 3.0  # for the processes of an attempt to write where their threads are
_PLACES = 10  # of threads, for the verdict
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <sys/prctl.h>: processes without a parent become children of this one
_OF_SEVERAL = ("runner.distributed.processes", "runner.distributed.parallel")


def serve() -> None:
    """Answer requests until the client goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the client
    with contextlib.suppress(Exception):  # Linux alone has it
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    for module in ("torch._dynamo", "runner.app", "runner.experiment", "runner.runs.audit", "runner.verify.recorder"):
        importlib.import_module(module)
    from runner.app import warm_up

    warm_up()
    gc.freeze()  # else the first collection in each attempt copies every page
    print(json.dumps({"ready": True}), flush=True)
    for line in iter(_line, b""):
        request = json.loads(line)
        if "modules" in request:
            _import(request["modules"])
            continue
        if len(request["records"]) > 1:
            _import(_OF_SEVERAL)
        try:
            status = _wait(_fork(request), request)
        finally:
            _end_all()
        print(json.dumps({"status": status}), flush=True)


def _import(modules: Sequence[str]) -> None:
    """Import libraries that an attempt imported, for the next attempts to inherit."""
    for name in modules:
        with contextlib.suppress(Exception):  # an attempt that needs the module reports the error
            importlib.import_module(name)
    gc.freeze()


def _line() -> bytes:
    """The next request, past all buffers: ``select`` must see whether there is more."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def _fork(request: Mapping[str, Any]) -> list[int]:
    """Start the processes of an attempt; returns their pids by rank. The first pid is that of their group."""
    pids: list[int] = []
    for rank, environment in enumerate(_environments(len(request["records"]))):
        pid = os.fork()
        group = pids[0] if pids else pid  # in the first process itself 0, which means its own
        if pid == 0:
            os.environ |= environment
            _run({**request, "rank": rank, "record": request["records"][rank]}, group)
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(pid, group)  # as the process itself does: either may come first
        pids.append(pid)
    return pids


def _environments(size: int) -> Iterator[dict[str, str]]:
    """The variables that a launcher would set in each of ``size`` processes; none for a single one."""
    if size == 1:
        yield {}
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for rank in range(size):
        yield {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **address}


def _wait(pids: Sequence[int], request: Mapping[str, Any]) -> int | None:
    """Wait for all processes of an attempt; returns its exit status, None after SIGKILL of one or all."""
    codes: dict[int, int] = {}
    began = time.monotonic()
    failed = 0.0  # when the first process failed
    while len(codes) < len(pids):
        for pid in pids:
            done, status = (0, 0) if pid in codes else os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                failed = failed or (time.monotonic() if codes[pid] else 0.0)
        if select.select([0], [], [], _TICK_SECONDS)[0]:  # no request comes now: the client is gone
            _kill(pids[0])
            sys.exit(0)
        if request["limit"] and time.monotonic() - began > request["limit"]:
            return _end_overdue(pids, codes, request)
        if failed and len(codes) < len(pids) and time.monotonic() - failed > _PATIENCE_SECONDS:
            return _end_hanging(pids, codes, Path(request["log"]))
    _kill(pids[0])  # data workers may have survived
    if -signal.SIGKILL in codes.values():
        return None
    return next((code for code in codes.values() if code), 0)


def _end_hanging(pids: Sequence[int], codes: Mapping[int, int], log: Path) -> int:
    """End the processes that continue without the others, and note it in their log; returns the exit status."""
    _kill(pids[0])
    hanging = [pid for pid in pids if pid not in codes]
    for pid in hanging:
        os.waitpid(pid, 0)
    with log.open("a") as file:
        ranks = ", ".join(str(pids.index(pid)) for pid in hanging)
        file.write(f"\nrank {ranks} did not end within {_PATIENCE_SECONDS:.0f} s of the end of another process\n")
    return 1


def _end_overdue(pids: Sequence[int], codes: Mapping[int, int], request: Mapping[str, Any]) -> int:
    """End an attempt that takes too long, and record where each of its threads was; returns the exit status."""
    from runner.distributed.watchdog import worker_stacks
    from runner.errors import RunnerError

    places = []
    for rank, pid in enumerate(pids):
        who = f"rank {rank}, " if len(pids) > 1 else ""
        places += [] if pid in codes else [f"  {who}{place}" for place in _threads(pid, request["records"][rank])]
    workers = [child for pid in pids for child in _children(pid)]
    for pid, text in worker_stacks(workers).items():
        places += [f"  process {pid}, {place}" for place in _places(text)]
    _kill(pids[0])
    for pid in pids:
        if pid not in codes:
            os.waitpid(pid, 0)
    message = f"{request['title']} did not end within {request['limit']:.0f} s. Where its threads were:"
    _record_failure(request["records"][0], RunnerError("\n".join([message, *places[:_PLACES]]), kind="time-limit"))
    return 1


def _threads(pid: int, record: str) -> list[str]:
    """Where the threads of a process are, which writes their stacks into a file on SIGQUIT."""
    file = Path(f"{record}.stacks")
    os.kill(pid, signal.SIGQUIT)
    sizes = [-1, 0]
    until = time.monotonic() + _STACKS_SECONDS
    while (not sizes[-1] or sizes[-1] != sizes[-2]) and time.monotonic() < until:
        time.sleep(0.1)
        sizes.append(file.stat().st_size)
    return [*_places(file.read_text(errors="replace"))]


def _places(stacks: str) -> Iterator[str]:
    """A line for each thread in the output of ``faulthandler``, which has the main thread last."""
    from runner.distributed.watchdog import dumped_line

    for number, thread in enumerate(reversed(stacks.split("hread 0x")[1:])):
        yield f"{'another' if number else 'the main'} thread is at {dumped_line(thread)}"


def _children(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have started."""
    lists = []
    with contextlib.suppress(OSError):
        lists = [tasks.read_text().split() for tasks in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [*map(int, itertools.chain.from_iterable(lists))]
    return [*children, *(each for child in children for each in _children(child))]


def _end_all() -> None:
    """End what an attempt has left behind: data workers, and processes in sessions of their own."""
    while left := _children(os.getpid()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _run(request: Mapping[str, Any], group: int) -> None:
    """Become a process of the runner. Never returns."""
    os.setpgid(0, group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.register(signal.SIGQUIT, open(f"{request['record']}.stacks", "w"))
    os.makedirs(request["temporary"], exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torch")  # shared by all attempts
    os.environ |= {"TMPDIR": request["temporary"]}
    tempfile.tempdir = None
    sys.argv = ["runner", *request["arguments"]]

    from runner.__main__ import main
    from runner.verify import recorder

    try:
        recorder.install(request)
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if error.__context__ is not None:  # the runner prints an error and then leaves with its status
            _record_failure(request["record"], error.__context__)
    except BaseException as error:
        traceback.print_exc()
        _record_failure(request["record"], error)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _record_failure(record: str, error: BaseException) -> None:
    """Append the kind and the message of the error that ended this process."""
    from runner.errors import RunnerError, kind_of, printable
    from runner.verify.source import of_error

    message = str(error) if isinstance(error, RunnerError) else printable(f"{type(error).__name__}: {error}")
    line = {"event": "failed", "kind": kind_of(error), "message": message, "where": of_error(error)}
    with open(record, "a") as file:
        file.write(f"{json.dumps(line)}\n")

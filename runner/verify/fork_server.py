"""A process that imports everything once and then forks one attempt of the runner for each request.

An attempt is ``python -m runner`` to the last system call, in a process group of its own; only imports are inherited.
An attempt of several processes is started as by a launcher: all are in one group, and know the address of rank 0.
Requests are lines of JSON on standard input. When the input ends, the client may have been killed: the running attempt
and this process end, too. An attempt leaves no process behind, not even in a session of its own.
"""

import contextlib
import ctypes
import gc
import importlib
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
from typing import NoReturn

from runner.errors import RunnerError, kind_of, printable
from runner.verify.execution import AttemptRequest

_TICK_SECONDS = 0.005
_MOST_LINES = 10  # lines of threads in a verdict
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <sys/prctl.h>: processes without a parent become children of this one
_IMPORTS = ("torch._dynamo", "runner.app", "runner.experiment", "runner.runs.audit", "runner.verify.recorder")
_IMPORTS_OF_SEVERAL = ("runner.distributed.processes", "runner.distributed.parallel")


def serve() -> None:
    """Answer requests until the client goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the client
    with contextlib.suppress(Exception):  # Linux alone has it
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    for module in _IMPORTS:
        importlib.import_module(module)
    from runner.app import warm_up

    warm_up()
    gc.freeze()  # otherwise the first collection in each attempt copies every page
    for line in open(0, "rb", buffering=0):  # ``select`` must see whether there is more
        request = AttemptRequest.parse(line)
        _import([*request.imports, *(_IMPORTS_OF_SEVERAL if request.processes > 1 else ())])
        try:
            status = _wait(_fork(request), request)
        finally:
            _end_all()
        print(json.dumps(status), flush=True)


def _import(modules: Sequence[str]) -> None:
    """Import libraries, for this and the next attempts to inherit."""
    for name in modules:
        with contextlib.suppress(Exception):  # an attempt that needs the module reports the error
            importlib.import_module(name)
    gc.freeze()


def _fork(request: AttemptRequest) -> list[int]:
    """Start the processes of an attempt; returns their pids by rank. The first pid is also the pid of their group."""
    pids: list[int] = []
    for rank, environment in enumerate(_environments(request.processes)):
        pid = os.fork()
        group = pids[0] if pids else pid  # in the first process itself this is 0, which stands for its own pid
        if pid == 0:
            os.environ |= environment
            _run(request, rank, group)
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(pid, group)  # the process itself does the same: either may come first
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


def _wait(pids: Sequence[int], request: AttemptRequest) -> int | None:
    """Wait for all processes of an attempt; returns its exit status, None after SIGKILL of one or all."""
    codes: dict[int, int] = {}
    began = time.monotonic()
    overdue = False
    while len(codes) < len(pids):
        for pid in pids:
            ended, status = (0, 0) if pid in codes else os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if select.select([0], [], [], _TICK_SECONDS)[0]:  # no request comes now: the client is gone
            _kill(pids[0])
            sys.exit(0)
        if request.limit and time.monotonic() - began > request.limit and not overdue:
            overdue = True
            _record_lines([pid for pid in pids if pid not in codes], request)
            _kill(pids[0])
    _kill(pids[0])  # data workers may have survived
    if overdue:
        return 1
    return None if -signal.SIGKILL in codes.values() else next((code for code in codes.values() if code), 0)


def _record_lines(pids: Sequence[int], request: AttemptRequest) -> None:
    """Record that an attempt takes too long, and the code lines of its threads and data workers."""
    from runner.distributed.watchdog import dumped_line, worker_stacks

    workers = [child for pid in pids for child in _children(pid)]
    lines = []
    for pid, stacks in worker_stacks([*pids, *workers]).items():
        who = f"process {pid}, " if pid in workers or len(pids) > 1 else ""
        for number, thread in enumerate(reversed(stacks.split("hread 0x")[1:])):  # the main thread comes last
            lines.append(f"  {who}{'another' if number else 'the main'} thread is at {dumped_line(thread)}")
    title = f"attempt {request.record().stem} did not end within {request.limit:.0f} s. Where its threads were:"
    _record_failure(request.record(), RunnerError("\n".join([title, *lines[:_MOST_LINES]]), kind="time-limit"))


def _children(pid: int) -> list[int]:
    """The processes that a process has started, and the processes that they have started, and so on."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, tasks.read_text().split())
    return [*children, *(each for child in children for each in _children(child))]


def _end_all() -> None:
    """End the processes that an attempt has left behind: data workers, and processes in sessions of their own."""
    while children := _children(os.getpid()):
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _run(request: AttemptRequest, rank: int, group: int) -> NoReturn:
    """Become a process of the runner."""
    os.setpgid(0, group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    request.temporary.mkdir(exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torch")  # shared by all attempts
    os.environ["TMPDIR"] = str(request.temporary)
    os.environ["SLURM_RESTART_COUNT"] = str(int(request.record().stem.rpartition("-")[2]) - 1)  # as a job queued again
    tempfile.tempdir = None
    sys.argv = ["runner", *request.arguments]

    from runner.__main__ import main
    from runner.distributed.watchdog import write_stacks_on_request
    from runner.verify import recorder

    write_stacks_on_request()
    try:
        recorder.install(request, rank)
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if error.__context__ is not None:  # the runner prints an error and then leaves with its status
            _record_failure(request.record(rank), error.__context__)
    except BaseException as error:
        traceback.print_exc()
        _record_failure(request.record(rank), error)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _record_failure(record: Path, error: BaseException) -> None:
    """Append the kind and the message of the error that ended a process."""
    from runner.verify.source import of_error

    message = str(error) if isinstance(error, RunnerError) else printable(f"{type(error).__name__}: {error}")
    line: Mapping[str, str] = {"event": "failed", "kind": kind_of(error), "message": message, "where": of_error(error)}
    with record.open("a") as file:
        file.write(f"{json.dumps(line)}\n")

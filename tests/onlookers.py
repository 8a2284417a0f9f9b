"""Runs every command of ``runner.runs`` over a root whose runs a stranger may have written, in one process with bounded
memory.

Run as a program, it reads the root, its runs and an ordinary run as JSON from stdin and writes how each command ended.
"""

import contextlib
import io
import json
import resource
import signal
import sys
import traceback
from typing import Any

from waiting import Clock

from runner.run import attempts
from runner.runs.__main__ import main

MEMORY = 1 << 30  # bytes that the commands may allocate
SECONDS = 60  # generous: the faults to be caught make a command wait forever


class Late(BaseException):
    """The command takes too long. Not an ``Exception``, so that no handler for errors swallows it."""


def late(number: int, frame: Any) -> None:
    raise Late("".join(traceback.format_stack(frame)[-3:]))


CLOCK = Clock(seconds=SECONDS, late=Late)


def ended(*words: str) -> dict[str, Any]:
    """How a command ended: its status and what it printed, or the error that nobody handled."""
    out = io.StringIO()
    CLOCK.paused = 0.0
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status: Any = main([*words])
    except BaseException as error:
        status = f"{error!r:.500}\n{''.join(traceback.format_exc().splitlines(keepends=True)[-12:])}"
    finally:
        signal.alarm(0)
    return {"command": words, "status": status, "out": out.getvalue()}


def looks(root: str, runs: list[str], good: str) -> list[dict[str, Any]]:
    """How every command ended, for the root and for each of its runs."""
    ends = [ended(command, root, *more) for command in ("list", "compare") for more in ([], ["--json"])]
    ends += [ended("list", root, "--sort", by) for by in ("objective", "age")]
    for run in runs:
        ends += [ended(command, run) for command in ("show", "audit")]
        ends += [ended("diff", run, good), ended("prune", run, "--yes"), ended("show", run, "--json")]
        ends.append(ended("export", run, f"{root}.safetensors", "--force"))
    return ends


def bound() -> None:
    """Bound the memory of this process."""
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    request = json.load(sys.stdin)
    attempts.time = CLOCK  # type: ignore[attr-defined]
    signal.signal(signal.SIGALRM, late)
    looks(request["ordinary"], [request["good"]], request["good"])  # before the limit on memory: imports everything
    bound()
    print(json.dumps(looks(request["root"], request["runs"], request["good"])))

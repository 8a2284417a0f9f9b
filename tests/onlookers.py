"""Looks at all runs of a root with every command, in one process with bounded memory; anyone may have written the runs.

Run as a program: the root, its runs and an ordinary one as JSON on stdin; on stdout, how each command ended.
"""

import contextlib
import io
import json
import resource
import signal
import sys
import time
import traceback
import types
from typing import Any

from runner.runs import watch
from runner.runs.__main__ import main

MEMORY = 1 << 30  # bytes that looking at runs may take
SECONDS = 60  # generous: where it matters, a command would wait for ever


class Late(BaseException):
    """The command still runs; no handler for errors may swallow this."""


def late(number: int, frame: Any) -> None:
    raise Late("".join(traceback.format_stack(frame)[-3:]))


def once(seconds: float) -> None:
    """In place of the pause between two updates of ``watch``."""
    raise KeyboardInterrupt


def ended(*words: str) -> dict[str, Any]:
    """How a command ended: its status and what it printed, or the error that nobody handled."""
    out, begun = io.StringIO(), time.monotonic()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status: Any = main([*words])
    except BaseException as error:
        status = f"{error!r:.500}\n{''.join(traceback.format_exc().splitlines(keepends=True)[-12:])}"
    finally:
        signal.alarm(0)
    return {"command": words, "status": status, "out": out.getvalue(), "seconds": time.monotonic() - begun}


def looks(root: str, runs: list[str], good: str) -> list[dict[str, Any]]:
    """Every command for the root, and for each run of it."""
    ends = [ended(command, root, *more) for command in ("list", "compare", "watch") for more in ([], ["--json"])]
    ends += [ended("list", root, "--sort", by) for by in ("objective", "age")]
    ends.append(ended("compare", root, "--html", f"{root}.html", "--match", "smoke/r00"))
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
    watch.time = types.SimpleNamespace(sleep=once, monotonic=time.monotonic, strftime=time.strftime)
    signal.signal(signal.SIGALRM, late)
    looks(request["ordinary"], [request["good"]], request["good"])  # imports all there is to import
    bound()
    print(json.dumps(looks(request["root"], request["runs"], request["good"])))

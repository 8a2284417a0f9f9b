"""``python -m benchmarks.resume_bugs``: what a bare loop, Lightning, the HF Trainer and ``runner.verify`` notice.

For each bug and each loop: an undisturbed run, a run that is killed after step 7 and started again, and a comparison of
the weights. For ``runner.verify``: one proof. Prints a table in Markdown.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.resume_bugs.bugs import BUGS
from runner.verify.execution import Servers, fork_servers
from runner.verify.options import Options
from runner.verify.proof import prove

LOOPS = {
    "bare loop": ("bare", "torch"),
    "Lightning": ("with_lightning", "lightning"),
    "HF Trainer": ("with_transformers", "transformers"),
}
VERIFY = "runner.verify"
OPTIONS = Options(steps=12, kills=2, workers=(0,))


def installed() -> dict[str, tuple[str, str]]:
    """The loops whose framework is installed: name -> module, package."""
    return {name: loop for name, loop in LOOPS.items() if _version(loop[1])}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bugs", nargs="*", default=[*BUGS], help="names, in small letters")
    parser.add_argument("--columns", nargs="*", default=[*installed(), VERIFY])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve:
        serve()
        return
    versions = [f"{package} {_version(package)}" for _, package in installed().values()]
    print(f"Python {sys.version.split()[0]}, {', '.join(versions)}\n")
    print(f"| mistake | {' | '.join(parsed.columns)} |\n|---|{'---|' * len(parsed.columns)}")
    loops = Server(), Server()
    with fork_servers() as servers:
        for name in parsed.bugs:
            cells = [
                proof(name, servers) if each == VERIFY else noticed(LOOPS[each][0], name, *loops)
                for each in parsed.columns
            ]
            print(f"| {_title(name)} | {' | '.join(cells)} |", flush=True)


def _title(name: str) -> str:
    return "none" if name == "bug" else (BUGS[name].__doc__ or "").strip().rstrip(".")


class Server:
    """A process with everything imported, from which loops are forked. A second one has another hash seed."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.resume_bugs", "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, module: str, bug: str, folder: str, *, kill: bool = False) -> int:
        """The exit status of a loop; negative after a signal."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([module, bug, folder, kill]), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def serve() -> None:
    """Fork a loop for each line of the standard input."""
    answers = os.fdopen(os.dup(1), "w")
    mains = {module: import_module(f"benchmarks.resume_bugs.{module}").main for module, _ in installed().values()}
    for module, bug, folder, kill in map(json.loads, sys.stdin):
        pid = os.fork()
        if pid == 0:
            output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                mains[module](bug, folder, kill)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def noticed(module: str, bug: str, first: Server, second: Server) -> str:
    """What a loop notices of a bug."""
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
        if first(module, bug, whole):
            return _error(whole, "error without a kill")
        first(module, bug, killed, kill=True)
        if second(module, bug, killed):
            return _error(killed, "error when resumed")
        pairs = zip(*(torch.load(Path(folder, "weights")) for folder in (whole, killed)), strict=True)
        return "equal" if all(torch.equal(a, b) for a, b in pairs) else "**nothing**, other weights"


def _error(folder: str, when: str) -> str:
    lines = [
        line for line in Path(folder, "output").read_text().splitlines() if re.match(r"[\w.]+(Error|Exception):", line)
    ]
    return f"{when}: {lines[-1].partition(':')[0] if lines else 'see its output'}"


def proof(bug: str, servers: Servers) -> str:
    """The cause that a proof gives."""
    with tempfile.TemporaryDirectory() as folder:
        conf = str(Path(__file__).parent / "conf")
        command = ["--config-dir", conf, "experiment=bug", f"params.bug={bug}", f"params.folder={folder}"]
        verdict = prove(command, OPTIONS, progress=lambda line: None, servers=servers)
        if verdict.cause is None:
            return "PASS"
        file, _, line = verdict.cause.where.partition(", ")[0].rpartition(":")
        what = verdict.cause.description.partition(". It shows")[0].replace("|", "\\|")
        return f"FAIL: {what}" + (f" (`{Path(file).name}:{line}`)" if file else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()

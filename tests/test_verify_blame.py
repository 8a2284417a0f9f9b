"""What ``runner.verify`` blames, and the accesses of the user's code to the outside that it sees."""

import json
import os
import subprocess
import sys
from typing import cast

import pytest

from runner.verify.campaign import KillPlan
from runner.verify.diagnosis import Investigation
from runner.verify.difference import FirstDifference
from runner.verify.execution import AttemptRequest, AttemptTrace, Executor, RunTrace


class Scripted(Investigation):
    """Undisturbed runs that are equal while the pid is held constant, and without only if they ``settle``."""

    def __init__(self, *, settles: bool) -> None:
        super().__init__(cast("Executor", None), cast("KillPlan", None), RunTrace("undisturbed", [ATTEMPT]), print)
        self.settles = settles

    def run(self, *overrides: str, **fields: object) -> RunTrace:
        return RunTrace("again", [ATTEMPT])

    def differs(self, trial: str, run: RunTrace, base: RunTrace | None = None) -> FirstDifference | None:
        equal = "pid held" in trial or "once more" in trial or (self.settles and "nothing held" in trial)
        return None if equal else DIFFERENCE


ATTEMPT = AttemptTrace(AttemptRequest("undisturbed", (), "record"), 0, 0, ())
DIFFERENCE = FirstDifference(1, 0, "loss", "loss", 1.0, 2.0)


@pytest.mark.parametrize(("settles", "kind"), [(False, "pid"), (True, "chance")])
def test_no_pin_is_blamed_without_a_control(settles: bool, kind: str) -> None:
    cause = Scripted(settles=settles).cause_by_pin(DIFFERENCE)
    assert (cause.kind, cause.sure) == (kind, not settles)


def test_a_refused_attempt_is_a_difference() -> None:
    events = ({"event": "failed", "kind": "ledger", "message": "\n".join(f"line {n}" for n in range(40))},)
    attempt = AttemptTrace(AttemptRequest("again", (), "record"), 1, 0, events)
    lives = Scripted(settles=True)
    difference = Investigation.differs(lives, "again", RunTrace("again", [attempt]))
    assert difference
    assert difference.path.splitlines()[0] == "line 0"


# A line of the user's -> what it reaches; of the second group, another start may read another value.
SURE = {
    'Path(folder, "out").write_text("x")': ["the file FOLDER/out"],
    "sorted(os.listdir(folder))": ["the order of the folder FOLDER"],
    "import imported": [],
    "library.ask()": [],
    "logging.getLogger().error(os.getenv('HOME'))": [],
    "os.stat(folder).st_size": [],
    "os.open(folder + '/table.h5', os.O_CREAT | os.O_WRONLY)": ["the file FOLDER/table.h5"],  # as libraries in C do
}
UNTRIED = {
    'Path(folder, "kept").write_text(Path(folder, "kept").read_text())': [
        "the state in the file FOLDER/kept",
        "the file FOLDER/kept",
    ],
    '[*Path(folder).glob("*.txt")]': ["the order of the folder FOLDER"],
    "platform.node()": ["the host name"],
    "os.uname().nodename": ["the host name"],
    "os.getpid()": ["the pid"],
    "os.getppid()": ["the pid"],
    "os.times().user": ["the time and memory of the process"],
    "os.statvfs(folder).f_bavail": ["the free space of a disk"],
    "os.listdir(folder)": ["the order of the folder FOLDER"],
    "os.environ['SLURM_JOB_ID']": ["the environment variable SLURM_JOB_ID"],
    "resource.getrusage(0)": ["the time and memory of the process"],
    "uuid.uuid1()": ["uuid1, the time and the address of the machine"],
    "gc.get_objects()": ["the garbage collector"],
    "os.path.getmtime(folder)": ["the times of a file"],
    'open("/proc/uptime").close()': ["the file /proc/uptime"],
    "threading.Timer(0, int).start()": ["a timer"],
    'subprocess.run(["true"])': ["the process true"],
    "os.fork() or os._exit(0)": ["a process"],
}
IMPORTS = "import gc, library, logging, os, platform, resource, subprocess, threading, uuid\nfrom pathlib import Path\n"
WATCH = """
import json, sys
from runner.verify import source
folder = sys.argv[1]
sys.path[:0] = [folder, f"{folder}/site-packages"]
import user
outside = source.OutsideAccess()
for ask in user.lines:
    outside.reached.clear()
    ask(folder)
    reached = outside.lasting()
    print(json.dumps([reached, source.untried(reached)]))
"""


@pytest.fixture(scope="module")
def accesses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], list[str]]]:
    """For each line, what it reaches and where, and what of that is untried."""
    folder, lines = tmp_path_factory.mktemp("user"), [*SURE, *UNTRIED]
    text = "".join(f"    lambda folder: {line},\n" for line in lines).replace(
        "import imported", "__import__('imported')"
    )
    (folder / "user.py").write_text(f"{IMPORTS}lines = [\n{text}]\n")
    for name in ("imported.py", "kept"):
        (folder / name).touch()
    (folder / "site-packages").mkdir()
    (folder / "site-packages/library.py").write_text("import os\ndef ask():\n    os.getpid(), os.listdir('.')\n")
    command, environment = [sys.executable, "-c", WATCH, str(folder)], {**os.environ, "SLURM_JOB_ID": "7"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    records = map(json.loads, output.replace(str(folder), "FOLDER").splitlines())
    return dict(zip(lines, records, strict=True))


@pytest.mark.parametrize("line", [*SURE, *UNTRIED])
def test_accesses_to_the_outside_are_seen(line: str, accesses: dict[str, tuple[dict[str, str], list[str]]]) -> None:
    reached, untried = accesses[line]
    assert [access for access in reached if "table.h5" not in access or "table.h5" in line] == (SURE | UNTRIED)[line]
    assert {*reached.values()} <= {f"FOLDER/user.py:{4 + [*accesses].index(line)}", "open"}
    assert bool(untried) == (line in UNTRIED)

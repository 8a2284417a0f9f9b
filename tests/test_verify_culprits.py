"""``python -m runner.verify`` names the culprit and no decoy beside it, says where it is, and how to fix it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from runner.verify.campaign import KillPlan
from runner.verify.diagnosis import Investigation
from runner.verify.difference import FirstDifference
from runner.verify.execution import AttemptRequest, AttemptTrace, Executor, RunTrace, Servers, fork_servers
from runner.verify.options import Options
from runner.verify.proof import Verdict, prove

USER = Path(__file__).parent / "user"
MORE: dict[str, tuple[str, ...]] = {"Ties": ("model.hidden=[16,16]",)}  # overrides
LINES = (USER / "mine" / "culprits.py").read_text().splitlines()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with fork_servers(USER) as both:
        yield both


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    MORE["Leaves"] = (f"+task.folder={tmp_path}",)


def judged(servers: Servers, *overrides: str) -> Verdict:
    command = ("--config-dir", "conf", "experiment=broken", "trainer.evaluate_every_steps=100", *overrides)
    return prove(command, Options(steps=6, kills=1, workers=(0,)), progress=print, servers=servers)


def task(name: str, *, mended: bool = False) -> tuple[str, ...]:
    return "~task", f"+task={{_target_:mine.culprits.{name},mended:{str(mended).lower()}}}"


def model(name: str, *, mended: bool = False) -> tuple[str, ...]:
    return f"model._target_=mine.culprits.{name}", f"+model.mended={str(mended).lower()}"


# What is broken -> where, the kind of cause, words of the report, and the source line that it points to.
CULPRITS = {
    "Decoys": (task, "task memory", ["cause    ", "task.total was "], "self.total += 0.01"),
    "Turns": (task, "task memory", ["cause    ", "task.scales was a cycle"], "next(self.scales)"),
    "Sharpens": (model, "model memory", ["(mine.culprits.Sharpen.strength) was "], "Sharpen.strength = "),
    "Listed": (model, "model memory", ["model.extra[0].weight was ", "ModuleList"], "self.extra[0].weight.mul_"),
    "Rustles": (model, "model memory", ["model.source was torch.Generator", "get_extra_state"], "self.source"),
    "Exchanges": (task, "task memory", ["the function doubled", "exchange it where"], "Ops.scale = "),
    "Quiets": (task, "process", ["numpy.geterr() was {'divide': 'ignore'"], ""),
    "Ties": (task, "structure", ["model/layers.4.bias was replaced"], ""),
    "Grows": (task, "structure", ["model/late.weight is a torch.float32 tensor"], "model.late = "),
    "Leaves": (task, "chance", ["leaves.txt", "culprits.py:"], 'open(self.file, "a")'),
    "Pids": (task, "pid", ["os.getpid"], "os.getpid()"),
}
DECOYS = ("task.calls", "task.history", "task.zones", "task.taken", "task.done")


FIRST, *OTHERS = CULPRITS


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.campaign) for name in OTHERS)])
def test_the_culprit_is_named_and_no_decoy(name: str, servers: Servers) -> None:
    where, kind, words, line = CULPRITS[name]
    verdict = judged(servers, *where(name), *MORE.get(name, ()))
    text = verdict.text()
    report = "\n".join([text, *verdict.tried])
    assert verdict.cause, report
    assert verdict.cause.kind == kind, report
    assert [word for word in words if word not in text] == [], report
    assert [decoy for decoy in DECOYS if decoy in text] == [], report
    if line:
        place = verdict.cause.where.partition(",")[0]
        assert line in LINES[int(place.rpartition(":")[2]) - 1], report


@pytest.mark.campaign
@pytest.mark.parametrize("name", CULPRITS)
def test_the_remedy_mends_it(name: str, servers: Servers) -> None:
    verdict = judged(servers, *CULPRITS[name][0](name, mended=True), *MORE.get(name, ()))
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])


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
    "os.getppid()": ["the pid"],
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

"""``python -m runner.verify`` names the culprit and no decoy beside it, says where it is, and how to mend it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.verify.execution import Servers, fork_servers
from runner.verify.options import Options
from runner.verify.proof import prove
from runner.verify.verdict import Verdict

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
    "Ties": (task, "structure", ["same object) changed from none to layers.1.bias = layers.4.bias"], ""),
    "Grows": (task, "structure", ["model/late.weight came in step 4"], "model.late = "),
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

"""Runs that begin from another run: with its weights, or with all of its state."""

import json
import re
import shutil
from pathlib import Path

import pytest
from lives import Lives
from marks import slow
from results import results
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore
from runner.run.parent import CheckpointRef
from runner.runs.__main__ import main
from runner.state import Progress, TrainState
from runner.storage import LocalLocation

COMMAND = ("experiment=smoke", "checkpoint.every_steps=10", "runtime.num_threads=1")


@pytest.fixture(scope="module")
def parent(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 30 steps, with checkpoints of steps 20 (the best) and 30."""
    root = tmp_path_factory.mktemp("parent")
    assert life(*COMMAND, "trainer.max_steps=30", f"run.root={root}", "run.name=p").status == 0
    return root / "smoke/p"


def record(child: Path) -> dict[str, object]:
    return json.loads((child / "run.json").read_text())["parent"]


@pytest.mark.parametrize(
    ("text", "run", "checkpoint"),
    [
        ("a/b", "a/b", None),
        ("a/b@12", "a/b", 12),
        ("a@b/c@best", "a@b/c", "best"),
        ("s3://user@host/x", "s3://user@host/x", None),
        ("a@b", "a@b", None),
    ],
)
def test_a_run_and_its_checkpoint_are_distinguished(text: str, run: str, checkpoint: int | str | None) -> None:
    assert CheckpointRef.parse(text) == CheckpointRef(run, checkpoint)
    assert str(CheckpointRef.parse(text)) == text


def test_a_child_takes_the_weights_and_begins_at_step_0(life: Lives, parent: Path, tmp_path: Path) -> None:
    command = (*COMMAND, "trainer.max_steps=15", f"run.root={tmp_path}", f"run.parent={parent}@20", "optimizer.lr=0")
    ended = life(*command)
    assert ended.status == 0, ended.output
    assert f"weights from step 20 of {parent}" in ended.output
    (child,) = (tmp_path / "smoke").iterdir()
    assert "run.parent=" in child.name
    assert record(child)["step"] == 20
    assert main(["export", f"{parent}@20", str(tmp_path / "w.safetensors")]) == 0
    expected, actual = load_file(tmp_path / "w.safetensors"), load_file(child / "model.safetensors")
    assert all(actual[name].equal(tensor) for name, tensor in expected.items()), "with a rate of 0 they do not move"
    assert json.loads((child / "result.json").read_text())["step"] == 15
    assert main(["audit", str(child)]) == 0


def test_a_child_of_all_goes_on_where_its_parent_was(life: Lives, parent: Path, tmp_path: Path) -> None:
    """It is the run that its parent would have been."""
    command = (*COMMAND, f"run.root={tmp_path}", "trainer.max_steps=50")
    assert life(*command, "run.name=whole").status == 0
    ended = life(*command, "run.name=child", f"run.parent={parent}", "run.inherit=all")
    assert ended.status == 0, ended.output
    assert f"forked from step 30 of {parent}" in ended.output
    child, whole = results(tmp_path / "smoke/child"), results(tmp_path / "smoke/whole")
    assert child.weights["model.safetensors"] == whole.weights["model.safetensors"]
    assert main(["audit", str(tmp_path / "smoke/child")]) == 0


@pytest.mark.parametrize("inherit", [slow("model"), "all"])
def test_a_child_goes_on_without_the_commit_that_it_began_from(
    inherit: str, life: Lives, parent: Path, tmp_path: Path
) -> None:
    """Before it saves by itself, while its parent went on and has removed that commit."""
    moving = tmp_path / "smoke/moving"
    shutil.copytree(parent, moving)
    more = ("checkpoint.every_steps=20", f"run.parent={moving}", f"run.inherit={inherit}", "trainer.max_steps=50")
    command = (*COMMAND, f"run.root={tmp_path}", *more)
    assert life(*command, "run.name=whole").status == 0
    begun = 0 if inherit == "model" else 30
    assert life(*command, "run.name=cut", step=begun + 1).status is None
    grown = (*COMMAND, f"run.root={tmp_path}", "run.name=moving", "run.on_drift=accept")
    assert life(*grown, "trainer.max_steps=60").status == 0
    assert not [*(moving / "commits").glob("*-s000000030-*")]
    ended = life(*command, "run.name=cut")
    assert (ended.status, f"resumed from step {begun} of attempt 1" in ended.output) == (0, True), ended.output
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))
    assert main(["audit", str(tmp_path / "smoke/cut")]) == 0


def test_a_child_needs_its_parent_only_to_begin(life: Lives, parent: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(parent, gone)
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=c", f"run.parent={gone}", "trainer.max_steps=30")
    assert life(*command, step=15).status is None
    shutil.rmtree(gone)
    ended = life(*command)
    assert (ended.status, "resumed from step 10 of attempt 1" in ended.output) == (0, True), ended.output
    shutil.rmtree(tmp_path / "smoke/c/commits")
    (tmp_path / "smoke/c/result.json").unlink()
    ended = life(*command)
    assert (ended.status, "although one was committed" in ended.output) == (5, True), ended.output


def test_a_child_without_its_parents_commit_is_reported(life: Lives, parent: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(parent, gone)
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=c", f"run.parent={gone}")
    assert life(*command, restored=True).status is None
    for path in (gone / "commits").glob("*-s000000030-*"):  # as its parent does while it goes on
        path.unlink()
    ended = life(*command)
    assert ended.status == 5
    assert re.search(r"begins from its step 30:\n  step 30 of attempt 1: commits/\S+ is gone\n", ended.output)


def test_the_best_of_the_parent(life: Lives, parent: Path, tmp_path: Path) -> None:
    best = json.loads((parent / "result.json").read_text())["objective"]["step"]
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=c", f"run.parent={parent}@best", "trainer.max_steps=5")
    ended = life(*command)
    assert (ended.status, f"weights from step {best} of {parent}" in ended.output) == (0, True), ended.output


@pytest.mark.parametrize("then", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_averaged_weights_are_taken_over_where_both_have_them(then: bool, now: bool, tmp_path: Path) -> None:
    """Without any in the parent they begin as what was taken over, not as what was drawn."""
    store = CheckpointStore(LocalLocation(tmp_path))
    parts = {"model": nn.Linear(2, 2).state_dict()}
    if then:
        average = AveragedModel(nn.Linear(2, 2))
        average.n_averaged += 7
        parts["average"] = average.state_dict()
    checkpoint = store.open(store.commit(Snapshot.of(5, parts), attempt=1, require_newest=lambda: None))
    model = nn.Linear(2, 2)
    state = TrainState(model, None, None, None, AveragedModel(model) if now else None, None, None, Progress())
    state.inherit(checkpoint, strict=True)
    assert state.model.weight.equal(parts["model"]["weight"])
    if now:
        assert state.average.module.weight.equal(parts["average"]["module.weight"] if then else model.weight)
        assert state.average.n_averaged == (7 if then else 0)


def refusals(parent: Path, root: Path) -> dict[str, tuple[tuple[str, ...], int, str]]:
    return {
        "missing": ((f"run.parent={root}/nowhere",), 2, "is not a run directory: it has no run.json"),
        "no such step": (
            (f"run.parent={parent}@21",),
            2,
            "no checkpoint of step 21; it has checkpoints of steps 20, 30",
        ),
        "shapes": ((f"run.parent={parent}", "model.hidden=[7]", "run.load=strict"), 1, "size mismatch for "),
        "inherit alone": (("run.inherit=all",), 2, "run.inherit=all needs run.parent"),
    }


@pytest.mark.parametrize("name", ["missing", "no such step", "shapes", "inherit alone"])
def test_an_impossible_parent_is_reported(name: str, life: Lives, parent: Path, tmp_path: Path) -> None:
    overrides, status, message = refusals(parent, tmp_path)[name]
    ended = life(*COMMAND, f"run.root={tmp_path}", "run.name=c", *overrides)
    assert (ended.status, message in ended.output, "Traceback" in ended.output) == (status, True, False), ended.output
    assert (tmp_path / "smoke/c/run.json").exists() == (name == "shapes")


def test_a_parent_without_a_good_checkpoint_begins_nothing(life: Lives, parent: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(parent, bad)
    for path in (bad / "data").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=c", f"run.parent={bad}")
    ended = life(*command)
    assert (ended.status, "step 30 of attempt 1: data/" in ended.output) == (5, True), ended.output
    assert not (tmp_path / "smoke/c/run.json").exists()


@pytest.mark.slow
def test_a_child_goes_on_in_a_copy_of_the_project(life: Lives, parent: Path, tmp_path: Path) -> None:
    command = (*COMMAND, "run.parent=outputs/smoke/p", "trainer.max_steps=20")
    shutil.copytree(parent, tmp_path / "a/outputs/smoke/p")
    assert life(*command, cwd=tmp_path / "a", step=15).status is None
    (tmp_path / "a").rename(tmp_path / "b")
    ended = life(*command, cwd=tmp_path / "b")
    assert (ended.status, "resumed from step 10 of attempt 1" in ended.output) == (0, True), ended.output


def test_another_parent_than_the_recorded_one_is_refused(life: Lives, parent: Path, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=c", "trainer.max_steps=5")
    assert life(*command, f"run.parent={parent}").status == 0
    for other in ((f"run.parent={parent}@20",), (), (f"run.parent={parent}", "run.inherit=all")):
        ended = life(*command, *other)
        assert (ended.status, "A run is started once" in ended.output) == (3, True), ended.output
    assert life(*command, f"run.parent={parent}").output.startswith("finished step 5")

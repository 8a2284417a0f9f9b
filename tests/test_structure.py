"""State whose structure changes during training: restored where possible, else refused at the save."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from lives import Lives
from marks import slow
from results import results
from torch import nn

from runner.checkpoint.manifest import seal, unseal
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.structure import Structure
from runner.storage import LocalLocation

USER = Path(__file__).parent / "user"
COMMAND = ("experiment=smoke", "trainer.max_steps=16", "trainer.evaluate_every_steps=8", "checkpoint.every_steps=3")
CHANGES = ("task._target_=mine.growing.Changes", "~task.label_smoothing")
HEAD = ("optimizer._target_=mine.growing.some", "+optimizer.names=[layers.4]")


@pytest.mark.parametrize(
    "settings",
    [
        (*CHANGES, "+task.what=add", *HEAD, "model._target_=mine.growing.Remembers", "trainer.ema_decay=null"),
        slow((*CHANGES, "+task.what=add_own", *HEAD)),
        slow((*CHANGES, "+task.what=add_own")),
    ],
    ids=["group and buffers", "group of the task", "group without names beside named ones"],
)
def test_a_changed_structure_is_restored(settings: tuple[str, ...], life: Lives, tmp_path: Path) -> None:
    """Also by the second resume, and a third from where it had not changed."""
    command = (*COMMAND, *settings, f"run.root={tmp_path}")
    ended = life(*command, "run.name=whole", cwd=USER)
    assert ended.status == 0, ended.output
    for step in (5, 11, 13):
        assert life(*command, "run.name=cut", cwd=USER, step=step).status is None
    ended = life(*command, "run.name=cut", cwd=USER)
    assert (ended.status, "resumed from step 12 of attempt" in ended.output) == (0, True), ended.output
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))


def test_buffers_built_as_one_tensor_are_loaded_as_several() -> None:
    def build() -> nn.Module:
        model, table = nn.ModuleList([nn.Tanh(), nn.Tanh(), nn.Tanh()]), torch.zeros(2)
        for layer in model:
            layer.register_buffer("table", table)
        return model

    model = build()
    structure = Structure({"model": model}, None, build)
    assert structure.changes(1, {"model": model}, None) == {}
    for number, layer in enumerate(model):
        layer.table = torch.full((2,), 1.0 * number)
    changes = structure.changes(2, {"model": model}, None)
    resumed = build()
    Structure({"model": resumed}, None, build).resize("model", changes["buffers"]["model"], model.state_dict())
    resumed.load_state_dict(model.state_dict())
    assert [layer.table.tolist() for layer in resumed] == [[number, number] for number in range(3)]


@pytest.mark.parametrize("eager", [False, slow(True)], ids=["by hand", "also by its own code for loading"])
def test_a_layer_made_in_the_first_forward(eager: bool, life: Lives, tmp_path: Path) -> None:
    """Refused at the first save, unless the model makes it for a state that has it."""
    kind = "Makes" if eager else "Lazy"
    command = (*COMMAND, f"model._target_=mine.growing.{kind}", "trainer.ema_decay=null", f"run.root={tmp_path}")
    ended = life(*command, "run.name=whole", cwd=USER)
    if not eager:
        assert ended.status == 1
        assert "because no resume could load it: model/extra.weight is a torch.float32 tensor" in ended.output
        return
    assert ended.status == 0, ended.output
    assert life(*command, "run.name=cut", cwd=USER, step=11).status is None
    ended = life(*command, "run.name=cut", cwd=USER)
    assert (ended.status, "resumed from step 9" in ended.output) == (0, True), ended.output
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("add_foreign", "group 1 of the optimizer has a tensor of shape [5] that is no weight"),
        ("replace", "the optimizer of the update was replaced by another SGD"),
        ("widen", "model/layers.4.weight is a torch.float32 tensor of shape [12, 64], and was a torch.float32 tensor"),
        ("untie", "model/layers.4.weight was replaced, and the optimizer still trains the tensor before"),
        ("nothing", ""),
    ],
)
def test_state_that_no_resume_could_load_is_refused(change: str, message: str, life: Lives, tmp_path: Path) -> None:
    """With the step and what it is; the checkpoints from before stay. New keys of a task are nobody's business."""
    command = (*COMMAND, *CHANGES, f"+task.what={change}", "optimizer=sgd", f"run.root={tmp_path}", "run.name=r")
    ended = life(*command, cwd=USER)
    assert ended.status == (1 if message else 0), ended.output
    if message:
        assert f"the state of step 8 is not saved, because no resume could load it: {message}" in ended.output
    steps = sorted({commit.step for commit in CheckpointStore(LocalLocation(tmp_path / "smoke/r")).commits()})
    assert steps[-1] == (6 if message else 16)


def as_before(run: Path) -> None:
    """The commits as versions made them that did not say what had changed."""
    for path in (run / "commits").iterdir():
        manifest = unseal(path.read_bytes())
        assert manifest
        manifest["facts"].pop("structure", None)
        path.write_bytes(seal(manifest))


def pasted(output: str) -> list[str]:
    """The arguments of the command that a message offers."""
    line = next(line for line in output.splitlines() if line.startswith("  ") and " -m runner " in line)
    return shlex.split(line)[3:]


def test_a_commit_of_before_with_named_weights_is_restored(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, *CHANGES, "+task.what=move", f"run.root={tmp_path}")
    assert life(*command, "run.name=whole", cwd=USER).status == 0
    assert life(*command, "run.name=cut", cwd=USER, step=11).status is None
    as_before(tmp_path / "smoke/cut")
    ended = life(*command, "run.name=cut", cwd=USER)
    assert (ended.status, "resumed from step 9" in ended.output) == (0, True), ended.output
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))


def test_an_unloadable_commit_names_the_last_loadable(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, *CHANGES, "+task.what=add", *HEAD, f"run.root={tmp_path}", 'run.name="lr=1,a"')
    assert life(*command, "checkpoint.keep_last=5", cwd=USER, step=11).status is None
    as_before(tmp_path / "smoke/lr=1,a")
    ended = life(*command, cwd=USER)
    assert (ended.status, "the optimizer of this run does not fit what step 9 saved" in ended.output) == (1, True)
    assert "A new run can begin from its step 6:" in ended.output
    ended = life(*pasted(ended.output), cwd=USER)
    assert (ended.status, "forked from step 6 of" in ended.output) == (0, True), ended.output


def test_nan_under_a_finite_loss_is_not_committed(life: Lives, tmp_path: Path) -> None:
    """Not even in the step in which it is saved; and the command that the message offers goes on before it."""
    command = (*COMMAND, *CHANGES, "+task.what=spoil", "+task.at=8", f"run.root={tmp_path}", "run.name=r")
    for _ in range(2):  # it comes again, and costs nothing
        ended = life(*command, cwd=USER)
        assert ended.status == 1
        assert "the state of step 9 is not saved: model/layers.1.weight is NaN or infinite" in ended.output
    ended = life(*pasted(ended.output), cwd=USER)
    assert (ended.status, "resumed from step 8" in ended.output) == (0, True), ended.output
    assert json.loads((tmp_path / "smoke/r/result.json").read_text())["skipped_steps"] == 1


def test_a_commit_with_nan_names_the_last_that_is_finite(life: Lives, tmp_path: Path) -> None:
    """As earlier versions made them."""
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, "checkpoint.keep_last=3", cwd=USER, step=13).status is None
    store = CheckpointStore(LocalLocation(tmp_path / "smoke/r"))
    newest = store.commits()[0]
    checkpoint = store.open(newest)
    parts = {part: checkpoint.load(part) for part in checkpoint.parts}
    parts["model"]["layers.4.bias"][3] = torch.nan
    spoiled = Snapshot.of(newest.step, parts, **checkpoint.facts)
    store.commit(spoiled, attempt=newest.attempt + 1, require_newest=lambda: None)
    ended = life(*command, cwd=USER)
    assert (ended.status, "step 12 was saved with NaN or infinity in layers.4.bias" in ended.output) == (1, True)
    assert "A new run can begin from its step 9:" in ended.output, "a step is that of its newest commit"
    ended = life(*pasted(ended.output), cwd=USER)
    assert (ended.status, "forked from step 9 of" in ended.output) == (0, True), ended.output


@pytest.mark.parametrize(("steps", "message"), [(60, "32 steps in a row were skipped"), (10, "all steps were skipped")])
def test_a_run_that_skips_all_its_steps_fails(steps: int, message: str, life: Lives, tmp_path: Path) -> None:
    bad = ("task._target_=mine.tasks.Curriculum", "+task.bad_every=1", "~task.label_smoothing")
    more = ("trainer.on_nonfinite=skip", f"trainer.max_steps={steps}", f"run.root={tmp_path}")
    ended = life(*COMMAND, *bad, *more, cwd=USER)
    assert (ended.status, message in ended.output) == (1, True), ended.output

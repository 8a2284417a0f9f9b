"""Gradual unfreezing by the step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from crews import Crews
from lives import Lives
from marks import slow
from results import results

from runner.callbacks.unfreeze import Unfreeze
from runner.checkpoint.store import CheckpointStore
from runner.runs.__main__ import main
from runner.storage import LocalLocation

UNFREEZE = (
    "+callbacks.thaw={_target_:runner.callbacks.unfreeze.Unfreeze,schedule:{0:layers.4.bias,6:layers.4,12:[layers]}}"
)
COMMAND = ("experiment=smoke", "trainer.max_steps=18", "trainer.evaluate_every_steps=9", "checkpoint.every_steps=3")
COMMAND = (*COMMAND, "trainer.clip_norm=0.1", "checkpoint.keep_every_steps=3", "optimizer.weight_decay=0", UNFREEZE)


def weights(run: Path) -> dict[int, dict[str, torch.Tensor]]:
    store = CheckpointStore(LocalLocation(run))
    return {commit.step: store.open(commit).load("model") for commit in store.commits()}


def test_weights_are_trained_from_their_step_on(life: Lives, tmp_path: Path) -> None:
    """And a killed run is the undisturbed run."""
    command = (*COMMAND, f"run.root={tmp_path}")
    ended = life(*command, "run.name=whole")
    assert ended.status == 0, ended.output
    saved = weights(tmp_path / "smoke/whole")
    for name, thawed in {"layers.4.bias": 0, "layers.4.weight": 6, "layers.1.weight": 12, "layers.1.bias": 12}.items():
        moved = [step for step in range(6, 19, 3) if not torch.equal(saved[step][name], saved[step - 3][name])]
        assert moved == [step for step in range(6, 19, 3) if step > thawed]
    for step in (5, 8, 14):
        assert life(*command, "run.name=cut", step=step).status is None
    assert life(*command, "run.name=cut").status == 0
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))
    assert main(["audit", str(tmp_path / "smoke/cut")]) == 0


def test_a_resume_freezes_what_the_saved_step_had_frozen() -> None:
    """Weights that are due in the next step were frozen when it was saved."""
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    state = SimpleNamespace(
        model=model, optimizer=torch.optim.SGD(model.parameters()), progress=SimpleNamespace(step=6)
    )
    thaw = Unfreeze({0: "0", 6: "1"})
    thaw.on_build(SimpleNamespace(state=state))  # type: ignore[arg-type]
    thaw.on_resume(state)  # type: ignore[arg-type]
    assert [layer.weight.requires_grad for layer in model] == [True, False]
    thaw.on_step_start(SimpleNamespace(step=6))  # type: ignore[arg-type]
    assert [layer.weight.requires_grad for layer in model] == [True, True]


@pytest.mark.parametrize("layout", [slow("ddp"), "fsdp"])
def test_several_processes_thaw_alike(layout: str, life: Lives, crew: Crews, tmp_path: Path) -> None:
    """As one process does, up to rounding; and to the bit after a kill."""
    command = (*COMMAND, f"run.root={tmp_path}", "model.dropout=0.0")
    assert life(*command, "run.name=one").status == 0
    ended = crew(2, *command, f"runtime.parallel={layout}", "run.name=whole")
    assert not any(ended.statuses), ended.output
    assert None in crew(2, *command, f"runtime.parallel={layout}", "run.name=cut", to=[1], step=14).statuses
    assert not any(crew(2, *command, f"runtime.parallel={layout}", "run.name=cut").statuses)
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))
    one, whole = (weights(tmp_path / f"smoke/{name}")[18] for name in ("one", "whole"))
    for name, tensor in one.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+callbacks.thaw.schedule={3:body}",), "Unfreeze, step 3: no weight of the model matches 'body'"),
        (("+callbacks.thaw.schedule={soon:layers}",), "the schedule has 'soon', which is not a number of steps"),
        (
            ("+callbacks.thaw.schedule={3:layers}", "+optimizer.params=layers.4"),
            "layers.1.bias is in no optimizer, and would not be trained after step 3",
        ),
    ],
)
def test_a_schedule_that_cannot_work_is_reported(
    overrides: tuple[str, ...], message: str, life: Lives, tmp_path: Path
) -> None:
    target = "+callbacks.thaw._target_=runner.callbacks.unfreeze.Unfreeze"
    ended = life("experiment=smoke", target, *overrides, f"run.root={tmp_path}")
    assert (ended.status, message in ended.output) == (2, True), ended.output

"""Training programs beyond one optimizer with a schedule of steps, and the first minutes of an experiment."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from lives import Lives
from marks import quick_first, slow
from results import metric_lines, results
from safetensors.torch import load_file

from runner.app import CONFIGS
from runner.config.help import explain
from runner.config.schema import Config
from runner.runs.__main__ import main

USER = Path(__file__).parent / "user"
COMMAND = ("experiment=smoke", "checkpoint.every_steps=5", "trainer.max_steps=40", "trainer.evaluate_every_steps=5")
PLATEAU = (
    "~scheduler",
    "+scheduler={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau,mode:max,patience:0,factor:0.5,threshold:0.2}",
)
LBFGS = ("~optimizer", "+optimizer={_target_:torch.optim.LBFGS,lr:0.1,max_iter:3,history_size:4}")
KINDS = {
    "plateau": PLATEAU,
    "per epoch": ("~scheduler", "+scheduler={_target_:torch.optim.lr_scheduler.StepLR,step_size:1,interval:epoch}"),
    "without rates": ("~scheduler", "+scheduler._target_=mine.programs.NoRates"),
    "closure": (*LBFGS, "task._target_=mine.programs.Closure", "~task.label_smoothing"),
    "own step alone": ("task._target_=mine.programs.StepAlone", "trainer.clip_norm=1"),
    "collator": ("+data.collate={_target_:mine.programs.Collator,scale:0.5}",),
    "teacher": ("task._target_=mine.tasks.Averages", "~task.label_smoothing"),
    "compiled inside": ("model._target_=mine.programs.Compiled",),
}


def rates(run: Path) -> list[float]:
    return [line["train/lr"] for line in metric_lines(run) if "train/lr" in line]


@pytest.mark.parametrize("kind", quick_first(KINDS, "plateau", "closure", "collator"))
def test_a_killed_program_is_the_undisturbed_program(kind: str, life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, *KINDS[kind], f"run.root={tmp_path}", "metrics.every_steps=1")
    ended = life(*command, "run.name=whole", cwd=USER)
    assert ended.status == 0, ended.output
    for step in (13, 31):
        assert life(*command, "run.name=cut", cwd=USER, step=step).status is None
    assert life(*command, "run.name=cut", cwd=USER).status == 0
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))
    assert main(["audit", str(tmp_path / "smoke/cut")]) == 0


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.clip_norm=1",
        *map(slow, ("trainer.ema_decay=0.9", "trainer.precision=fp16", "trainer.on_nonfinite=skip")),
    ],
)
def test_a_step_that_leaves_settings_out_is_refused(setting: str, life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMAND, *KINDS["closure"], f"run.root={tmp_path}", setting, cwd=USER)
    assert ended.status == 1
    name = setting if "fp16" in setting or "skip" in setting else setting.partition("=")[0]
    assert f"the task calls step() of an optimizer itself, which leaves out {name}. Call" in ended.output


def test_a_step_of_an_inner_optimizer_is_refused(life: Lives, tmp_path: Path) -> None:
    outer = ("task._target_=mine.programs.OuterStep", "~optimizer", "+optimizer={_target_:mine.programs.Outer,lr:0.1}")
    command = (*COMMAND, *outer, "~task.label_smoothing", f"run.root={tmp_path}")
    assert life(*command, "run.name=plain", cwd=USER).status == 0
    ended = life(*command, "trainer.clip_norm=1", cwd=USER)
    assert ended.status == 1
    assert "which leaves out trainer.clip_norm" in ended.output


def test_an_exported_model_is_refused(life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMAND, f"run.root={tmp_path}", "~model", "+model._target_=mine.programs.exported", cwd=USER)
    assert (ended.status, "Give the module as it was before torch.export" in ended.output) == (2, True), ended.output


def test_a_run_in_memory_says_that_it_ends_with_the_process(life: Lives) -> None:
    ended = life(*COMMAND, "run.root=memory://runs", "run.name=r")
    assert (ended.status, "memory:// ends with this process" in ended.output) == (0, True), ended.output


def test_a_plateau_is_measured_by_the_objective(life: Lives, tmp_path: Path) -> None:
    """The rate halves where the accuracy is not 20 % better than the best before; a changed factor holds later."""
    command = (*COMMAND, *PLATEAU, f"run.root={tmp_path}", "run.name=r", "metrics.every_steps=1")
    assert life(*command, "trainer.max_steps=20").status == 0
    best, rate, expected = 0.0, 1e-3, []
    values = {
        line["step"]: line["val/accuracy"] for line in metric_lines(tmp_path / "smoke/r") if "val/accuracy" in line
    }
    for step in range(1, 21):
        expected.append(rate)
        if step in values and values[step] > best * 1.2:
            best = values[step]
        elif step in values:
            rate *= 0.5
    assert rates(tmp_path / "smoke/r") == expected
    assert expected[-1] < 1e-3
    ended = life(*command, "scheduler.factor=0.1", "scheduler.threshold=9", "run.on_drift=accept")
    assert ended.status == 0, ended.output
    later = rates(tmp_path / "smoke/r")[20:]
    assert later[0] == rate
    assert later[-1] == pytest.approx(rate * 0.1**3, rel=1e-9)


@pytest.mark.parametrize("steps", ["null", slow("200")])
def test_a_schedule_ends_with_the_last_epoch(steps: str, life: Lives, tmp_path: Path) -> None:
    """Two epochs of 1,437 samples are 45 steps of 64; the rate of step 45 is the last before 0."""
    options = ("scheduler=warmup_cosine", "scheduler.warmup_steps=4", f"trainer.max_steps={steps}")
    command = ("experiment=smoke", *options, "trainer.max_epochs=2", f"run.root={tmp_path}", "run.name=r")
    ended = life(*command, "metrics.every_steps=1")
    assert ended.status == 0, ended.output
    run = rates(tmp_path / "smoke/r")
    assert len(run) == 45
    assert 0 < run[-1] < 0.01 * max(run)
    assert "but the run ends at step" not in ended.output
    assert "finished step 45 (max_epochs)" in ended.output


def test_a_schedule_of_epochs_ends_with_the_last_epoch(life: Lives, tmp_path: Path) -> None:
    options = ("scheduler=warmup_cosine", "scheduler.warmup_steps=0", "+scheduler.interval=epoch")
    command = ("experiment=smoke", *options, "trainer.max_steps=null", "trainer.max_epochs=2", "metrics.every_steps=1")
    ended = life(*command, f"run.root={tmp_path}", "run.name=r")
    assert ended.status == 0, ended.output
    assert rates(tmp_path / "smoke/r") == [1e-3] * 23 + [pytest.approx(0.5e-3, rel=1e-12)] * 22


def test_a_schedule_longer_than_the_run_is_reported(life: Lives, tmp_path: Path) -> None:
    command = (
        "experiment=smoke",
        "scheduler=warmup_cosine",
        "trainer.max_steps=2",
        "trainer.evaluate_every_steps=null",
    )
    ended = life(*command, "scheduler.total_steps=100", f"run.root={tmp_path}")
    assert ended.status == 0, ended.output
    assert "scheduler.total_steps=100, but the run ends at step 2" in ended.output


def test_values_of_a_user_are_part_of_the_identity(life: Lives, tmp_path: Path) -> None:
    folder = tmp_path / "conf/experiment"
    folder.mkdir(parents=True)
    text = (Path(__file__).parent.parent / "conf/experiment/smoke.yaml").read_text()
    (folder / "mine.yaml").write_text(text + "params: {width: 8}\nmodel: {hidden: ['${params.width}']}\n")
    command = ("--config-dir", "conf", "experiment=mine", "trainer.max_steps=2", "run.root=out")
    for width, name in ((8, "trainer.max_steps=2"), (16, "params.width=16,trainer.max_steps=2")):
        more = (f"params.width={width}",) if width != 8 else ()
        ended = life(*command, *more, cwd=tmp_path)
        assert ended.status == 0, ended.output
        weights = load_file(tmp_path / "out/mine" / name / "model.safetensors")
        assert width in next(iter(weights.values())).shape
    ended = life(*command, "run.name=trainer.max_steps=2", "params.width=16", cwd=tmp_path)
    assert (ended.status, "params.width" in ended.output) == (3, True), ended.output


def test_a_run_that_has_not_trained_takes_a_correction(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r", "trainer.max_steps=6")
    ended = life(*command, "model.hidden=[8, no]")
    assert ended.status == 2, ended.output
    assert life(*command, "model._target_=runner.models.Nothing").status == 2
    assert life(*command, "optimizer.lr=0.5", restored=True).status is None
    ended = life(*command, step=6)
    assert "changed  optimizer.lr 0.5 -> 0.001" in ended.output
    assert ended.status is None
    ended = life(*command, "optimizer.lr=0.5")
    assert ended.status == 3, "step 5 is committed"
    assert life(*command).status == 0
    assert life(*command, "run.name=whole").status == 0
    assert not results(tmp_path / "smoke/r").differences(results(tmp_path / "smoke/whole"))
    assert main(["audit", str(tmp_path / "smoke/r")]) == 0


def test_a_run_that_has_trained_refuses_a_change(life: Lives, tmp_path: Path) -> None:
    """Also where no step of it is committed."""
    failing = ("task._target_=mine.tasks.Fails", "~task.label_smoothing", "+task.step=7", "checkpoint.every_steps=30")
    command = (*COMMAND, *failing, "trainer.evaluate_every_steps=null", f"run.root={tmp_path}", "run.name=r")
    ended = life(*command, cwd=USER)
    assert (ended.status, "ZeroDivisionError" in ended.output) == (1, True), ended.output
    assert not [*(tmp_path / "smoke/r/commits").glob("*")]
    ended = life(*command, "optimizer.lr=0.5", cwd=USER)
    assert (ended.status, "optimizer.lr" in ended.output) == (3, True), ended.output


def test_weights_that_fit_are_taken_from_a_parent(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "trainer.max_steps=10")
    assert life(*command, "run.name=p", "model._target_=mine.programs.Compiled", cwd=USER).status == 0
    parent = load_file(tmp_path / "smoke/p/model.safetensors")
    assert not [name for name in parent if "_orig_mod" in name]
    child = (*command, f"run.parent={tmp_path}/smoke/p", "optimizer.lr=0", "optimizer.weight_decay=0")
    for name, target in (("eager", "Compiled"), ("head", "OtherHead")):
        more = (f"run.name={name}", f"model._target_=mine.programs.{target}")
        ended = life(*child, *more, cwd=USER, environment={"EAGER": "1"})
        assert ended.status == 0, ended.output
        weights = load_file(tmp_path / f"smoke/{name}/model.safetensors")
        assert all(weights[name].equal(tensor) for name, tensor in parent.items())
        shown = "weights  not in the parent, as they were built: head.weight [10, 10], head.bias [10]"
        assert (shown in ended.output) == (name == "head")
    ended = life(*child, *more, "run.name=s", "run.load=strict", cwd=USER)
    assert (ended.status, "Missing key(s) in state_dict" in ended.output) == (1, True), ended.output
    ended = life(*child, "run.name=n", "model.hidden=[7]", "model.outputs=11", cwd=USER)
    assert (ended.status, "no weight of step 10 of the parent" in ended.output) == (1, True), ended.output


def test_help_explains_a_key(life: Lives) -> None:
    ended = life("--help", "data.tail")
    assert ended.output == (
        "data.tail (carry | drop, default carry)\n"
        "  an epoch's last, short batch: carry fills it from the next epoch, drop leaves it out\n"
    )
    section = life("--help", "trainer.early_stopping").output
    assert "trainer.early_stopping.patience (default null)\n  stop after so many evaluations in a row" in section
    assert "an argument of the object that optimizer._target_ names" in life("--help", "optimizer.lr").output
    assert "TensorBoardWriter" in life("--help", "metrics.writers.tensorboard").output
    ended = life("--help", "trainer.max_step")
    assert (ended.status, ended.output) == (2, "there is no key trainer.max_step. Did you mean trainer.max_steps?\n")


def test_every_key_is_explained() -> None:
    keys = [*_keys(Config)]
    assert len(keys) > 60
    texts = {key: explain(key, CONFIGS / "config.yaml") for key in keys}
    assert [key for key, text in texts.items() if not text.startswith(key)] == []
    assert "best states by the objective" in texts["checkpoint.keep_best"], "not only in the comment of its neighbour"


def _keys(schema: Any, path: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        yield f"{path}{name}"
        if is_dataclass(kind):
            yield from _keys(kind, f"{path}{name}.")


def test_a_sweep_may_be_asked_for_after_the_overrides(life: Lives, tmp_path: Path) -> None:
    ended = life("experiment=smoke", "-m", "seed=1,2", "trainer.max_steps=1", f"run.root={tmp_path}")
    assert ended.status == 0, ended.output
    assert len([*tmp_path.glob("smoke/*/result.json")]) == 2


def test_a_missing_module_is_searched_in_named_folders(life: Lives, tmp_path: Path) -> None:
    ended = life("experiment=smoke", "model._target_=nowhere.Net", f"run.root={tmp_path}", cwd=tmp_path)
    assert ended.status == 2
    assert "No module named 'nowhere'" in ended.output
    assert f"Python looked in {tmp_path}, " in ended.output


@pytest.mark.slow
def test_the_console_command_beside_a_users_own_runner(tmp_path: Path) -> None:
    """Modules of the folder are imported, also in spawned workers, and a ``runner.py`` there shadows nothing."""
    (tmp_path / "runner.py").write_text("raise SystemExit('not this')\n")
    (tmp_path / "own.py").write_text("from runner.models.mlp import MLP\n\n\nclass Net(MLP):\n    pass\n")
    script = tmp_path / "hydra-runner"  # as pip writes it
    script.write_text(
        "import sys\nfrom runner.__main__ import console\nif __name__ == '__main__':\n    sys.exit(console())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONSAFEPATH": "1"}

    def command(*words: str) -> str:
        run = [sys.executable, str(script), *words]
        ended = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    workers = ("runtime.num_workers=1", "runtime.start_method=spawn")
    command("experiment=smoke", "trainer.max_steps=2", "model._target_=own.Net", "run.name=r", *workers)
    assert "smoke/r  complete" in command("runs", "list", "outputs")
    verified = command("verify", "experiment=smoke", "model._target_=own.Net", "verify.steps=4", "verify.kills=1")
    assert verified.startswith("PASS")

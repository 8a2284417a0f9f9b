"""When a run is evaluated, which state an evaluation may change, and which process reports it."""

from pathlib import Path

import pytest
from crews import Crews
from lives import LAST, Lives
from marks import slow
from results import metric_lines, results

USER = Path(__file__).parent / "user"
ROWS = (
    "--config-dir",
    f"{USER}/conf",
    "experiment=rows",
    "trainer.max_steps=12",
    "trainer.evaluate_every_steps=4",
    "data.evaluation_batch_size=8",  # four batches
    "checkpoint.every_steps=null",
    "metrics.every_steps=2",
    "runtime.audit=false",
)
CALLBACK = "+callbacks.count._target_=mine.callbacks.StepCount"
WAKES = (*ROWS, "task._target_=mine.tasks.Wakes", "model._target_=mine.odd.Centres")


@pytest.mark.parametrize(
    "more",
    [(), slow(("trainer.ema_decay=0.5",)), slow(("+task.pushes=true",)), ("+task.swaps=true",)],
    ids=["plain", "ema", "pushes", "swaps"],
)
def test_an_evaluation_that_is_cut_short_leaves_no_trace(more: tuple[str, ...], life: Lives, tmp_path: Path) -> None:
    """Neither in the buffers that it moved nor in the task. One that moves weights goes on to its end."""
    command = (*WAKES, *more, f"run.root={tmp_path}")
    assert life(*command, "+task.call=-1", "run.name=whole", cwd=USER).status == 0
    for call in (3, 2):
        ended = life(
            *command, f"+task.call={call}", "run.name=cut", "run.on_drift=accept", "runtime.check_batches=0", cwd=USER
        )
        assert ended.status == 75, ended.output
        assert "which is committed" in ended.output
    assert life(*command, "+task.call=-1", "run.name=cut", "run.on_drift=accept", cwd=USER).status == 0
    require_same(tmp_path / "rows")


def test_an_evaluation_that_moves_the_model_is_warned_of(life: Lives, tmp_path: Path) -> None:
    """Once, by the names of what it moves. Not one that leaves the model alone."""
    command = (*ROWS, "model._target_=mine.odd.Normed", f"run.root={tmp_path}")
    wakes = life(
        *command, "task._target_=mine.tasks.Wakes", "+task.call=-1", "+task.pushes=true", "run.name=a", cwd=USER
    )
    warned = "changes layers.1.weight, norm.num_batches_tracked, norm.running_mean, norm.running_var of the model"
    assert wakes.output.count(warned) == wakes.output.count("the evaluation changes") == 1, wakes.output
    assert "let Wakes.evaluation_step neither call model.train() nor write to the model" in wakes.output
    assert "the evaluation changes" not in life(*command, "run.name=b", cwd=USER).output


def test_an_expanded_buffer_is_refused_by_name(life: Lives, tmp_path: Path) -> None:
    ended = life(*ROWS, "model._target_=mine.odd.Shared", f"run.root={tmp_path}", cwd=USER)
    assert "cannot save model/mean: Tensor, torch.strided, on cpu; only dense tensors" in ended.output, ended.output


@pytest.mark.parametrize("call", [6, slow(10)], ids=["between", "last"])
def test_callbacks_see_a_step_with_its_evaluation(call: int, life: Lives, tmp_path: Path) -> None:
    """The step whose evaluation is cut short is seen by ``on_step`` once, by the attempt that evaluates it."""
    own = ("+callbacks.weighs._target_=mine.broken.Weighs", CALLBACK)
    command = (*WAKES, *own, f"run.root={tmp_path}")
    assert life(*command, "+task.call=-1", "run.name=whole", cwd=USER).status == 0
    assert life(*command, f"+task.call={call}", "run.name=cut", cwd=USER).status == 75
    assert life(*command, "+task.call=-1", "run.name=cut", "run.on_drift=accept", cwd=USER).status == 0
    require_same(tmp_path / "rows")


@pytest.mark.parametrize("cut", [slow(None), 6, slow(7)])
def test_the_step_where_a_callback_ends_training_is_evaluated(cut: int | None, life: Lives, tmp_path: Path) -> None:
    """Killed after that step was evaluated, before, and not at all. Beside it, a model that has to be woken."""
    command = (*ROWS, "+callbacks.ends={_target_: mine.callbacks.Ends, step: 7}", "checkpoint.every_steps=1")
    command = (*command, "model._target_=mine.odd.asleep", f"run.root={tmp_path}", "run.name=r")
    if cut is not None:
        assert life(*command, cwd=USER, step=cut).status is None
    ended = life(*command, cwd=USER)
    assert ended.status == 0, ended.output
    assert "model    it came in evaluation mode, and trains now" in ended.output
    actual = results(tmp_path / "rows/r")
    assert (actual.result["step"], actual.result["reason"]) == (7, "enough")
    assert actual.parts["callback.evaluate"]["step"] == 7
    lines = {line["step"]: line for line in metric_lines(tmp_path / "rows/r")}
    assert [step for step, line in lines.items() if "val/loss" in line] == [4, 7]
    assert actual.result["metrics"]["val/loss"] == lines[7]["val/loss"]
    assert actual.result["objective"]["value"] == min(lines[4]["val/loss"], lines[7]["val/loss"])
    assert "train/loss" in lines[7]


def test_a_signal_delays_the_evaluation_after_a_callbacks_stop(life: Lives, tmp_path: Path) -> None:
    command = (*WAKES, "+callbacks.ends={_target_: mine.callbacks.Ends, step: 7}", f"run.root={tmp_path}")
    assert life(*command, "+task.call=-1", "run.name=whole", cwd=USER).status == 0
    cut = (*command, "+task.call=6", "run.name=cut")
    ended = life(*cut, cwd=USER)
    assert (ended.status, "stopped after step 7" in ended.output) == (75, True), ended.output
    ended = life(*cut, cwd=USER)
    assert (ended.status, "finished step 7 (enough)" in ended.output) == (0, True), ended.output
    require_same(tmp_path / "rows")


def require_same(folder: Path) -> None:
    """The runs differ in what they are told to do, and in nothing else."""
    cut, whole = (results(folder / name) for name in ("cut", "whole"))
    assert set(cut.differences(whole)) <= {"result"}
    assert {**cut.result, "identity": 0} == {**whole.result, "identity": 0}


@pytest.mark.parametrize("more", [slow(("runtime.parallel=ddp",)), ("runtime.parallel=fsdp", "trainer.ema_decay=0.5")])
def test_many_processes_are_cut_short_in_an_evaluation(more: tuple[str, ...], crew: Crews, tmp_path: Path) -> None:
    """Also where no evaluation is followed by a save, after which the weights of fsdp lie as before it."""
    command = (*ROWS, "model._target_=mine.odd.Centres", "objective.metric=null", *more, f"run.root={tmp_path}")
    task = ("task._target_=mine.tasks.Wakes", "+task.remembers=false")
    assert not any(crew(2, *command, *task, "+task.call=-1", "run.name=whole", cwd=USER).statuses)
    ended = crew(2, *command, *task, "+task.call=3", "run.name=cut", cwd=USER)
    assert ended.statuses == [75, 75], ended.output
    ended = crew(2, *command, *task, "+task.call=-1", "run.name=cut", "run.on_drift=accept", cwd=USER)
    assert ended.statuses == [0, 0], ended.output
    require_same(tmp_path / "rows")


def test_reports_that_differ_between_processes_are_refused(crew: Crews, tmp_path: Path) -> None:
    command = (*ROWS, "task._target_=mine.tasks.Counts", f"run.root={tmp_path}")
    ended = crew(2, *command, "run.name=apart", cwd=USER)
    assert ended.statuses == [1, 1]
    assert ended.output.count("Counts.evaluation_end reports 'share' as ") == 1, ended.output
    assert "on rank 0, " in ended.output
    assert "values that can be averaged over samples" in ended.output
    assert "Traceback" not in ended.output
    assert not metric_lines(tmp_path / "rows/apart") or "val/loss" not in metric_lines(tmp_path / "rows/apart")[-1]
    ended = crew(2, *command, "+task.together=true", "run.name=together", cwd=USER)
    assert ended.statuses == [0, 0], ended.output


def test_callback_metrics_that_differ_by_process_are_refused(crew: Crews, tmp_path: Path) -> None:
    numbers = "+callbacks.numbers._target_=mine.callbacks.Numbers"
    ended = crew(2, *ROWS, numbers, f"run.root={tmp_path}", "run.name=r", cwd=USER)
    assert ended.statuses == [1, 1]
    assert ended.output.count("the training reports 'train/rank' as 0.0 on rank 0, 1.0 on rank 1") == 1, ended.output
    assert "must be the same in all processes" in ended.output


@pytest.mark.parametrize("last", [False, slow(True)], ids=["between", "last"])
def test_an_evaluation_that_raises_loses_no_step(last: bool, life: Lives, tmp_path: Path) -> None:
    """The steps before it are committed; with the code mended, the same command is the undisturbed run."""
    broken = tmp_path / "broken"
    more = ("trainer.evaluate_every_steps=7", "task._target_=mine.tasks.Mended", f"+task.broken={broken}", CALLBACK)
    command = (*ROWS, *more, f"trainer.max_steps={7 if last else 12}", f"run.root={tmp_path}")
    command = (*command, "model._target_=mine.odd.Centres")
    assert life(*command, "run.name=whole", cwd=USER).status == 0
    broken.touch()
    for _ in range(2):
        ended = life(*command, "run.name=cut", cwd=USER)
        assert ended.status == 1
        assert "NameError: name 'undefined' is not defined" in ended.output
        assert "in evaluation_step" in ended.output
        assert "Step 7 is committed without the evaluation" in ended.output, ended.output
    broken.unlink()
    assert life(*command, "run.name=cut", cwd=USER).status == 0
    require_same(tmp_path / "rows")


@pytest.mark.parametrize("rank", [slow(""), "1"], ids=["all", "one"])
def test_a_failed_evaluation_of_processes_loses_no_step(rank: str, crew: Crews, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    more = ("trainer.evaluate_every_steps=7", "task._target_=mine.tasks.Mended", f"+task.broken={broken}", CALLBACK)
    command = (*ROWS, *more, "trainer.max_steps=12", f"run.root={tmp_path}", "model._target_=mine.odd.Centres")
    command = (*command, "data.evaluation_batch_size=4", "runtime.check_batches=0")
    ended = crew(2, *command, "run.name=whole", cwd=USER)
    assert ended.statuses == [0, 0], ended.output
    broken.write_text(rank)
    ended = crew(2, *command, "run.name=cut", cwd=USER)
    assert ended.statuses == [1, 1]
    assert ended.output.count("in evaluation_step") == 1, ended.output
    assert "Step 7 is committed without the evaluation" in ended.output, ended.output
    broken.unlink()
    ended = crew(2, *command, "run.name=cut", cwd=USER)
    assert ended.statuses == [0, 0]
    assert "resumed from step 7 " in ended.output, ended.output
    require_same(tmp_path / "rows")


def test_a_wrong_name_of_the_objective_loses_no_step(life: Lives, tmp_path: Path) -> None:
    command = (*ROWS, f"run.root={tmp_path}", "run.name=r", "runtime.check_batches=0")
    ended = life(*command, "objective.metric=val/acc", cwd=USER)
    assert ended.status == 2
    assert "objective.metric=val/acc is not among the metrics of the evaluation: val/accuracy, val/loss" in ended.output
    assert "Step 4 is committed" in ended.output
    assert "Traceback" not in ended.output
    ended = life(*command, "run.on_drift=accept", cwd=USER)
    assert (ended.status, "resumed from step 4 " in ended.output) == (0, True), ended.output


def test_training_ends_when_the_objective_reaches_a_target(life: Lives, tmp_path: Path) -> None:
    """Also when it was killed after the last step."""
    every = ("trainer.max_steps=20", "trainer.evaluate_every_steps=5", "objective={metric:val/loss,mode:min}")
    command = ("experiment=smoke", *every, f"run.root={tmp_path}")
    assert life(*command, "run.name=whole").status == 0
    values = {line["step"]: line["val/loss"] for line in metric_lines(tmp_path / "smoke/whole") if "val/loss" in line}
    assert values[5] > values[10]
    target = f"trainer.early_stopping.target={values[10]!r}"
    assert life(*command, target, "run.name=cut", call=LAST).status is None
    assert "finished step 10 (early_stopping)" in life(*command, target, "run.name=cut").output

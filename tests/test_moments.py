"""The moments of callbacks and observers: their order, what they may change, and what an exception does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from crews import Crews
from lives import Ended, Lives
from marks import slow
from results import metric_lines

from runner.callbacks.base import Callback, Loop, Observer, methods_for, notify, observed_by, observers
from runner.checkpoint.manifest import commits
from runner.storage import LocalLocation

USER = Path(__file__).parent / "user"
Run = Callable[..., Ended]


@pytest.fixture
def run(life: Lives, tmp_path: Path) -> Run:
    def run(*words: str, name: str = "run", step: int | None = None) -> Ended:
        fixed = ("trainer.max_steps=4", "trainer.evaluate_every_steps=2", "checkpoint.every_steps=2")
        command = ("experiment=smoke", *fixed, f"run.root={tmp_path}", f"run.name={name}", "runtime.num_threads=1")
        return life(*command, *words, cwd=USER, step=step)

    return run


def moments(ended: Ended) -> str:
    """The moments that ``mine.callbacks.Tells`` printed."""
    return " ".join(line.partition(" ")[2] for line in ended.output.splitlines() if line.startswith("moment "))


STEP = "step_start batch gradients update"
TELLS = "+callbacks.tells._target_=mine.callbacks.Tells"


def test_moments_come_in_order(run: Run) -> None:
    plain, evaluated = f"{STEP} step", f"{STEP} evaluation step save commit"
    assert moments(run(TELLS)) == f"build resume start {plain} {evaluated} {plain} {evaluated} end finish"


def test_moments_of_a_resumed_attempt(run: Run) -> None:
    assert run(TELLS, step=4).status is None
    again = f"{STEP} step {STEP} evaluation step save commit"
    assert moments(run(TELLS)) == f"build resume start {again} end finish"


def test_an_error_is_told(run: Run) -> None:
    ended = run(TELLS, "+callbacks.tells.fails=gradients")
    assert ended.status not in (0, None)
    assert moments(ended) == "build resume start step_start batch error"
    assert "RuntimeError: as asked" in ended.output


def test_gradients_and_batches_may_be_changed(run: Run, tmp_path: Path) -> None:
    nothing = ("+callbacks.none._target_=mine.callbacks.Nothing", "optimizer.weight_decay=0", "model.dropout=0")
    assert run(*nothing, "metrics.every_steps=1").status == 0
    losses = [line["train/loss"] for line in metric_lines(tmp_path / "smoke/run")]
    assert losses == [losses[0]] * 4, "one batch, and gradients of zero"


def test_a_requested_save_is_committed_at_once(run: Run, tmp_path: Path) -> None:
    never = ("checkpoint.every_steps=null", "trainer.evaluate_every_steps=null", "checkpoint.background=true")
    assert run(*never, "+callbacks.saves._target_=mine.callbacks.Saves", step=4).status is None
    assert [commit.step for commit in commits(LocalLocation(tmp_path / "smoke/run"))] == [3]


MIRROR = "+callbacks.mirror={_target_: mine.callbacks.FailsToMirror, step: 2}"


def test_an_error_after_a_commit_ends_training_and_keeps_it(run: Run, tmp_path: Path) -> None:
    ended = run(MIRROR)
    assert (ended.status, "the mirror is full" in ended.output, "could not be written" in ended.output) == (
        1,
        True,
        False,
    )
    assert 2 in [commit.step for commit in commits(LocalLocation(tmp_path / "smoke/run"))]
    ended = run(MIRROR)
    assert (ended.status, "resumed from step" in ended.output) == (0, True), ended.output


@pytest.mark.parametrize("moment", ["on_commit", slow("on_step"), slow("on_save")])
def test_sys_exit_in_a_moment_is_an_error(moment: str, run: Run) -> None:
    ended = run("+callbacks.exits._target_=mine.callbacks.Exits", f"+callbacks.exits.at={moment}")
    assert (ended.status, "sys.exit('enough') was called in the run" in ended.output) == (1, True), ended.output


@pytest.mark.parametrize("code", [0, 75])
def test_an_exit_without_cleanup_is_no_success(code: int, run: Run) -> None:
    ended = run(f"+callbacks.exits={{_target_: mine.callbacks.Exits, at: on_step, code: {code}}}")
    assert (ended.status, f"os._exit({code}) was called in the run, by " in ended.output) == (1, True)


def test_a_callbacks_metric_may_be_a_number(run: Run, tmp_path: Path) -> None:
    ended = run("+callbacks.measures._target_=mine.callbacks.Measures", "metrics.every_steps=1")
    assert ended.status == 0, ended.output
    assert {line["train/mine"] for line in metric_lines(tmp_path / "smoke/run") if "train/mine" in line} == {0.5}


def test_a_callbacks_metric_that_is_no_number_is_named(run: Run) -> None:
    ended = run("+callbacks.measures={_target_: mine.callbacks.Measures, shape: [3]}")
    message = "returned 'mine' as a tensor of shape [3]; expected"
    assert (ended.status, message in ended.output) == (1, True), ended.output


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_an_error_after_a_commit_on_one_rank_ends_all(rank: int, crew: Crews, tmp_path: Path) -> None:
    mirror = f"+callbacks.mirror={{_target_: mine.callbacks.FailsToMirror, step: 2, rank: {rank}}}"
    command = ("experiment=smoke", "trainer.max_steps=40", "checkpoint.every_steps=2", "runtime.parallel=ddp")
    ended = crew(2, *command, f"run.root={tmp_path}", "run.name=r", mirror, cwd=USER)
    assert ended.statuses == [1, 1], ended.output
    assert ended.output.count("the mirror is full") == 1


def test_an_error_in_on_error_does_not_hide_the_cause(run: Run) -> None:
    ended = run("+callbacks.bad._target_=mine.callbacks.FailsTwice")
    assert (ended.status, "RuntimeError: the cause" in ended.output) == (1, True), ended.output
    assert "a callback failed in on_error" in ended.output


def test_a_method_set_on_the_instance_is_called() -> None:
    callback = Callback()
    callback.on_step = print  # type: ignore[method-assign]
    assert methods_for([callback], "on_step") == [print]


def test_only_overridden_moments_are_called() -> None:
    class Steps(Callback):
        def on_step(self, loop: Loop) -> None:
            raise RuntimeError

    steps = Steps()
    assert methods_for([Callback(), steps, Observer()], "on_step") == [steps.on_step]
    assert methods_for([Callback(), steps, Observer()], "on_batch") == []
    notify([Callback()], "on_step", None)


def test_an_observer_is_registered_for_a_block() -> None:
    observer = Observer()
    with observed_by(observer):
        assert observers == [observer]
    assert observers == []

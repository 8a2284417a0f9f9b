"""A user's own callbacks: named in the configuration, part of the state, able to end training."""

import sys
from pathlib import Path

import pytest
from lives import Lives
from results import metric_lines, results

from runner.callbacks.reporting import ShowProgress

USER = Path(__file__).parent / "user"
COMMAND = (
    "experiment=smoke",
    "+callbacks.plateau={_target_: mine.callbacks.Plateau, most: 3}",
    "trainer.max_steps=200",
    "trainer.evaluate_every_steps=2",
    "optimizer.lr=0.3",  # evaluations get worse now and then
    "checkpoint.every_steps=3",
    "metrics.every_steps=1",
    "runtime.num_threads=1",
)


def test_a_callback_keeps_its_state_through_kills(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}")
    whole = life(*command, "run.name=whole", cwd=USER)
    assert "(plateau)" in whole.output, whole.output
    last = results(tmp_path / "smoke/whole").result["step"]
    for step in (4, last - 1, last):
        assert life(*command, "run.name=cut", cwd=USER, step=step).status is None
    assert life(*command, "run.name=cut", cwd=USER).status == 0
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))
    assert results(tmp_path / "smoke/cut").parts["callback.own.plateau"]["bad"] == 3
    bad = [line["train/bad"] for line in metric_lines(tmp_path / "smoke/cut")]
    assert bad == sorted(bad)
    assert bad[-1] == 3


def test_a_callback_is_part_of_what_is_computed(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, cwd=USER, step=3).status is None
    other = life(*command, "callbacks.plateau.most=4", cwd=USER)
    assert (other.status, "callbacks.plateau.most" in other.output) == (3, True), other.output


def test_an_object_that_is_no_callback_is_refused(life: Lives, tmp_path: Path) -> None:
    command = ("experiment=smoke", "+callbacks.mine._target_=mine.callbacks.Recorder", f"run.root={tmp_path}")
    ended = life(*command, cwd=USER)
    assert ended.status == 2
    assert "callbacks.mine is a mine.callbacks.Recorder" in ended.output
    assert "runner.callbacks.base.Callback" in ended.output
    ended = life("experiment=smoke", "+callbacks.mine=3", f"run.root={tmp_path}", cwd=USER)
    assert (ended.status, "callbacks.mine needs a _target_" in ended.output) == (2, True)


def test_progress_is_no_reason_to_need_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no ``sys.stderr`` where it was closed: by ``2>&-``, or by a service manager."""
    monkeypatch.setattr(sys, "stderr", None)
    ShowProgress()

"""``run.dry`` tries everything and keeps nothing; ``data.overfit`` trains and evaluates on the first samples."""

import re
from pathlib import Path

import pytest
from crews import Crews
from lives import USER, Lives

from runner.data.mixture import head

SMOKE = ("experiment=smoke", "runtime.device=cpu")


def folder_of(output: str) -> Path:
    match = re.search(r"run      (\S+runner-dry-[^/]+)/smoke/dry", output)
    assert match, output
    return Path(match[1])


def test_a_dry_run_reports_and_keeps_nothing(life: Lives, tmp_path: Path) -> None:
    ended = life(*SMOKE, "run.dry=true", f"run.root={tmp_path}/runs", cwd=tmp_path)
    assert ended.status == 0, ended.output
    for line in (
        "attempt  2, resumed from step 2 of attempt 1",
        r"batch    \[0\] float32 \[64, 1, 8, 8\] from 0 to 1; \[1\] int64 \[64\] from 0 to 9",
        "model    4,810 parameters, of which 4,810 are trained",
        r"time     \S+ s per step, of which \S+ s waiting for data",
        r"memory   [\d,]+ MiB of the process at most",
        r"saved    [1-9][\d,]+ bytes per checkpoint",
        r"metrics  val/loss \S+, val/accuracy \S+ ",
        "dry      2 steps, a save, a resume and an evaluation worked; nothing is kept",
    ):
        assert re.search(line, ended.output), (line, ended.output)
    assert [*tmp_path.iterdir()] == []
    assert not folder_of(ended.output).exists()


def test_a_dry_run_leaves_the_run_as_it_is(life: Lives, tmp_path: Path) -> None:
    """Beside a run of the same command, which it neither resumes nor changes."""
    command = (*SMOKE, "trainer.max_steps=4", f"run.root={tmp_path}")
    assert life(*command).status == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ended = life(*command, "run.dry=true")
    assert "attempt  1, from scratch" in ended.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_several_processes_can_try_together(crew: Crews, tmp_path: Path) -> None:
    ended = crew(2, *SMOKE, "run.dry=true", f"run.root={tmp_path}/runs", cwd=tmp_path)
    assert ended.statuses == [0, 0], ended.output
    assert ended.output.count("attempt  2, resumed from step 2 of attempt 1") == 1
    assert ended.output.count("nothing is kept") == 1
    assert not (tmp_path / "runs").exists()
    assert not folder_of(ended.output).exists()


@pytest.mark.parametrize(
    ("command", "words", "status"),
    [
        (("-m", "seed=1,2"), "run.dry=true tries a single run: leave -m out", 2),
        (("task._target_=mine.tasks.Fails", "~task.label_smoothing", "+task.step=2"), "Error", 1),
        (("data.train._target_=mine.data.Nothing",), "data.train._target_", 2),
    ],
)
def test_a_dry_run_fails_as_the_run_would(
    life: Lives, tmp_path: Path, command: tuple[str, ...], words: str, status: int
) -> None:
    first = [word for word in command if word == "-m"]
    ended = life(*first, *SMOKE, *command[len(first) :], "run.dry=true", f"run.root={tmp_path}/runs", cwd=USER)
    assert ended.status == status, ended.output
    assert words in ended.output
    assert not (tmp_path / "runs").exists()
    if "runner-dry-" in ended.output:
        assert not folder_of(ended.output).exists()


def test_overfit_trains_and_evaluates_on_the_first(life: Lives, tmp_path: Path) -> None:
    command = (*SMOKE, "data.overfit=64", "trainer.max_steps=300", "optimizer.lr=0.01", "model.dropout=0")
    ended = life(*command, "trainer.evaluate_every_steps=300", f"run.root={tmp_path}", "run.name=r")
    assert ended.status == 0, ended.output
    assert "data     64 samples, 64 per step" in ended.output
    accuracy = re.search(r"finished step 300 .*val/accuracy (\S+)", ended.output)
    assert accuracy, ended.output
    assert float(accuracy[1]) > 0.9, ended.output
    others = [word for word in command if not word.startswith("data.overfit")]
    drift = life(*others, "trainer.evaluate_every_steps=300", f"run.root={tmp_path}", "run.name=r")
    assert (drift.status, "data.overfit" in drift.output) == (3, True)


def test_the_first_samples_of_a_data_set() -> None:
    class Sentences(list[str]):
        lengths = (3, 1, 2)
        counts = (2, 1)

    two = head(Sentences(["aaa", "b", "cc"]), 2)
    assert (len(two), [*two.lengths], two[1], hasattr(two, "counts")) == (2, [3, 1], "b", False)
    assert len(head(["a"], 5)) == 1

"""``python -m runner.runs prune`` and ``export``: checkpoints thinned out, weights taken, by real runs."""

import json
import shutil
from pathlib import Path

import pytest
from lives import Lives
from waiting import until

from runner.runs.__main__ import main

COMMAND = ("experiment=smoke", "trainer.max_steps=60", "checkpoint.every_steps=10", "runtime.num_threads=1")
KEEP = ("checkpoint.keep_last=9", "trainer.evaluate_every_steps=10")


@pytest.fixture(scope="module")
def whole(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with averaged weights and all its six checkpoints."""
    root = tmp_path_factory.mktemp("root")
    assert life(*COMMAND, *KEEP, "trainer.ema_decay=0.9", f"run.root={root}", "run.name=r").status == 0
    return root / "smoke/r"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "smoke/r"))


def steps(run: Path) -> list[int]:
    found = sorted(int(path.name[9:18]) for path in (run / "commits").iterdir())
    assert len(found) == len([*(run / "data").iterdir()])
    return found


def best(run: Path) -> int:
    return int(json.loads((run / "result.json").read_text())["objective"]["step"])


def flip(run: Path, step: int) -> None:
    """Damage every tensor of a step."""
    (path,) = (run / "data").glob(f"s{step:09d}-*")
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def test_prune_first_shows_its_plan(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = steps(run)
    assert main(["prune", str(run), "--every-steps", "20"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("a0")}
    assert rows["60"].endswith("newest")
    assert "True" in rows["40"]
    assert ("False" in rows["10"]) == (best(run) != 10)
    assert "Nothing was changed. --yes would remove" in text
    assert steps(run) == before


def test_prune_removes_the_planned_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(run), "--json"]) == 0
    said = sorted(row["step"] for row in json.loads(capsys.readouterr().out) if row["keep"])
    assert main(["prune", str(run), "--yes"]) == 0
    assert steps(run) == said == sorted({best(run), 50, 60})
    assert main(["prune", str(run), "--yes"]) == 0
    assert "Removed 0 of" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [(60,), (50,), (60, 50)])
def test_prune_reads_two_before_it_removes_any(damaged: tuple[int, ...], run: Path) -> None:
    for step in damaged:
        flip(run, step)
    assert main(["prune", str(run), "--yes", "--best", "0"]) == 0
    good = [step for step in (10, 20, 30, 40, 50, 60) if step not in damaged]
    assert {*good[-2:]} <= {*steps(run)}
    assert steps(run)[0] == good[-2], "and those that are newer stay, damaged or not"


def test_prune_with_one_good_checkpoint_left_removes_nothing(run: Path) -> None:
    for step in (10, 20, 40, 50, 60):
        flip(run, step)
    before = steps(run)
    assert main(["prune", str(run), "--yes"]) == 0
    assert steps(run) == before


def test_prune_refuses_a_run_that_lives_and_fewer_than_two(
    run: Path, life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(run), "--last", "1"]) == 2
    assert "--last 1 is too small: at least 2" in capsys.readouterr().err
    with life.start(*COMMAND, "trainer.max_steps=100000", f"run.root={tmp_path}", "run.name=live") as live:
        until(lambda: [*tmp_path.glob("smoke/live/commits/*")])
        assert main(["prune", str(tmp_path / "smoke/live"), "--yes"]) == 4
        told = capsys.readouterr().err
        assert f"is in use by attempt 1 (pid {live.pid}" in told
        assert "run.on_conflict" not in told, "which this command does not have"


def test_export_writes_the_same_file_as_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Averaged weights, byte for byte, of the newest and of the best."""
    target = tmp_path / "Weights.safetensors"
    assert main(["export", str(run), str(target)]) == 0
    assert target.read_bytes() == (run / "model.safetensors").read_bytes()
    assert json.loads((run / "result.json").read_text())["sha256"]["model.safetensors"] in capsys.readouterr().out
    assert main(["export", f"{run}@best", str(target)]) == 2
    assert "exists already; overwrite it with --force" in capsys.readouterr().err
    assert main(["export", f"{run}@best", f"file://{target}", "--force", "--json"]) == 0
    assert target.read_bytes() == (run / "best.safetensors").read_bytes()
    assert json.loads(capsys.readouterr().out)["step"] == best(run)


def test_export_takes_the_newest_good_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 60)
    target = str(tmp_path / "w")
    assert main(["export", str(run), target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 50
    assert main(["export", f"{run}@60", target, "--force"]) == 5
    assert "step 60 of attempt 1: data/" in capsys.readouterr().err
    assert main(["export", f"{run}@55", target, "--force"]) == 2
    assert "has no checkpoint of step 55; it has checkpoints of steps 10, 20, 30, 40, 50, 60" in capsys.readouterr().err


def test_a_damaged_best_checkpoint_is_reported_with_its_damage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest in (run / "commits").iterdir():
        manifest.write_bytes(manifest.read_bytes()[:-1])
    assert main(["export", f"{run}@best", str(tmp_path / "w")]) == 5
    assert "step 60 of attempt 1: commits/" in capsys.readouterr().err


def test_the_best_of_a_run_without_objective_is_reported(
    life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("trainer.max_steps=5", "objective.metric=null", f"run.root={tmp_path}", "run.name=r")
    assert life("experiment=smoke", *few).status == 0
    assert main(["export", f"{tmp_path}/smoke/r@best", str(tmp_path / "w")]) == 2
    assert "has no checkpoint with an objective" in capsys.readouterr().err


def test_the_best_few_are_kept_while_training(life: Lives, tmp_path: Path) -> None:
    """By the largest loss the first evaluations are the best."""
    goal = ("objective.metric=val/loss", "objective.mode=max", "trainer.evaluate_every_steps=5")
    more = ("checkpoint.keep_best=3", "checkpoint.keep_every_steps=20", "checkpoint.every_steps=null")
    command = (*COMMAND, *goal, *more, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, step=33).status is None
    assert life(*command).status == 0
    assert steps(tmp_path / "smoke/r") == [5, 10, 15, 20, 40, 60]

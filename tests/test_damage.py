"""Damaged, foreign and newer run directories: detected, reported, and left as they are."""

import json
import shutil
from pathlib import Path

import pytest
from lives import Lives
from marks import slow
from results import results

from runner.run.directory import RunDirectory
from runner.storage.local import LocalLocation
from runner.storage.location import Entry

COMMAND = ("experiment=smoke", "checkpoint.every_steps=10", "runtime.num_threads=1")


@pytest.fixture(scope="module")
def cut(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 35, with checkpoints of steps 20 and 30."""
    root = tmp_path_factory.mktemp("cut")
    assert life(*COMMAND, f"run.root={root}", "objective.metric=null", "run.name=r", step=35).status is None
    return root / "smoke/r"


@pytest.fixture
def run(cut: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(cut, tmp_path / "smoke/r"))


def resume(life: Lives, run: Path, *more: str):
    return life(*COMMAND, f"run.root={run.parent.parent}", "objective.metric=null", "run.name=r", *more)


def flip(path: Path, offset: int = -100) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def snapshot(run: Path) -> dict[str, bytes]:
    """All stored checkpoints."""
    return {path.name: path.read_bytes() for folder in ("commits", "data") for path in (run / folder).iterdir()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, slow(truncate), slow(Path.unlink)], ids=["flipped", "truncated", "deleted"])
@pytest.mark.parametrize("folder", ["data", "commits"])
def test_a_damaged_newest_checkpoint_costs_steps_and_says_so(damage, folder: str, run: Path, life: Lives) -> None:
    whole = life(*COMMAND, f"run.root={run.parent.parent}", "objective.metric=null", "run.name=whole")
    assert whole.status == 0
    (newest,) = (path for path in (run / folder).iterdir() if "s000000030" in path.name)
    damage(newest)
    ended = resume(life, run)
    assert ended.status == 0
    assert "resumed from step 20 of attempt 1" in ended.output
    assert "attempt 1 was killed at step 3" in ended.output
    assert "steps are repeated" in ended.output
    if (folder, damage) != ("commits", Path.unlink):  # of a deleted manifest nothing is left to tell
        assert "unused   step 30 of attempt 1" in ended.output
    assert not results(run).differences(results(run.parent / "whole"))


@pytest.mark.parametrize("folder", ["data", "commits"])
def test_without_a_good_checkpoint_nothing_is_deleted(folder: str, run: Path, life: Lives) -> None:
    for path in (run / folder).iterdir():
        flip(path)
    before = snapshot(run)
    ended = resume(life, run)
    assert ended.status == 5, ended.output
    assert "no checkpoint that can be loaded, although one was committed" in ended.output
    assert "Nothing was deleted" in ended.output
    assert snapshot(run) == before
    assert not (run / "result.json").exists()


def test_an_emptied_commits_folder_is_not_a_fresh_start(run: Path, life: Lives) -> None:
    shutil.rmtree(run / "commits")
    ended = resume(life, run)
    assert (ended.status, "commits/ is empty" in ended.output) == (5, True), ended.output


def test_a_newer_format_is_refused(run: Path, life: Lives) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"format": 2}))
    ended = resume(life, run)
    assert ended.status == 2
    assert "has format 2, this version reads 1. Use the version of hydra-runner that wrote it" in ended.output


def test_a_directory_of_something_else_is_left_alone(life: Lives, tmp_path: Path) -> None:
    other = tmp_path / "smoke/r/thesis.tex"
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    ended = resume(life, other.parent)
    assert ended.status == 2
    assert "is not a run directory: it has no run.json but holds thesis.tex" in ended.output
    assert other.read_text() == "precious"


def test_a_torn_run_record_is_an_error_not_a_fresh_start(run: Path, life: Lives) -> None:
    truncated = (run / "run.json").read_bytes()[:20]
    (run / "run.json").write_bytes(truncated)
    ended = resume(life, run)
    assert (ended.status, "run.json is not JSON" in ended.output) == (1, True), ended.output


def test_texts_of_a_run_directory_are_shown_escaped(run: Path, life: Lives) -> None:
    text = (run / "config.yaml").read_text().replace("seed: 0", 'seed: "\\e[31mred"')
    (run / "config.yaml").write_text(text)
    ended = resume(life, run)
    assert ended.status == 3
    assert "\x1b" not in ended.output
    assert "[31mred" in ended.output


def test_a_run_begun_meanwhile_is_no_foreign_directory(tmp_path: Path) -> None:
    class Between(LocalLocation):
        def list(self, folder: str) -> list[Entry]:
            RunDirectory.under(str(tmp_path), "smoke", "r").create({"seed": 0}, parent=None)
            return super().list(folder)

    record = RunDirectory(str(tmp_path), "smoke", "r", Between(tmp_path / "smoke/r")).record()
    assert record is not None
    assert record["variant"] == "r"

"""A user's own metric writers: named in the configuration, resumed by their marks, named in errors."""

import csv
from pathlib import Path

import pytest
from lives import Lives
from marks import slow
from results import losses, results

from runner.checkpoint.manifest import commits
from runner.checkpoint.store import CheckpointStore
from runner.metrics.writer import MetricWriters
from runner.storage.local import LocalLocation

USER = Path(__file__).parent / "user"
COMMON = ("experiment=smoke", "trainer.max_steps=24", "metrics.every_steps=2", "checkpoint.every_steps=5")
CSV = "+metrics.writers.csv={_target_: mine.writers.CSVWriter}"


def table(folder: Path) -> list[tuple[int, float]]:
    with (folder / "losses.csv").open(newline="") as file:
        return [(int(step), float(loss)) for step, loss in csv.reader(file)]


def test_a_writer_that_cuts_at_its_mark_has_every_step_once(life: Lives, tmp_path: Path) -> None:
    command = (*COMMON, CSV, f"run.root={tmp_path}")
    assert life(*command, "run.name=whole", cwd=USER).status == 0
    for step in (3, 9, 17):
        assert life(*command, "run.name=cut", cwd=USER, step=step).status is None
    assert life(*command, "run.name=cut", cwd=USER).status == 0
    whole, cut = tmp_path / "smoke/whole", tmp_path / "smoke/cut"
    assert not results(cut).differences(results(whole))
    assert table(cut) == table(whole) == losses(whole)
    assert [step for step, _ in table(cut)] == [*range(2, 25, 2)]


def test_writers_are_not_part_of_what_is_computed(life: Lives, tmp_path: Path) -> None:
    """A run may gain and lose writers; one that is put back continues from its last mark."""
    command = (*COMMON, f"run.root={tmp_path}", "run.name=r")
    run = tmp_path / "smoke/r"
    assert life(*command, "metrics.writers.tensorboard=null", CSV, cwd=USER, step=6).status is None
    assert not (run / "tensorboard").exists()
    assert life(*command, "metrics.writers.lines=null", cwd=USER, step=12).status is None
    without = life(*command, CSV, "metrics.writers.tensorboard=null", cwd=USER)
    assert without.status == 0, without.output
    assert "tensorboard --logdir" not in without.output
    expected = [2, 4, 12, 14, 16, 18, 20, 22, 24]
    assert [step for step, _ in losses(run)] == [step for step, _ in table(run)] == expected
    location = LocalLocation(run)
    facts = CheckpointStore(location).open(commits(location)[0]).facts
    assert facts["metrics"]["segment"] == "s000000010-a000003.jsonl"
    assert facts["writers"] == {"csv": {"bytes": (run / "losses.csv").stat().st_size}}


WRONG = {
    "no such module": ("nowhere.Writer", "metrics.writers.w._target_: Error loading 'nowhere.Writer'"),
    "another class": ("mine.writers.NoWriter", "w is a mine.writers.NoWriter; expected an object of a subclass of "),
    "an argument": ("mine.writers.CSVWriter,nam: x", "unexpected keyword argument 'nam'"),
    "its constructor": ("mine.writers.refused,token: x", "PermissionError: no account for smoke/"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_writer_that_cannot_be_used_is_refused(name: str, life: Lives, tmp_path: Path) -> None:
    target, message = WRONG[name]
    ended = life(*COMMON, f"+metrics.writers.w={{_target_: {target}}}", f"run.root={tmp_path}", cwd=USER)
    assert (ended.status, message in ended.output, "metrics.writers.w" in ended.output) == (2, True, True), ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("method", ["add", slow("mark"), slow("flush")])
def test_an_error_of_a_writer_names_it(method: str, life: Lives, tmp_path: Path) -> None:
    target = f"+metrics.writers.w={{_target_: mine.writers.FailingWriter, method: {method}, error: KeyError}}"
    command = (*COMMON, f"run.root={tmp_path}", "run.name=r")
    ended = life(*command, target, cwd=USER)
    assert ended.status == 1
    assert f"metrics.writers.w failed in {method}(): KeyError: 'the server went away'" in ended.output
    assert 'raise self.error("the server went away")' in ended.output
    assert life(*command).status == 0
    assert [step for step, _ in losses(tmp_path / "smoke/r")] == [*range(2, 25, 2)]


def test_a_flush_that_fails_for_a_while_costs_nothing(life: Lives, tmp_path: Path) -> None:
    target = "+metrics.writers.w={_target_: mine.writers.FailingWriter, method: flush, error: OSError}"
    ended = life(*COMMON, target, f"run.root={tmp_path}", "run.name=r", cwd=USER)
    assert ended.status == 0, ended.output
    assert "could not be written: metrics.writers.w: OSError: the server went away. It is tried again" in ended.output


def test_a_mark_that_is_no_mapping_names_the_writer(life: Lives, tmp_path: Path) -> None:
    target = "+metrics.writers.w={_target_: mine.writers.ListedMarks}"
    ended = life(*COMMON, target, f"run.root={tmp_path}", cwd=USER)
    assert (ended.status, "metrics.writers.w failed in mark(): TypeError" in ended.output) == (1, True), ended.output


def test_the_group_keeps_marks_of_absent_writers() -> None:
    group = MetricWriters(marks={"gone": {"at": 3}, "empty": {}})
    assert group.mark(7) == {"metrics": {}, "writers": {"gone": {"at": 3}}}

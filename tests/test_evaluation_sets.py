"""Metrics that are no means, named sets, test data, folds, and the batches that are evaluated before training."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import Crews
from lives import Lives
from marks import slow
from results import results
from torch import nn

from runner.datasets.folds import Fold
from runner.errors import ConfigError
from runner.evaluation import copy_of
from runner.task import Task

USER = Path(__file__).parent / "user"
SCORES = (
    "--config-dir",
    f"{USER}/conf",
    "experiment=rows",
    "data.batch_size=12",
    "trainer.max_steps=4",
    "data.evaluation_batch_size=8",  # four batches
    "optimizer.lr=0.1",
    "runtime.audit=false",
)
SETS = ("--config-dir", f"{USER}/conf", "experiment=sets")


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())["metrics"]


@pytest.mark.parametrize("size", [slow(2), 3])
def test_rows_and_torchmetrics_are_those_of_one_process(size: int, life: Lives, crew: Crews, tmp_path: Path) -> None:
    """Neither the second batch of a process nor one that only fills up the last round is missed or counted twice."""
    pytest.importorskip("torchmetrics")
    command = (*SCORES, "task._target_=mine.scores.Scores", f"run.root={tmp_path}", "trainer.max_steps=1")
    assert life(*command, "run.name=one", cwd=USER).status == 0
    ended = crew(size, *command, "run.name=many", f"runtime.num_workers={size - 2}", cwd=USER)
    assert not any(ended.statuses), ended.output
    one, many = (metrics(tmp_path / "rows" / name) for name in ("one", "many"))
    assert one["val/f1"] == pytest.approx(one["val/theirs"])
    assert (one["val/samples"], one["val/sizes"], one["val/last"]) == (30, 30, 6)
    exact = ("f1", "theirs", "order", "samples", "sizes", "last")
    assert {name: many[f"val/{name}"] for name in exact} == {name: one[f"val/{name}"] for name in exact}


@pytest.mark.parametrize(("task", "times"), [("Scores", 0), ("Kept", 1)])
def test_a_metric_that_is_not_reset_is_warned_of(task: str, times: int, life: Lives, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    often = ("trainer.evaluate_every_steps=2", f"run.root={tmp_path}")
    ended = life(*SCORES, f"task._target_=mine.scores.{task}", *often, cwd=USER)
    assert ended.status == 0, ended.output
    assert ended.output.count("task.f1 keeps the values of this evaluation") == times, ended.output


def test_lists_of_a_process_without_a_batch_have_a_type(life: Lives, crew: Crews, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    one_batch = (
        "task._target_=mine.scores.Ranked",
        "model.dropout=0.0",
        "data.evaluation_batch_size=64",
        "trainer.max_steps=1",
    )
    command = (*SCORES, *one_batch, f"run.root={tmp_path}")
    assert life(*command, "run.name=one", cwd=USER).status == 0
    ended = crew(2, *command, "run.name=many", cwd=USER)
    assert not any(ended.statuses), ended.output
    one, many = (metrics(tmp_path / "rows" / name) for name in ("one", "many"))
    assert many["val/area"] == pytest.approx(one["val/area"])


@pytest.mark.parametrize(
    ("task", "messages"),
    [
        ("Ragged", ["returned 'rows' as [*, 6] torch.float32 and [*, 8] torch.float32 in different batches"]),
        ("Raw", ["Raw.evaluation_end returned 'inputs' as a tensor of shape [30, 8]; expected a dict of numbers"]),
    ],
)
def test_rows_that_cannot_be_reported(task: str, messages: list[str], life: Lives, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    command = (*SCORES, f"task._target_=mine.scores.{task}", f"run.root={tmp_path}", "run.name=r")
    ended = life(*command, "runtime.check_batches=4", cwd=USER)
    assert ended.status == 1
    assert all(message in ended.output for message in messages), ended.output
    assert "Traceback" not in ended.output


def test_batches_before_the_first_step_leave_no_trace(life: Lives, tmp_path: Path) -> None:
    """Of a task with a memory that evaluates in training mode and moves weights, beside a model that takes means."""
    wakes = ("task._target_=mine.tasks.Wakes", "~task.during", "~task.number", "task.call=-1", "+task.pushes=true")
    for more in ((), wakes):
        for name, batches in (("with", 2), ("without", 0)):
            command = (*SETS, *more, f"run.root={tmp_path}", f"run.name={name}{len(more)}")
            ended = life(*command, f"runtime.check_batches={batches}", cwd=USER)
            assert ended.status == 0, ended.output
        found, expected = (results(tmp_path / f"sets/{name}{len(more)}") for name in ("with", "without"))
        assert not found.differences(expected)


@pytest.mark.parametrize(
    ("mistake", "status", "messages"),
    [
        (
            "objective.metric=val/acc",
            2,
            ["objective.metric=val/acc is not among the metrics of the evaluation: val/fold"],
        ),
        ("data.evaluation_collate={_target_: json.dumps}", 1, ["data.validation.fold: the 10 samples", "TypeError"]),
        ("task._target_=mine.tasks.Misspelt", 1, ["NameError", "in evaluation_step", "the first 2 batches"]),
    ],
    ids=["objective", "collate", "task"],
)
def test_an_evaluation_shows_its_mistake_before_training(
    mistake: str, status: int, messages: list[str], life: Lives, tmp_path: Path
) -> None:
    """The corrected command continues with the run."""
    command = (*SETS, f"run.root={tmp_path}", "run.name=r")
    ended = life(*command, mistake, cwd=USER)
    assert ended.status == status, ended.output
    assert all(message in ended.output for message in messages), ended.output
    assert "step 3" not in ended.output
    assert life(*command, cwd=USER).status == 0


class Judge(Task):
    """Has a frozen model, a memory, and maybe what cannot be copied."""

    def __init__(self, *, lock: bool = False) -> None:
        self.model, self.seen, self.lock = nn.BatchNorm1d(2), [0], threading.Lock() if lock else None

    def training_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {}


def test_a_copy_of_a_task_shares_weights_and_has_its_own_memory() -> None:
    task, model = Judge(), nn.Linear(1, 1)
    task.trained = model  # type: ignore[attr-defined]
    weights = [*model.parameters(), *task.model.parameters()]
    copy: Any = copy_of(task, [model, *weights])
    copy.seen.append(1)
    copy.model.running_mean += 1
    assert task.seen == [0]
    assert task.model.running_mean.sum() == 0
    assert copy.trained is model
    assert all(mine is theirs for mine, theirs in zip(copy.model.parameters(), task.model.parameters(), strict=True))
    assert copy_of(Judge(lock=True), []) is None


@pytest.mark.parametrize("call", [25, slow(26)], ids=["first", "second"])
def test_test_data_is_evaluated_once_with_the_best_weights(call: int, life: Lives, tmp_path: Path) -> None:
    """Also after a kill in one of its batches; and it has no part in training."""
    command = (*SETS, f"run.root={tmp_path}")
    assert life(*command, "run.name=whole", cwd=USER).status == 0
    dies = ("task.during=evaluation", f"task.call={call}", "task.number=9")
    assert life(*command, *dies, "run.name=cut", cwd=USER).status is None
    ended = life(*command, "run.name=cut", "run.on_drift=accept", cwd=USER)
    assert "test     step 6: test/loss" in ended.output
    assert "6: val" not in ended.output, "nothing is trained again"
    assert not results(tmp_path / "sets/cut").differences(results(tmp_path / "sets/whole"))
    assert life(*command, "trainer.max_steps=6", "run.name=short", cwd=USER).status == 0
    whole, short = (metrics(tmp_path / "sets" / name) for name in ("whole", "short"))
    assert {n: whole[n] for n in whole if "test/" in n} == {n: short[n] for n in short if "test/" in n}
    assert life(*command, "data.test=null", "run.name=none", cwd=USER).status == 0
    assert {n: v for n, v in whole.items() if "test/" not in n} == metrics(tmp_path / "sets/none")


def test_several_processes_evaluate_the_best_weights(crew: Crews, tmp_path: Path) -> None:
    for parallel in ("ddp", "fsdp"):
        ended = crew(2, *SETS, f"run.root={tmp_path}", f"run.name={parallel}", f"runtime.parallel={parallel}", cwd=USER)
        assert ended.statuses == [0, 0], ended.output
    ddp, fsdp = (metrics(tmp_path / "sets" / name) for name in ("ddp", "fsdp"))
    assert ddp == pytest.approx(fsdp)
    assert ddp["test/loss"] != pytest.approx(ddp["val/other/loss"])


@pytest.mark.parametrize("size", [10, 11, 101])
def test_every_sample_is_held_out_in_one_fold(size: int) -> None:
    held_out = [[*Fold(range(size), folds=5, fold=fold, split="validation")] for fold in range(5)]
    assert sorted(sample for fold in held_out for sample in fold) == [*range(size)]
    assert {len(fold) for fold in held_out} <= {size // 5, size // 5 + 1}
    for fold, samples in enumerate(held_out):
        assert sorted([*samples, *Fold(range(size), folds=5, fold=fold, split="train")]) == [*range(size)]
    assert held_out[0] != [*Fold(range(size), folds=5, fold=0, split="validation", seed=1)]


def test_a_fold_is_frozen_and_refuses_what_is_none() -> None:
    assert [*Fold(range(20), folds=4, fold=1, split="validation")] == [5, 9, 12, 14, 17]
    for folds, fold, split in ((4, 4, "train"), (1, 0, "train"), (30, 0, "train"), (4, 0, "test")):
        with pytest.raises(ConfigError, match=r"there (is no fold|are train and validation)"):
            Fold(range(20), folds=folds, fold=fold, split=split)

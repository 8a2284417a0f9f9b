"""A process that hangs: its rank and code line are reported, no process is left, the same command continues."""

import json
from pathlib import Path

import pytest
from crews import Crews
from marks import slow

USER = Path(__file__).parent / "user"
DATA = ("data.train._target_=mine.data.Stuck", "+data.train.rank=1", "+data.train.once=ONCE")
TASK = ("task._target_=mine.tasks.Hangs", "~task.label_smoothing", "+task.rank=1", "+task.once=ONCE")
CALLBACK = ("+callbacks.own._target_=mine.callbacks.Stuck", "+callbacks.own.rank=0", "+callbacks.own.once=ONCE")
HANGS = {
    "dataset": (1, DATA, "mine/data.py"),
    "training": (1, (*TASK, "+task.step=5"), "mine/tasks.py"),
    "evaluation": (1, (*TASK, "+task.step=3", "+task.during=evaluation"), "mine/tasks.py"),
    "writer": (1, ("checkpoint.max_unsaved=1",), "runner/checkpoint/store.py"),
    "restore": (0, (*CALLBACK, "+callbacks.own.at=load", "checkpoint.every_steps=1"), "mine/callbacks.py"),
    "end": (0, (*CALLBACK, "+callbacks.own.at=end"), "mine/callbacks.py"),
}


@pytest.mark.parametrize(
    "name",
    [
        "training",
        *map(slow, ("dataset", "writer")),
        *(pytest.param(name, marks=pytest.mark.campaign) for name in ("evaluation", "restore", "end")),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_line(name: str, crew: Crews, tmp_path: Path) -> None:
    rank, more, place = HANGS[name]
    command = (
        "experiment=smoke",
        "trainer.max_steps=20",
        "runtime.parallel=ddp",
        "runtime.audit=false",
        "data.evaluation_batch_size=64",
        *(argument.replace("ONCE", str(tmp_path / "once")) for argument in more),
        f"run.root={tmp_path}",
        "run.name=hangs",
    )
    if name == "restore":
        crew(2, *command, cwd=USER, step=3)
    to, hang = ([1], 1) if name == "writer" else (None, None)
    ended = crew(2, *command, "runtime.timeout=3", cwd=USER, to=to, hang=hang)
    assert ended.statuses == [1, 1], ended.output
    assert f"rank {rank} (pid" in ended.output
    assert f"rank {1 - rank} (pid" not in ended.output, "it only waits"
    assert place in ended.output
    (end,) = (json.loads(path.read_text()) for path in tmp_path.glob("*/hangs/attempts/*.end.json"))
    assert end["outcome"] == "failed"
    assert place in end["reason"]
    ended = crew(2, *command, "runtime.timeout=20", cwd=USER)
    assert ended.statuses == [0, 0], ended.output
    assert "finished step 20" in ended.output

"""Saving beside training: what waits, what is dropped, what a failing storage costs, and what never blocks."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runner.callbacks.base import Loop
from runner.callbacks.saving import SaveCheckpoint, SaveTimer, _spoils_training
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.snapshot import Snapshot, Staging
from runner.checkpoint.store import CheckpointStore, Retention
from runner.errors import Interrupted, StorageError, Superseded
from runner.storage import LocalLocation


class Gated(CheckpointStore):
    """Commits when it is let, and fails when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalLocation(folder))
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.values: dict[int, float] = {}

    def commit(self, snapshot: Snapshot, *, attempt: int, require_newest: Callable[[], None]) -> CommitId:
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        self.values[snapshot.step] = float(snapshot.tensors["model/w"][0])
        return super().commit(snapshot, attempt=attempt, require_newest=require_newest)


class Run:
    """A state that counts, and a callback that saves it."""

    def __init__(self, folder: Path, *, background: bool = True, best: int = 1, every: int | None = None) -> None:
        self.now = 0.0
        self.store = Gated(folder)
        self.weight = torch.zeros(4)
        state: Any = SimpleNamespace(state_dict=lambda: {"model": {"w": self.weight}}, changes=dict, weights=list)
        self.loop = Loop(state, None)
        self.saver = SaveCheckpoint(
            self.store,
            SaveTimer(steps=1, clock=lambda: self.now),
            Retention(best=best, every_steps=every),
            attempt_number=1,
            identity={},
            max_unsaved=100.0,
            background=background,
        )
        self.saver.on_start(self.loop)

    def step(self, *, improved: bool = False) -> None:
        self.weight += 1
        self.loop.step += 1
        self.loop.improved = improved
        self.saver.on_step(self.loop)

    def begun(self) -> None:
        while self.saver.commit_thread.waiting:
            time.sleep(0.001)

    def settle(self) -> None:
        assert self.saver.commit_thread.wait(10)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.store.gate.set()
    run.saver.close()


def test_training_goes_on_beside_stuck_storage(run: Run) -> None:
    run.store.gate.clear()
    for _ in range(5):
        run.step()
    run.store.gate.set()
    run.settle()
    run.step()
    run.settle()
    assert run.store.values == {1: 1.0, 6: 6.0}, "each is the state of its own step"


def test_an_improvement_is_saved_despite_stuck_storage(run: Run) -> None:
    run.store.gate.clear()
    run.step()
    run.begun()
    run.step(improved=True)
    run.step()
    run.step(improved=True)
    run.step()
    run.store.gate.set()
    run.settle()
    assert run.store.values == {1: 1.0, 4: 4.0}, "of two that wait the better one"


def test_each_of_several_best_checkpoints_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the storage is slower than they come: training waits for room, in memory for two, and says so."""
    monkeypatch.setattr("runner.callbacks.saving.QUIET_SECONDS", 0.0)
    run = Run(tmp_path, best=3, every=4)
    run.store.gate.clear()
    run.step(improved=True)
    run.begun()
    run.step(improved=True)

    def open_when_told() -> None:
        until = time.monotonic() + 60
        while "training waits: the states of steps 2 and 3 must both be saved" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.01)
        run.store.gate.set()

    opener = threading.Thread(target=open_when_told)
    opener.start()
    run.step(improved=True)
    opener.join(60)
    run.step()
    run.step(improved=True)
    run.settle()
    run.saver.close()
    assert run.store.values == {step: float(step) for step in range(1, 6)}
    assert len(run.saver._free) <= 2


def test_a_pinned_step_is_kept_beside_a_better_one(tmp_path: Path) -> None:
    run = Run(tmp_path, every=2)
    run.store.gate.clear()
    run.step()
    run.begun()
    run.step()
    threading.Timer(0.2, run.store.gate.set).start()
    run.step(improved=True)
    run.store.gate.wait(20)
    run.begun()
    run.store.gate.clear()
    run.step()
    threading.Timer(0.2, run.store.gate.set).start()
    run.step(improved=True)
    run.settle()
    run.saver.close()
    assert {2, 3, 4, 5} <= {*run.store.values}


def test_copies_to_keep_are_retried_until_they_are_written(tmp_path: Path) -> None:
    """Training waits for the first of them rather than to give one up."""
    run = Run(tmp_path, best=3)
    run.store.gate.clear()
    run.store.error = StorageError("no space left")
    run.step(improved=True)
    run.begun()
    run.step(improved=True)
    run.store.gate.set()
    run.settle()
    run.store.error = None
    run.step(improved=True)
    run.saver.on_end(run.loop)
    run.saver.close()
    assert run.store.values == {1: 1.0, 2: 2.0, 3: 3.0}


@pytest.mark.parametrize(
    ("tensor", "name", "spoiled"),
    [
        (torch.tensor([1.0, torch.nan]), "model/w", True),
        (torch.tensor([1.0, -torch.inf]), "model/w", True),
        (torch.full((70_000,), 60_000.0, dtype=torch.float16), "model/w", False),
        (torch.full((70_000,), 3e38), "model/w", False),
        (torch.zeros(0, 3), "model/w", False),
        (torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn), "model/w", True),
        (torch.tensor([1, torch.nan * 1j]), "model/w", True),
        (torch.tensor([torch.nan, -torch.inf]), "model/mask", False),
        (torch.tensor([torch.inf, 1.0]), "optimizer/state/0/max_exp_avg", False),
        (torch.tensor([torch.inf, torch.nan]), "optimizer/state/0/exp_avg", True),
        (torch.tensor([1, 2]), "optimizer/state/0/step", False),
        (torch.tensor(torch.inf), "task/best", False),
    ],
)
def test_state_that_training_cannot_use_is_not_committed(tensor: torch.Tensor, name: str, spoiled: bool) -> None:
    assert _spoils_training(name, tensor, {"model/w"}) is spoiled


def test_a_failure_is_reported_and_retried_after_longer_pauses(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.store.error = StorageError("no space left")
    run.step()
    run.settle()
    for _ in range(3):
        run.step()
    assert run.store.values == {}
    assert "the checkpoint of step 1 could not be written: no space left. It is tried again" in caplog.text
    run.store.error = None
    run.now += 1.5
    run.step()
    run.settle()
    assert run.store.values == {5: 5.0}


def test_a_failed_improvement_is_tried_again_as_it_was(run: Run) -> None:
    run.store.error = StorageError("no space left")
    run.step(improved=True)
    run.settle()
    run.step()
    run.store.error = None
    run.now += 1.5
    run.step()
    run.settle()
    run.step()
    run.settle()
    assert run.store.values == {1: 1.0, 4: 4.0}


def test_storage_that_fails_for_too_long_ends_training(run: Run) -> None:
    run.store.error = StorageError("no space left")
    run.step()
    run.settle()
    run.now += 101
    with pytest.raises(StorageError, match=r"step 1 could not be written: no space left.*\nNo step is saved"):
        run.step()


def test_storage_that_hangs_for_too_long_ends_training(run: Run) -> None:
    run.store.gate.clear()
    run.step()
    run.begun()
    run.now += 101
    with pytest.raises(StorageError, match="no checkpoint was written for 101 seconds"):
        run.step()
    with pytest.raises(StorageError, match="no checkpoint was written for 101 seconds"):
        run.saver.on_end(run.loop)


def test_whoever_is_superseded_stops_at_the_next_step(run: Run) -> None:
    run.store.error = Superseded("attempt 2 took over")
    run.step()
    run.settle()
    with pytest.raises(Superseded, match="attempt 2"):
        run.step()


def test_unexpected_errors_of_the_writer_are_not_swallowed(run: Run) -> None:
    run.store.error = ZeroDivisionError()
    run.step()
    run.settle()
    with pytest.raises(ZeroDivisionError):
        run.step()


def test_the_end_waits_for_the_last_commit(run: Run) -> None:
    run.store.gate.clear()
    run.step()
    run.step()
    threading.Timer(0.2, run.store.gate.set).start()
    run.loop.stop = "max_steps"
    run.saver.on_end(run.loop)
    assert run.store.values == {1: 1.0, 2: 2.0}
    assert [commit.step for commit in run.store.commits()] == [2, 1]


def test_a_failure_at_the_end_does_not_promise_more_training(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.store.error = StorageError("no space left")
    run.step()
    run.loop.stop = "max_steps"

    def make_room_when_reported() -> None:
        until = time.monotonic() + 60
        while "It is tried again; the run ends if it keeps failing for another" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.01)
        run.store.error = None

    helper = threading.Thread(target=make_room_when_reported)
    helper.start()
    run.saver.on_end(run.loop)
    helper.join(60)
    assert run.store.values == {1: 1.0}
    assert "raining continues" not in caplog.text


@pytest.mark.parametrize("kind", [StorageError("no space left"), StorageError("too large", kind=StorageError.LASTING)])
def test_after_a_stop_a_failing_save_ends_the_run_soon(run: Run, kind: StorageError) -> None:
    """SIGKILL comes 30 seconds after Slurm's SIGTERM."""
    run.step()
    run.settle()
    tries: list[float] = []

    def fails(*_: object, **__: object) -> CommitId:
        tries.append(run.now)
        run.now += 6
        raise kind

    run.store.commit = fails  # type: ignore[method-assign]
    run.step()
    run.loop.stop = "SIGTERM"
    lasting = kind.kind == StorageError.LASTING
    problem = "SIGTERM: the checkpoint of step 2 could not be written: no space left"
    with pytest.raises(StorageError if lasting else Interrupted, match="too large" if lasting else problem) as caught:
        run.saver.on_end(run.loop)
    assert "The last one is of step 1 and is whole" in str(caught.value)
    assert len(tries) == 1 if lasting else 2 <= len(tries) <= 3


def test_a_slow_save_after_a_stop_is_reported_and_waited_for(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.step()
    run.settle()
    run.store.gate.clear()
    run.step()
    run.loop.stop, run.saver.max_unsaved = "SIGTERM", 1e9

    def open_when_reported() -> None:
        while "SIGTERM: the save of step 2 goes on after" not in caplog.text:
            run.now += 1
            time.sleep(0.01)
        run.store.gate.set()

    helper = threading.Thread(target=open_when_reported)
    helper.start()
    run.saver.on_end(run.loop)
    helper.join(60)
    assert "The last one is of step 1 and is whole" in caplog.text
    assert run.store.values == {1: 1.0, 2: 2.0}


def test_records_are_durable_before_tensors_are_written(run: Run, tmp_path: Path) -> None:
    """As docs/explanation/checkpoints.md says."""
    files: list[Path] = []
    record = SimpleNamespace(mark=lambda step: {}, flush=lambda: files.extend(tmp_path.rglob("*.*")))
    run.saver.records = [record]
    run.step()
    run.settle()
    assert files == []
    assert {file.parent.name for file in tmp_path.rglob("*.*")} == {"data", "commits"}


def test_pinned_steps_are_saved_at_their_own_step(tmp_path: Path) -> None:
    run = Run(tmp_path, every=3)
    run.store.gate.clear()
    run.step()
    run.begun()
    for _ in range(4):
        run.step()
    run.store.gate.set()
    run.settle()
    run.saver.close()
    assert run.store.values == {1: 1.0, 3: 3.0}


def test_without_background_every_step_that_is_due_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, background=False)
    for _ in range(3):
        run.step()
    assert run.store.values == {1: 1.0, 2: 2.0, 3: 3.0}


def test_a_staged_copy_keeps_ties_and_reuses_its_memory() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    staging = Staging()
    tensors = {"a": weight, "tied": weight, "view": weight.t(), "conj": torch.tensor([1j]).conj()}
    staging.stage(Snapshot(1, {}, tensors))
    staged = staging.snapshot.tensors
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    weight.zero_()
    assert all(torch.equal(staged[name], expected[name]) for name in tensors)
    assert staged["a"].data_ptr() == staged["tied"].data_ptr()
    staging.stage(Snapshot(2, {}, {**tensors, "a": weight, "tied": weight}))
    again = staging.snapshot.tensors
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == {
        name: tensor.data_ptr() for name, tensor in staged.items()
    }
    assert not again["a"].any()


def test_saves_cost_no_more_than_their_share() -> None:
    now = 0.0
    timer = SaveTimer(auto=True, clock=lambda: now)
    assert not timer.due(1)
    now = 10.0  # the shortest pause
    assert timer.due(1)
    for cost, pause in ((0.5, 50.0), (1e6, 3600.0)):
        timer.restart()
        timer.note_save(stall=cost)
        timer.update_interval()
        since = now
        now = since + pause - 1
        assert not timer.due(1)
        now = since + pause
        assert timer.due(1)


def test_steps_beside_a_save_add_to_its_cost() -> None:
    now = 0.0
    timer = SaveTimer(auto=True, clock=lambda: now)
    for seconds, writing in ((1.0, False), (1.5, True), (9.0, True)):
        if writing and seconds == 1.5:
            timer.note_save(stall=0.0)
        now += seconds
        timer.note_step(during_save=writing, is_plain=seconds < 9)  # the last one evaluated, too
    timer.update_interval()
    timer.restart()
    now += 49.0
    assert not timer.due(1)
    now += 1.0
    assert timer.due(1)


def test_seconds_count_from_the_last_restart() -> None:
    now = 100.0
    timer = SaveTimer(steps=10, seconds=5, clock=lambda: now)
    now = 104.9
    assert not timer.due(1)
    assert timer.due(10)
    now = 105.0
    assert timer.due(2)
    assert timer.due(3)
    timer.restart()
    assert not timer.due(4)
    now = 110.0
    assert timer.due(5)
    assert not SaveTimer(clock=lambda: now).due(1)

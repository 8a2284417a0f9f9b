"""Saving beside training on several ranks: all copy the same step, whatever the storage does to one of them."""

import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import MemoryLocation
from threads import Meeting, ThreadRanks, ends_among

from runner.callbacks.base import Loop
from runner.callbacks.saving import SaveCheckpoint, SaveTimer
from runner.checkpoint.store import CheckpointStore, Retention
from runner.distributed.communicator import PerRank
from runner.errors import RunnerError, StorageError, Superseded

SIZE = 3


class Seat:
    """A rank that trains: a state that counts, and what saves it."""

    def __init__(
        self,
        location: MemoryLocation,
        comm: ThreadRanks,
        writers: Meeting,
        *,
        background: bool = True,
        every_steps: int | None = None,
    ) -> None:
        self.now = 0.0
        self.comm = comm
        self.newer: str | None = None
        self.weights = [torch.zeros(4) for _ in range(2 * SIZE)]
        state: Any = SimpleNamespace(state_dict=self._state, changes=dict, weights=list)
        self.loop = Loop(state, None)
        store = CheckpointStore(location, ThreadRanks(writers, comm.rank))
        owner: Any = SimpleNamespace(require_newest=self._require_newest, beat=lambda **facts: None)
        self.saver = SaveCheckpoint(
            store,
            SaveTimer(steps=1, clock=lambda: self.now),
            Retention(last=99, every_steps=every_steps),
            attempt_number=1,
            identity={},
            attempt=owner if comm.rank == 0 else None,
            max_unsaved=100.0,
            background=background,
            comm=comm,
        )
        self.saver.on_start(self.loop)

    def step(self, *, improved: bool = False) -> None:
        self.loop.step += 1
        for weight in self.weights:
            weight += 1
        self.loop.improved = improved
        self.saver.on_step(self.loop)

    def end(self) -> None:
        self.saver.on_end(self.loop)
        self.saver.close()

    def _require_newest(self) -> None:
        if self.newer:
            raise Superseded(f"{self.newer} took over")

    def _state(self) -> dict[str, Any]:
        model = {str(number): weight for number, weight in enumerate(self.weights)}
        return {"model": model, "generators": PerRank(rank=self.comm.rank, drawn=self.weights[0])}


def train(location: MemoryLocation, script: Callable[[Seat], None], **settings: Any) -> list[Any]:
    """Run a script on every rank; how it ended on each."""
    writers = Meeting(SIZE)

    def work(comm: ThreadRanks) -> None:
        try:
            script(Seat(location, comm, writers, **settings))
        except RunnerError:  # of which all ranks hear
            raise
        except BaseException:
            comm.meeting.leave()
            writers.leave()
            raise

    return ends_among(SIZE, work)


def commits(location: MemoryLocation) -> list[int]:
    """The steps that were committed; each has, of every rank, the state of its own step."""
    store = CheckpointStore(location)
    found = []
    for commit in store.commits():
        checkpoint = store.open(commit)
        model = checkpoint.load("model")
        assert len(model) == 2 * SIZE
        assert {value for weight in model.values() for value in weight.tolist()} == {commit.step}
        items = checkpoint.parts["generators"]["items"]
        assert [item["rank"] for item in items] == [*range(SIZE)]
        found.append(commit.step)
    return found[::-1]


def failing(location: MemoryLocation, rank: int, *, times: int) -> None:
    """So many puts of a rank fail."""
    left = [times]

    def fault(_: int, verb: str, name: str, done: bool) -> None:
        if verb == "put" and not done and f".{rank:05d}.0" in name and left[0]:
            left[0] -= 1
            raise StorageError("no space left")

    location.arm(fault)


def test_every_step_is_saved_of_all_ranks() -> None:
    def script(seat: Seat) -> None:
        for _ in range(4):
            seat.step()
        seat.end()

    location = MemoryLocation()
    assert train(location, script, background=False) == [None] * SIZE
    assert commits(location) == [1, 2, 3, 4]


@pytest.mark.parametrize("rank", range(SIZE))
def test_a_failed_improvement_is_retried_on_all_ranks(rank: int) -> None:
    def script(seat: Seat) -> None:
        seat.step(improved=True)
        seat.step()
        seat.now += 1.5
        seat.step()
        seat.end()

    location = MemoryLocation()
    failing(location, rank, times=1)
    assert train(location, script, background=False) == [None] * SIZE
    assert commits(location) == [1, 3]


@pytest.mark.parametrize("rank", range(SIZE))
def test_storage_that_fails_one_rank_for_too_long_ends_all(rank: int) -> None:
    def script(seat: Seat) -> None:
        seat.step()
        seat.saver.commit_thread.wait(20)
        seat.now += 101
        seat.step()

    location = MemoryLocation()
    failing(location, rank, times=10**6)
    ends = train(location, script)
    assert [type(end) for end in ends] == [StorageError] * SIZE
    assert f"step 1 could not be written: rank {rank}: no space left" in str(ends[0])
    assert len({str(end) for end in ends}) == 1
    assert commits(location) == []


def test_whoever_is_superseded_stops_all_its_ranks() -> None:
    def script(seat: Seat) -> None:
        seat.step()
        seat.newer = "attempt 2"
        seat.step()

    ends = train(MemoryLocation(), script, background=False)
    assert [type(end) for end in ends] == [Superseded] * SIZE


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_save_the_same_steps_whatever_fails(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, where no two ranks are ever equally far. Pauses before another try are short."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    steps = 25
    chance = random.Random(seed)
    improved = [chance.random() < 0.2 for _ in range(steps)]

    def script(seat: Seat) -> None:
        for better in improved:
            seat.now += 2.0
            seat.step(improved=better)
        if seat.comm.rank == 0:
            location.arm(None)
        seat.end()

    location = MemoryLocation()
    luck = random.Random(seed)

    def fault(_: int, verb: str, name: str, done: bool) -> None:
        if verb == "put" and not done and luck.random() < 0.15:
            raise StorageError("no space left")

    location.arm(fault)
    assert train(location, script, every_steps=7) == [None] * SIZE
    found = commits(location)
    assert found[-1] == steps
    assert found == sorted(found)

"""A user's own iterable, resumed by its own state or by reading again."""

import json
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow
from results import generator_bits
from torch.utils.data import IterableDataset, get_worker_info

from runner.checkpoint.encoding import decode, encode
from runner.data.iterable import BatchOptions, IterableStream
from runner.data.loader import LoaderOptions
from runner.errors import DataError

N, BATCH, PASSES = 10, 4, 3
CPU = torch.device("cpu")
Step = tuple[list[bytes], int, int, int, int]


def mine() -> range:
    """The numbers of this worker."""
    worker = get_worker_info()
    return range(worker.id, N, worker.num_workers) if worker is not None else range(N)


def sample(number: int) -> tuple[Any, ...]:
    return number, random.gauss(0, 1), np.random.standard_normal(), torch.randn(2)


class OnIterator:
    """The state is on the iterator, and a live object."""

    class Rows:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {"read": [0], "sum": torch.zeros(1), 7: (None, True, float("inf"))}

        def __iter__(self) -> "OnIterator.Rows":
            return self

        def __next__(self) -> Any:
            if self.state["read"][0] == len(mine()):
                self.state["read"][0] = 0  # an iterator that must not be asked again
                raise StopIteration
            number = mine()[self.state["read"][0]]
            self.state["read"][0] += 1
            self.state["sum"] += number
            return *sample(number), self.state["sum"].clone()

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    def __iter__(self) -> "OnIterator.Rows":
        return self.Rows()


class OnDataset(IterableDataset[Any]):
    """The state is on the data set, as in torchdata's examples: a number that stays at the end of the pass."""

    def __init__(self) -> None:
        self.read, self.resume, self.passes = 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        start, self.resume = self.resume, 0
        for self.read, number in enumerate(mine()[start:], start + 1):
            yield *sample(number), self.passes

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resume, self.passes = state["read"], state["passes"] - 1


class Resetting(OnDataset):
    """One whose number goes back to nought at the end of the pass."""

    def __iter__(self) -> Iterator[Any]:
        while self.read < len(mine()):
            self.read += 1
            yield *sample(mine()[self.read - 1]), self.passes
        self.read = 0
        self.passes += 1

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read, self.passes = state["read"], state["passes"]


class Unequal(OnDataset):
    """Everything is in the first worker; the order of a pass comes from its number and a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        assert epoch > self.epoch
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        start, self.resume = self.resume, 0
        order = random.Random(self.epoch).sample(range(7), 7) if worker is None or worker.id == 0 else []
        for self.read, number in enumerate(order[start:], start + 1):
            yield *sample(number), self.epoch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resume = state["read"]


class Tiny(OnDataset):
    """Less than a batch."""

    def __iter__(self) -> Iterator[Any]:
        for row in super().__iter__():
            if row[0] < 3:
                yield row


class Stateless:
    """Shuffled by a global generator in every pass."""

    def __iter__(self) -> Iterator[Any]:
        rows = [*mine()]
        random.shuffle(rows)
        return map(sample, rows)


KINDS = [OnIterator, OnDataset, Resetting, Unequal, Tiny, Stateless]


def stream(data: Any, workers: int = 0, *, opened: bool = True, **how: Any) -> IterableStream:
    loading = how.pop("loading", LoaderOptions(workers))
    micro_batches = how.pop("micro_batches", 1)
    settings = {"seed": 1, "batch_size": BATCH // micro_batches, "randomness": "sample"}
    options = BatchOptions(**{**settings, "replay": isinstance(data, Stateless), **how})
    made = IterableStream(data, options, micro_batches=micro_batches, loading=loading, device=CPU)
    if opened:
        made.open()
    return made


def stored(state: Any) -> Any:
    """The state as a checkpoint gives it back."""
    value, tensors = encode(state, "data")
    return decode(json.loads(json.dumps(value)), lambda name: tensors[name].clone())


def bits(batch: list[torch.Tensor]) -> list[bytes]:
    """One line of bytes per sample."""
    return [b"".join(field[row].numpy().tobytes() for field in batch) for row in range(len(batch[0]))]


def step(live: IterableStream) -> Step:
    rows = [line for _, batch in live.step() for line in bits(batch)]
    live.advance()
    return rows, live.consumed, live.epochs_before, live.epochs, live.digest


def resumed(kind: Any, state: Any, workers: int, **how: Any) -> IterableStream:
    made = stream(kind(), workers, opened=False, **how)
    made.load_state_dict(state)
    return made


def uninterrupted(kind: Any, workers: int, **how: Any) -> list[Step]:
    live, steps = stream(kind(), workers, **how), []
    while live.epochs < PASSES:
        steps.append(step(live))
    return [*steps, step(live)]


def numbers(steps: list[Step]) -> list[int]:
    return [int.from_bytes(line[:8], "little") for rows, *_ in steps for line in rows]


def noisy(rows: list[Any]) -> list[torch.Tensor]:
    """A collate function that draws."""
    return [torch.stack([torch.as_tensor(row[0]) for row in rows]), torch.randn(len(rows))]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_brings_every_sample_once(kind: Any, workers: int) -> None:
    steps = uninterrupted(kind, workers)
    for epoch in range(PASSES):
        drawn = numbers([one for one in steps if one[2] == epoch])
        assert sorted(drawn) == [*range({Tiny: 3, Unequal: 7}.get(kind, N))]
    drawn = [line for rows, *_ in steps for line in rows]
    assert len({line[8:24] for line in drawn}) == len(drawn), "random numbers come again"


@pytest.mark.parametrize("randomness", ["sample", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_at_any_step_goes_on_exactly(kind: Any, randomness: str) -> None:
    """Killed in the middle of the step after."""
    how = {"randomness": randomness, "batch_size": BATCH, "micro_batches": 2}
    whole = uninterrupted(kind, 0, **how)
    for done in range(len(whole)):
        killed = stream(kind(), **how)
        assert [step(killed) for _ in range(done)] == whole[:done]
        next(killed.step())
        state = stored(killed.state_dict())
        again = resumed(kind, state, 0, **how)
        assert repr(again.state_dict()) == repr(state)
        assert [step(again) for _ in whole[done:]] == whole[done:]


@pytest.mark.parametrize("workers", [0, slow(1), slow(2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_after_every_step_goes_on_exactly(kind: Any, workers: int) -> None:
    """A resume of a resume of a resume; one that did nothing before it was killed lies in between."""
    whole = uninterrupted(kind, workers)
    state, found = stored(stream(kind(), workers).state_dict()), []
    for number in range(len(whole)):
        life = resumed(kind, state, workers)
        if number % 3 == 1:
            life = resumed(kind, stored(life.state_dict()), workers)
        found.append(step(life))
        state = stored(life.state_dict())
    assert found == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_incomplete_batches_are_dropped_on_request(workers: int) -> None:
    whole = uninterrupted(OnDataset, workers, drop_last=True)
    assert {len(rows) for rows, *_ in whole} == {BATCH}
    for done in range(1, len(whole)):
        killed = stream(OnDataset(), workers, drop_last=True)
        for _ in range(done):
            step(killed)
        again = resumed(OnDataset, stored(killed.state_dict()), workers, drop_last=True)
        assert step(again) == whole[done]


def test_a_spawned_worker_does_the_same() -> None:
    assert uninterrupted(OnDataset, 1, loading=LoaderOptions(1, start_method="spawn")) == uninterrupted(OnDataset, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cursor_moves_when_a_step_is_done_and_not_before(workers: int) -> None:
    live = stream(OnDataset(), workers, micro_batches=2)
    before = live.state_dict()
    shares = [share for share, _ in live.step()]
    assert shares == [0.5, 0.5]
    assert live.state_dict() == before
    live.advance()
    assert live.state_dict() != before
    assert (live.consumed, live.count) == (BATCH, BATCH)
    assert (live.ledger_line(7).first, live.ledger_line(7).last) == (0, BATCH - 1)


def test_a_state_is_not_changed_by_later_steps() -> None:
    live = stream(OnIterator())
    step(live)
    state = live.state_dict()
    before = repr(state)
    step(live)
    again = resumed(OnIterator, state, 0)
    step(again)
    assert repr(state) == before


def test_the_digest_depends_on_the_contents_of_batches() -> None:
    def digests(**how: Any) -> list[int]:
        return [one[4] for one in uninterrupted(OnDataset, 0, **how)]

    assert digests() == digests()
    assert len({*digests(), *digests(seed=2)}) == 2 * len(digests())


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_leave_the_global_generators_alone(workers: int) -> None:
    for draw in (random.random, np.random.standard_normal, lambda: torch.randn(1)):
        draw()  # so that they do not stand where the last stream left them
    before = generator_bits()
    uninterrupted(OnIterator, workers)
    assert generator_bits() == before


def test_another_number_of_workers_is_refused_with_remedy() -> None:
    state = stream(OnDataset()).state_dict()
    with pytest.raises(DataError, match=r"read by 0 workers, and now 2 read it.*runtime\.num_workers=0"):
        resumed(OnDataset, state, 2)


def test_a_position_in_map_style_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train is an iterable now \(OnDataset\) and was map-style.*run\.name"):
        resumed(OnDataset, {"consumed": 4, "plan": {}}, 0)


def test_an_iterable_without_a_state_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train \(a Stateless\).*state_dict.*map-style.*data\.replay=true"):
        step(stream(Stateless(), replay=False))


def test_data_that_cannot_be_read_again_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train is of class generator, which can be read only once"):
        stream((number for number in range(3)), replay=True)
    with pytest.raises(DataError, match=r"data\.train is of class int, which is neither"):
        stream(3)


def test_looking_for_a_state_reads_nothing() -> None:
    class Watched:
        def __iter__(self) -> Iterator[int]:
            raise AssertionError
            yield

    stream(Watched(), replay=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_again_is_reported(
    workers: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    live = stream(Stateless(), workers)
    step(live)
    step(live)
    with caplog.at_level(logging.INFO, "runner"):
        step(resumed(Stateless, stored(live.state_dict()), workers))
    told = [record.message for record in caplog.records]
    assert sum(int(line.split()[2]) for line in told) == 2 * BATCH
    assert all("samples again to resume" in line for line in told)
    assert capfd.readouterr().err == "", "a bar for what took no time"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", [{}, {"drop_last": True, "batch_size": 2 * N}], ids=["nothing", "all dropped"])
def test_an_empty_pass_is_an_error(how: dict[str, Any], workers: int) -> None:
    class Empty(OnDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from [*super().__iter__()] if how else []

    with pytest.raises(DataError, match=r"^data\.train is empty: .*Empty"):
        step(stream(Empty(), workers, **how))


def test_an_iterable_that_cannot_be_read_twice_is_an_error() -> None:
    class Once(OnDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter([]) if self.read else super().__iter__()

    live = stream(Once())
    for _ in range(3):
        step(live)
    with pytest.raises(DataError, match=r"data\.train is empty from pass 1 on.*begins anew"):
        step(live)


class Broken(OnDataset):
    """Fails at its sixth sample."""

    def __iter__(self) -> Iterator[Any]:
        for row in super().__iter__():
            if self.read == 3:
                self.break_down()
            yield row

    def break_down(self) -> None:
        raise KeyError("no such file")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_is_raised_with_its_place_when_it_is_due(workers: int) -> None:
    live = stream(Broken(), workers, batch_size=2)
    for _ in range(max(1, workers)):
        step(live)
    for _ in range(2):
        with pytest.raises(DataError, match=r"item 2 of pass 0.*: KeyError: 'no such file'") as told:
            step(live)
        assert ("in worker 0" in str(told.value)) == (workers > 0)
        assert "break_down" in str(told.value), "the user's traceback"


def test_a_worker_that_dies_is_reported() -> None:
    class Dies(OnDataset):
        def __iter__(self) -> Iterator[Any]:
            os._exit(3)
            yield

    with pytest.raises(DataError, match=r"data\.train \(a .*Dies\): data worker 0 \(pid \d+\) ended with status 3"):
        step(stream(Dies(), 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unsavable_state_is_refused_at_the_first_step(workers: int) -> None:
    class Odd(OnDataset):
        def state_dict(self) -> dict[str, Any]:
            return {"a": [{"key": lambda: 0}]}

    with pytest.raises(DataError, match=r"item 1 of pass 0.*: its state_dict holds a function, which cannot be saved"):
        step(stream(Odd(), workers))


def test_a_state_that_leads_elsewhere_is_an_error() -> None:
    class Shorter(OnDataset):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.resume = N

    class Longer(OnDataset):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    for kind, text in ((Shorter, "ended where 10 samples were read before"), (Longer, "but it yields more")):
        live = stream(OnDataset())
        for _ in range(3):
            step(live)
        with pytest.raises(DataError, match=text):
            step(resumed(kind, stored(live.state_dict()), 0))


def test_unpicklable_data_is_refused_where_it_must_be_pickled() -> None:
    class Local(OnDataset):
        pass

    with pytest.raises(DataError, match=r"start_method=spawn.*Local.*start_method=fork"):
        stream(Local(), loading=LoaderOptions(1, start_method="spawn"))


def test_the_guarantee_is_said() -> None:
    assert "by its own state" in stream(OnDataset(), opened=False).guarantee
    assert "reading the current pass again" in stream(Stateless(), opened=False).guarantee
    assert "num_workers=2; each worker" in stream(OnDataset(), 2, opened=False).guarantee


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [OnDataset, Unequal])
def test_a_state_can_be_ignored(kind: Any, workers: int) -> None:
    """Also one that was saved before somebody set data.replay."""
    whole = uninterrupted(kind, workers)
    live = stream(kind(), workers)
    for done in range(1, len(whole), 1 + workers):
        while live.consumed < whole[done - 1][1]:
            step(live)
        again = resumed(kind, stored(live.state_dict()), workers, replay=True)
        assert [row[:32] for row in step(again)[0]] == [row[:32] for row in whole[done][0]]


def test_draws_while_collating_are_exact_as_well() -> None:
    class Quiet(OnDataset):
        def __iter__(self) -> Iterator[Any]:
            for row in super().__iter__():
                torch.randn(1 + self.passes * N + self.read)  # of which collating must not depend
                yield row

    whole = uninterrupted(Quiet, 0, collate=noisy, randomness="batch")
    drawn = [line[8:] for rows, *_ in whole for line in rows]
    assert len({*drawn}) == len(drawn)
    plain = uninterrupted(OnDataset, 0, collate=noisy, randomness="batch")
    assert [row for one in plain for row in one[0]] == [row for one in whole for row in one[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_gets_the_number_of_the_pass(workers: int) -> None:
    for _, batch in (told := stream(Unequal(), workers, batch_size=7)).step():
        assert batch[-1].tolist() == [0] * 7
    told.advance()
    for _, batch in told.step():
        assert batch[-1].tolist() == [1] * 7

"""Arithmetic on positions, held against counting them one by one."""

from collections.abc import Iterator
from itertools import chain, islice, product

import pytest

from runner.data.plan import Plan, Slice
from runner.errors import DataError

SIZES = [*product((1, 2, 3, 7, 12), (1, 2, 4, 7, 30))]  # samples, samples per batch


def places(plan: Plan, piece: Slice) -> list[tuple[int, int]]:
    """(epoch, place) of every position of a slice, by its spans."""
    return [(epoch, place) for epoch, first, end in plan.spans(piece) for place in range(first, end)]


def slices(plan: Plan, consumed: int = 0) -> Iterator[Slice]:
    return chain.from_iterable(plan.steps(consumed, plan.order()))


@pytest.mark.parametrize(("samples", "batch"), SIZES)
def test_spans_are_the_positions_of_a_slice(samples: int, batch: int) -> None:
    plan = Plan(samples, 0, batch)
    for first in range(3 * samples):
        expected = [divmod(position, samples) for position in range(first, first + batch)]
        assert places(plan, Slice(first, batch)) == expected


def test_a_span_ends_only_with_its_epoch_or_its_slice() -> None:
    assert [*Plan(10, 0, 4).spans(Slice(8, 4))] == [(0, 8, 10), (1, 0, 2)]
    assert [*Plan(10, 0, 4).spans(Slice(4, 4))] == [(0, 4, 8)]
    assert [*Plan(3, 0, 7).spans(Slice(2, 7))] == [(0, 2, 3), (1, 0, 3), (2, 0, 3)]
    assert [*Plan(3, 0, 7).spans(Slice(2, 0))] == []


def test_a_carried_batch_crosses_the_epoch_border() -> None:
    plan = Plan(10, 0, 4)
    batches = [places(plan, piece) for piece in islice(slices(plan), 5)]
    assert batches[2] == [(0, 8), (0, 9), (1, 0), (1, 1)]
    assert [*chain(*batches)] == [*product(range(2), range(10))]


def test_drop_begins_every_epoch_with_a_batch() -> None:
    plan = Plan(10, 0, 4, tail="drop")
    batches = [places(plan, piece) for piece in islice(slices(plan), 4)]
    assert plan.epoch_size == 8
    assert [*chain(*batches)] == [*product(range(2), range(8))]
    assert [len({epoch for epoch, _ in batch}) for batch in batches] == [1, 1, 1, 1]


def test_a_batch_larger_than_the_data_set_takes_several_epochs() -> None:
    assert places(Plan(3, 0, 7), Slice(0, 7)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_a_single_sample_is_an_epoch() -> None:
    assert places(Plan(1, 0, 3), Slice(6, 3)) == [(6, 0), (7, 0), (8, 0)]


def test_micro_batches_split_a_batch_without_gap_or_overlap() -> None:
    pieces = [*islice(slices(Plan(10, 0, 6, micro_batches=3), 12), 6)]
    assert pieces == [Slice(12, 2), Slice(14, 2), Slice(16, 2), Slice(18, 2), Slice(20, 2), Slice(22, 2)]


@pytest.mark.parametrize("tail", ["carry", "drop"])
def test_steps_is_the_first_step_that_finishes_so_many_epochs(tail: str) -> None:
    for samples, batch in SIZES:
        if tail == "drop" and samples < batch:
            continue
        plan = Plan(samples, 0, batch, tail=tail)
        for epochs in range(1, 5):
            steps = plan.steps_of(epochs)
            assert steps * batch >= epochs * plan.epoch_size > (steps - 1) * batch


def test_the_guarantee_says_what_is_dropped() -> None:
    assert Plan(10, 0, 4).guarantee == "each exactly once per epoch, any number of workers"
    assert "(2 dropped)" in Plan(10, 0, 4, tail="drop").guarantee


@pytest.mark.parametrize(("batch", "micro"), [(4, 3), (2, 4), (0, 1), (4, 0)])
def test_unequal_micro_batches_are_refused_with_both_keys(batch: int, micro: int) -> None:
    with pytest.raises(DataError, match=rf"data\.batch_size={batch} .* trainer\.accumulate={micro} .*multiple"):
        Plan(10, 0, batch, micro_batches=micro)


def test_dropping_every_sample_is_refused() -> None:
    assert Plan(4, 0, 4, tail="drop").epoch_size == 4
    with pytest.raises(DataError, match=r"there are 3, data\.batch_size=4\. Use data\.tail=carry"):
        Plan(3, 0, 4, tail="drop")


def test_the_state_leaves_out_what_moves_no_sample() -> None:
    carry, drop = Plan(10, 5, 4, 2), Plan(10, 5, 4, 2, tail="drop")
    state = {"samples": 10, "seed": 5, "shuffle": True, "tail": "carry", "randomness": "sample"}
    assert carry.state() == state == Plan(10, 5, 10, 1).state()
    assert drop.state() == state | {"tail": "drop", "batch_size": 4} == Plan(10, 5, 4, 1, tail="drop").state()

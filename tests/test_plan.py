"""Arithmetic on positions, held against counting them one by one."""

import json
from collections.abc import Iterator
from itertools import chain, islice, product
from typing import Any

import numpy as np
import pytest

from runner.data.order import Interleaving
from runner.data.plan import Plan, Slice, Source
from runner.distributed.world import World
from runner.errors import DataError

SIZES = [*product((1, 2, 3, 7, 12), (1, 2, 4, 7, 30))]  # samples, samples per batch
LENGTHS = (1, 5, 2, 8, 3, 3, 1, 7, 2, 4)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in order": {"shuffle": False},
    "drop": {"tail": "drop"},
    "shards": {"shards": (6, 0, 4), "interleaving": Interleaving(2, 4, 1)},
    "mixture": {"sources": (Source(6, 1), Source(4, 3, (1, 3))), "interleaving": Interleaving(2, 4, 1)},
    "weights": {"weights": {0: (1, 0, 5, 1, 1, 1, 1, 1, 1, 1), 2: (1,) * 10}},
    "budget": {"max_tokens": 8, "lengths": LENGTHS},
}


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


def test_the_guarantee_names_dropped_samples() -> None:
    assert Plan(10, 0, 4).guarantee == "10 samples, 4 per step; each exactly once per epoch, any number of workers"
    assert Plan(10, 0, 4, randomness="batch").guarantee.endswith("another split into batches draws others")
    assert "(2 dropped)" in Plan(10, 0, 4, tail="drop").guarantee


@pytest.mark.parametrize(("batch", "micro"), [(4, 3), (2, 4), (0, 1), (4, 0)])
def test_unequal_micro_batches_are_refused_with_both_keys(batch: int, micro: int) -> None:
    with pytest.raises(DataError, match=rf"data\.batch_size={batch} .* trainer\.accumulate={micro} .*multiple"):
        Plan(10, 0, batch, micro_batches=micro)


def test_dropping_every_sample_is_refused() -> None:
    assert Plan(4, 0, 4, tail="drop").epoch_size == 4
    with pytest.raises(DataError, match=r"there are 3, data\.batch_size=4\. Use data\.tail=carry"):
        Plan(3, 0, 4, tail="drop")


def test_the_state_has_only_settings_that_move_samples() -> None:
    carry, drop = Plan(10, 5, 4, 2), Plan(10, 5, 4, 2, tail="drop")
    state = {"samples": 10, "seed": 5, "shuffle": True, "tail": "carry", "randomness": "sample"}
    assert carry.state() == state == Plan(10, 5, 10, 1).state()
    assert drop.state() == state | {"tail": "drop", "batch_size": 4} == Plan(10, 5, 4, 1, tail="drop").state()


def test_drop_is_refused_where_batches_are_always_whole() -> None:
    with pytest.raises(DataError, match=r"data\.tail=drop has no meaning for a mixture"):
        Plan(10, 0, 4, tail="drop", sources=(Source(5, 1), Source(5, 1)))
    with pytest.raises(DataError, match=r"data\.tail=drop has no meaning for data\.max_tokens"):
        Plan(10, 0, 4, tail="drop", max_tokens=8, lengths=LENGTHS)


def test_a_batch_not_divisible_by_the_processes_is_refused() -> None:
    assert Plan(10, 0, 8, micro_batches=2, world=World(0, 4)).slices_per_step == 8
    with pytest.raises(
        DataError, match=r"data\.batch_size=4 .* equal micro-batches in each of 4 processes; .*multiple"
    ):
        Plan(10, 0, 4, micro_batches=2, world=World(0, 4))


@pytest.mark.parametrize(
    ("kind", "world", "micro"),
    [
        (kind, world, micro)
        for kind, world, micro in product(KINDS, (1, 2, 4), (1, 2, 4))
        if world * micro == 4 or (world * micro < 16 and kind != "budget")  # there the slices of a step are in the plan
    ],
)
def test_the_slices_of_all_processes_are_those_of_one(kind: str, world: int, micro: int) -> None:
    values = KINDS[kind]
    alone = Plan(10, 1, 8, **(values | {"micro_batches": 4}))
    expected = [place for piece in islice(slices(alone, 3), 40) for place in places(alone, piece)]
    dealt: list[list[Slice]] = []
    for rank in range(world):
        plan = Plan(10, 1, 8, **(values | {"micro_batches": micro, "world": World(rank, world)}))
        steps = islice(plan.steps(3, plan.order()), 10)
        dealt.append([piece for step in steps for piece in step[rank::world]])
    joined = [place for turn in zip(*dealt, strict=True) for piece in turn for place in places(alone, piece)]
    assert joined == expected
    assert len(set(joined)) == len(joined) == (80 if kind != "budget" else len(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_comes_back_from_its_recipe_with_the_same_order(kind: str) -> None:
    plan = Plan(10, 1, 4, **KINDS[kind])
    again = Plan.of(json.loads(json.dumps(plan.recipe())))
    assert again.state() == plan.state()
    assert again.recipe() == plan.recipe()
    for epoch in range(3):
        every = np.arange(plan.epoch_size)
        assert again.order()(epoch, every).tolist() == plan.order()(epoch, every).tolist()


def test_the_orders_of_all_kinds_are_different_ones() -> None:
    kinds = {kind: values for kind, values in KINDS.items() if kind != "drop"}
    orders = {
        kind: tuple(Plan(10, 1, 4, **values).order()(0, np.arange(10)).tolist()) for kind, values in kinds.items()
    }
    assert len({*orders.values()}) == len(kinds)


def test_the_state_is_small_however_long_the_lists_are() -> None:
    counts = tuple(range(1, 100_001))
    values: dict[str, Any] = {"interleaving": Interleaving(8, 64, 4), "max_tokens": 10**6}
    plan = Plan(sum(counts), 1, 4, shards=counts, lengths=counts, sources=(Source(sum(counts), 1, counts),), **values)
    assert len(json.dumps(plan.state())) < 1000
    same = Plan(sum(counts), 1, 4, shards=counts, lengths=counts, sources=(Source(sum(counts), 1, counts),), **values)
    assert same.state() == plan.state()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": (4, 6)},
        {"shards": (4, 6, 0)},
        {"lengths": LENGTHS[::-1]},
        {"max_tokens": 9},
        {"batch_size": 8},
        {"micro_batches": 2},
        {"interleaving": Interleaving(2, 4, 2)},
        {"sources": (Source(10, 1, (4, 6)),)},
        {"world": World(1, 2)},
    ],
    ids=str,
)
def test_a_change_that_moves_samples_shows_in_the_state(change: dict[str, Any]) -> None:
    values: dict[str, Any] = {"samples": 10, "seed": 1, "batch_size": 4, "interleaving": Interleaving(2, 4, 1)}
    values |= {"shards": (6, 4), "sources": (Source(10, 1, (6, 4)),), "max_tokens": 8, "lengths": LENGTHS}
    assert Plan(**values | change).state() != Plan(**values).state()


def test_the_rank_of_a_process_is_not_in_its_state() -> None:
    assert (
        Plan(10, 1, 4, world=World(0, 2)).state() == Plan(10, 1, 4, world=World(1, 2)).state() == Plan(10, 1, 4).state()
    )

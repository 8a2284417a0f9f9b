"""Batches of variable size by a budget of tokens."""

from dataclasses import replace
from hashlib import sha256
from itertools import islice

import numpy as np
import pytest

from runner.data import order as orders
from runner.data.order import BudgetOrder, PermutationOrder
from runner.data.plan import Plan, Slice
from runner.distributed.world import World
from runner.errors import DataError

CHANCE = np.random.default_rng(0)
SKEWED = tuple(np.clip(CHANCE.lognormal(4, 1, 1000).astype(int), 1, 900).tolist())


def plan(lengths: tuple[int, ...] = SKEWED, *, batch: int = 64, max_tokens: int = 1000, **values: object) -> Plan:
    return Plan(len(lengths), 1, batch, max_tokens=max_tokens, lengths=lengths, **values)  # type: ignore[arg-type]


def slices(planned: Plan, consumed: int, count: int) -> list[Slice]:
    order = planned.order()
    steps = islice(planned.steps(consumed, order), -(-count // planned.slices_per_step))
    return [piece for step in steps for piece in step][:count]


def epoch_of(planned: Plan, epoch: int) -> list[list[int]]:
    """The samples of every batch of an epoch."""
    order = planned.order()
    return [piece.tolist() for piece in np.split(order(epoch, np.arange(planned.samples)), order.ends(epoch)[:-1])]


def per_epoch(planned: Plan, epoch: int = 0) -> int:
    return len(planned.order().ends(epoch))


@pytest.mark.parametrize("max_tokens", [900, 1000, 5000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_batch_keeps_the_budget_and_the_cap(max_tokens: int, shuffle: bool) -> None:
    planned = plan(batch=32, max_tokens=max_tokens, micro_batches=2, shuffle=shuffle)
    for batch in epoch_of(planned, 0):
        assert 1 <= len(batch) <= 16
        assert max(SKEWED[index] for index in batch) * len(batch) <= max_tokens


@pytest.mark.parametrize("pool", [7, 64, 4096])
def test_every_sample_comes_once_per_epoch(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "POOL_SAMPLES", pool)
    for epoch in range(3):
        batches = epoch_of(plan(), epoch)
        assert sorted(index for batch in batches for index in batch) == [*range(1000)]
        assert all(batches)


def test_epochs_and_seeds_have_batches_of_their_own() -> None:
    found = [epoch_of(plan(), 0), epoch_of(plan(), 1), epoch_of(replace(plan(), seed=2), 0)]
    assert all(one != other for one in found for other in found if one is not other)
    assert epoch_of(plan(), 0) == found[0]


def test_the_batches_are_frozen() -> None:
    planned = plan(tuple(i * i % 97 + 1 for i in range(5000)))  # more than one pool
    order = planned.order()
    found = np.concatenate([order(1, np.arange(5000)), order.ends(1)])
    assert (
        sha256(found.astype("<i8").tobytes()).hexdigest()
        == "545a92b5ab484b0fe41f4154de3bd6c0528042591a721e898e7ac520f0a1c09e"
    )


def test_pools_are_shuffled_in_epochs_of_the_same_samples() -> None:
    """In the order of the data set the pools are the same in every epoch; the turns of their batches are not."""
    order = PermutationOrder(1000, seed=0, shuffle=False)
    lengths = np.array(SKEWED)
    plans = [BudgetOrder(order, lengths, max_tokens=1000, max_samples=64, seed=seed, shuffle=True) for seed in (1, 2)]
    firsts = [each(epoch, np.arange(100)).tolist() for each in plans for epoch in (0, 1)]
    assert len({*map(tuple, firsts)}) == 4


def test_slices_are_the_batches_of_one_epoch_after_the_other() -> None:
    planned = plan()
    counts = [len(batch) for epoch in range(2) for batch in epoch_of(planned, epoch)]
    found = slices(planned, 0, len(counts))
    assert [piece.count for piece in found] == counts
    assert [piece.first for piece in found] == np.cumsum([0, *counts[:-1]]).tolist()
    assert found[per_epoch(planned)].first == 1000  # no batch crosses the border


@pytest.mark.parametrize("micro", [1, 4])
def test_a_resume_at_any_step_goes_on_with_the_same_slices(micro: int) -> None:
    planned = plan(SKEWED[:100], batch=16, micro_batches=micro)
    steps = 3 * per_epoch(planned) // micro
    whole = slices(planned, 0, steps * micro)
    for step in range(steps):
        start = whole[step * micro].first
        assert slices(planned, start, (steps - step) * micro) == whole[step * micro :]


def test_a_resume_after_whole_epochs_goes_on_with_the_next() -> None:
    planned = plan()
    assert slices(planned, 2000, 1)[0] == Slice(2000, len(epoch_of(planned, 2)[0]))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_slices_do_not_depend_on_the_number_of_processes(world: int) -> None:
    alone = plan(micro_batches=4)
    shared = plan(micro_batches=4 // world, world=World(0, world))
    assert shared.state() == alone.state()
    assert slices(shared, 0, 200) == slices(alone, 0, 200)
    assert epoch_of(shared, 1) == epoch_of(alone, 1)


def test_a_sample_longer_than_the_budget_is_refused_by_number() -> None:
    with pytest.raises(DataError, match=r"sample 2 has 11 tokens, more than data\.max_tokens=10"):
        plan((10, 3, 11, 5), max_tokens=10).order()
    assert epoch_of(plan((10, 3, 5), max_tokens=10, shuffle=False), 0) == [[1, 2], [0]]


def test_another_number_of_lengths_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train has 4 samples and 3 lengths"):
        Plan(4, 1, 2, max_tokens=10, lengths=(1, 2, 3)).order()


@pytest.mark.parametrize("length", [0, 1, 10])
def test_a_single_sample_is_a_batch(length: int) -> None:
    planned = plan((length,), max_tokens=10)
    assert slices(planned, 0, 3) == [Slice(0, 1), Slice(1, 1), Slice(2, 1)]


def test_equal_lengths_make_equal_batches() -> None:
    assert sorted(map(len, epoch_of(plan((100,) * 25, max_tokens=500), 0))) == [5] * 5


@pytest.mark.parametrize("lengths", [(0,) * 50, (0, 0, 10) * 10, (0,) * 9 + (10,)], ids=["all", "most", "one not"])
def test_empty_samples_are_bounded_by_the_cap(lengths: tuple[int, ...]) -> None:
    batches = epoch_of(plan(lengths, batch=8, max_tokens=10), 0)
    assert max(map(len, batches)) <= 8
    assert sorted(index for batch in batches for index in batch) == [*range(len(lengths))]


@pytest.mark.parametrize("batch", [1, 64])
def test_a_cap_of_one_and_one_above_all_samples(batch: int) -> None:
    assert len(epoch_of(plan((1,) * 10, batch=batch), 0)) == (10 if batch == 1 else 1)


def test_little_is_lost_to_padding_and_the_budget_is_used() -> None:
    batches = epoch_of(plan(batch=1000), 0)
    padded = sum(max(SKEWED[index] for index in batch) * len(batch) for batch in batches)
    assert sum(SKEWED) / padded > 0.8
    assert padded / (len(batches) * 1000) > 0.8


def test_batches_of_like_length_do_not_come_in_order_of_length() -> None:
    longest = [max(SKEWED[index] for index in batch) for batch in epoch_of(plan(), 0)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4
    assert longest != sorted(longest)


def test_passes_are_those_of_the_order_underneath() -> None:
    order = plan().order()
    source, passed = order.source_passes(3, np.arange(5))
    assert (source.tolist(), passed.tolist()) == ([0] * 5, [3] * 5)


def test_without_shuffle_pools_come_in_order_of_the_samples() -> None:
    found = epoch_of(plan((5, 1, 4, 2), max_tokens=8, shuffle=False), 3)
    assert found == [[1, 3], [2], [0]]
    assert PermutationOrder(4, seed=1, shuffle=False)(3, np.arange(4)).tolist() == [0, 1, 2, 3]

"""Several data sets mixed by weight."""

import json
from collections import Counter
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
import pytest

from runner.data.mixture import Mixture, integer_shares
from runner.data.order import Indices, Interleaving, MixtureOrder, PermutationOrder, WindowOrder
from runner.data.plan import Plan, Source
from runner.errors import ConfigError

SIZES, SHARES = (30, 7, 50), (5, 1, 2)  # a block is 8 positions, an epoch 87
FIRST = (0, 30, 37, 87)


def mixed(*, seed: int = 7) -> MixtureOrder:
    return MixtureOrder([PermutationOrder(size, seed=seed + size, shuffle=True) for size in SIZES], SHARES, seed=seed)


def stream(order: MixtureOrder, epochs: int) -> Indices:
    return np.concatenate([order(epoch, np.arange(order.size)) for epoch in range(epochs)])


def source_of(samples: Indices) -> Indices:
    return np.searchsorted(FIRST, samples, side="right") - 1


class Named:
    """A data set that knows where its samples lie."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.fingerprint = f"print-{name}"
        self.held: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        return f"{self.name}{index}"

    def locate(self, index: int) -> str:
        return f"line {index} of {self.name}.txt"

    def hold(self, windows: int, window: int) -> None:
        self.held = windows, window


def test_shares_are_exact_in_every_block() -> None:
    sources = source_of(stream(mixed(), 8))
    for block in sources.reshape(-1, 8):
        assert np.bincount(block, minlength=3).tolist() == [5, 1, 2]


def test_the_sources_of_blocks_come_in_orders_of_their_own() -> None:
    blocks = source_of(stream(mixed(), 8)).reshape(-1, 8)
    assert len({block.tobytes() for block in blocks}) > 50  # of 168 orders


def test_every_sample_comes_once_per_pass_of_its_source() -> None:
    samples = stream(mixed(), 16)
    for source, size in enumerate(SIZES):
        own = samples[source_of(samples) == source] - FIRST[source]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size].tolist()) == [*range(size)]
        assert own[:size].tolist() != own[size : 2 * size].tolist()


def test_passes_count_earlier_passes_over_a_source() -> None:
    order, seen = mixed(), Counter[int]()
    for epoch in range(4):
        places = np.arange(87)
        source, passed = order.source_passes(epoch, places)
        assert source.tolist() == source_of(order(epoch, places)).tolist()
        for one, number in zip(source.tolist(), passed.tolist(), strict=True):
            assert number == seen[one] // SIZES[one]
            seen[one] += 1


def test_a_place_has_its_sample_after_any_request() -> None:
    order = mixed()
    expected = stream(mixed(), 4).reshape(4, 87)
    for epoch, place in product((3, 0, 2, 1, 3), (86, 0, 44, 7, 8)):
        assert order(epoch, np.array([place])).tolist() == [expected[epoch, place]]
    assert order(2, np.array([80, 1, 1, 40])).tolist() == expected[2, [80, 1, 1, 40]].tolist()


def test_the_order_is_frozen() -> None:
    assert (
        sha256(stream(mixed(), 3).astype("<i8").tobytes()).hexdigest()
        == "b809a78874a06e776fce99df993ac26196c1257deef05982e7529cc1ba8c478b"
    )


def test_neighbouring_seeds_have_orders_of_their_own() -> None:
    one, other = stream(mixed(seed=7), 2), stream(mixed(seed=8), 2)
    assert np.count_nonzero(source_of(one) != source_of(other)) > 40


def test_a_single_source_keeps_its_own_order() -> None:
    order = PermutationOrder(10, seed=3, shuffle=True)
    assert MixtureOrder([order], [1], seed=7)(4, np.arange(10)).tolist() == order(4, np.arange(10)).tolist()


def test_sources_may_lie_in_shards() -> None:
    shards = [(10, 0, 20), (7,)]
    order = MixtureOrder(
        [WindowOrder(one, Interleaving(3, 4, 2), seed=i) for i, one in enumerate(shards)], [3, 1], seed=7
    )
    samples = stream(order, 8)
    own = samples[samples < 30]
    for start in range(0, len(own) - 29, 30):
        assert sorted(own[start : start + 30].tolist()) == [*range(30)]


def test_a_plan_with_sources_comes_back_from_its_recipe() -> None:
    sources = (Source(30, 5, (10, 0, 20)), Source(7, 1), Source(50, 2, (50,)))
    plan = Plan(87, 3, 4, sources=sources, interleaving=Interleaving(2, 8, 2))
    again = Plan.of(json.loads(json.dumps(plan.recipe())))
    assert again.sources == sources
    for epoch in range(3):
        assert again.order()(epoch, np.arange(87)).tolist() == plan.order()(epoch, np.arange(87)).tolist()


def test_equal_sources_of_a_plan_have_orders_of_their_own() -> None:
    order = Plan(200, 3, 4, sources=(Source(100, 1), Source(100, 1))).order()
    samples = order(0, np.arange(200))
    assert np.count_nonzero(samples[samples < 100] == samples[samples >= 100] - 100) < 10


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1], [1]),
        ([0.5, 0.5], [1, 1]),
        ([3, 1], [3, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1, 1, 1], [334, 333, 333]),
        ([1 / 3, 2 / 3], [333, 667]),
        ([999, 1], [999, 1]),
        ([1e-300, 1e-300], [1, 1]),
    ],
)
def test_weights_become_whole_parts_in_lowest_terms(weights: list[float], expected: list[int]) -> None:
    assert integer_shares(weights) == expected


def test_shares_of_many_weights_add_up() -> None:
    assert sum(integer_shares([1.0] * 7)) == sum(integer_shares([0.1] * 11)) == 1000


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=f"positive numbers, not 1, {weight}"):
        integer_shares([1, weight])


def test_a_weight_too_small_to_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a weight of 0\.1 in 1000\.1 is less than one part in 1000"):
        integer_shares([1000, 0.1])


@pytest.mark.parametrize(
    ("sources", "weights"),
    [({}, {}), ({"a": [1]}, {}), ({"a": [1]}, {"b": 1}), ({"a": [1]}, {"a": 1, "b": 1})],
    ids=str,
)
def test_names_that_differ_are_refused(sources: dict[str, Any], weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="a weight for each source"):
        Mixture(sources=sources, weights=weights)


def test_an_empty_source_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="source web of the mixture is empty"):
        Mixture(sources={"books": [1], "web": []}, weights={"books": 1, "web": 1})


def test_an_index_counts_through_the_sources_in_their_order() -> None:
    mixture = Mixture(sources={"a": Named("a", 2), "b": Named("b", 3)}, weights={"b": 3, "a": 1})
    assert len(mixture) == 5
    assert [mixture[i] for i in range(5)] == ["a0", "a1", "b0", "b1", "b2"]
    assert mixture.shares == [1, 3]  # by name, not in the order of the weights


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_an_error(index: int) -> None:
    mixture = Mixture(sources={"a": [1, 2], "b": [3, 4, 5]}, weights={"a": 1, "b": 1})
    with pytest.raises(IndexError, match=f"sample {index} of 5"):
        mixture[index]


def test_a_sample_is_located_in_its_source() -> None:
    mixture = Mixture(sources={"a": [1, 2], "b": Named("b", 3)}, weights={"a": 1, "b": 1})
    assert mixture.locate(1) == "source a, sample 1"
    assert mixture.locate(2) == "source b, line 0 of b.txt"


def test_optional_methods_of_sources_are_passed_on() -> None:
    named = Named("b", 3)
    mixture = Mixture(sources={"a": [1, 2], "b": named}, weights={"a": 1, "b": 1})
    mixture.hold(4, 64)
    assert named.held == (4, 64)
    assert mixture.fingerprint == "print-b"

"""Which sample stands where."""

import tracemalloc
from hashlib import sha256
from itertools import product
from typing import Any

import numpy as np
import pytest

from runner.data.order import LARGEST_SORTED, Indices, PermutationOrder, WeightedOrder
from runner.data.weights import balanced, integer_weights
from runner.errors import DataError


def whole(size: int, *, seed: int = 7, epoch: int = 3) -> Indices:
    return PermutationOrder(size, seed=seed, shuffle=True)(epoch, np.arange(size))


@pytest.mark.parametrize(
    "size", [1, 2, 3, 4, 5, 64, 1000, LARGEST_SORTED - 1, LARGEST_SORTED, LARGEST_SORTED + 1, 100_003, 1 << 17, 10**6]
)
def test_every_sample_has_one_place(size: int) -> None:
    counts = np.bincount(whole(size), minlength=size)
    assert counts.tolist() == [1] * size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1000, "36332592f9bdaee9ff311c57793fddb4e37528e1f25ec3bc83324a2fe00050c6"),
        (LARGEST_SORTED, "33d1e33566019fdfa02b7cfd24192b9039234d919c20676d3451b8605ffbed00"),
        (LARGEST_SORTED + 1, "ec24033c69d9ea470cca353958bbc06d922d7d8b0e0e5962a5a3ec59c96f9898"),
        (10**6, "806b43147f6d0b839de24fb21fbdffc4cca0a53829ef11f1ed146dce38aa5b12"),
    ],
)
def test_the_order_is_frozen(size: int, expected: str) -> None:
    assert sha256(whole(size).astype("<i8").tobytes()).hexdigest() == expected


@pytest.mark.parametrize("size", [1000, LARGEST_SORTED + 1])
def test_neighbouring_seeds_and_epochs_have_orders_of_their_own(size: int) -> None:
    orders = [whole(size, seed=seed, epoch=epoch) for seed, epoch in product(range(3), range(3))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.count_nonzero(one == other) < 10  # about one, were they drawn at random


@pytest.mark.parametrize("size", [1000, LARGEST_SORTED + 1])
def test_a_place_has_its_sample_after_any_request(size: int) -> None:
    order = PermutationOrder(size, seed=7, shuffle=True)
    for epoch in (0, 1, 2, 1, 5, 0):
        expected = whole(size, epoch=epoch)
        assert order(epoch, np.array([5, 3, 3])).tolist() == expected[[5, 3, 3]].tolist()
        assert order(epoch, np.arange(990, 1000)).tolist() == expected[990:1000].tolist()


def test_without_shuffle_a_sample_stands_at_its_own_place() -> None:
    assert PermutationOrder(10, seed=7, shuffle=False)(4, np.arange(10)).tolist() == list(range(10))


def test_a_billion_samples_need_no_list_of_them() -> None:
    order = PermutationOrder(10**9, seed=7, shuffle=True)
    tracemalloc.start()
    try:
        last = order(3, np.arange(10**9 - 4, 10**9))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert last.tolist() == [459227655, 904916115, 858365267, 627782834]
    assert peak < 1 << 20


def weighted(size: int, weights: Any, *, epoch: int = 3) -> Indices:
    order = WeightedOrder(PermutationOrder(size, seed=7, shuffle=True), integer_weights(weights, size), seed=7)
    return order(epoch, np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 7, 1000, LARGEST_SORTED + 1])
def test_a_sample_has_its_share_of_the_places(size: int) -> None:
    """Rounded down or up in each epoch, and on the average as it is."""
    weights = np.random.default_rng(size).exponential(size=size) * (np.arange(size) % 5 != 1)
    share = weights / weights.sum() * size
    counts = [np.bincount(weighted(size, weights, epoch=epoch), minlength=size) for epoch in range(30)]
    assert all(((count >= np.floor(share - 1e-6)) & (count <= np.ceil(share + 1e-6))).all() for count in counts)
    assert np.abs(np.mean(counts, axis=0) - share).mean() < 0.1
    if size > 100:
        assert not np.array_equal(counts[0], counts[1])


def test_the_weighted_order_is_frozen() -> None:
    order = weighted(1000, np.arange(1000) % 7)
    assert (
        sha256(order.astype("<i8").tobytes()).hexdigest()
        == "c4403690b3789e985425ecdd723331ff22587b9a4d4eb8009888f5d82d120831"
    )
    assert np.corrcoef(order[1:], order[:-1])[0, 1] < 0.1  # shuffled


def test_equal_weights_draw_every_sample_once() -> None:
    assert sorted(weighted(999, np.full(999, 0.1))) == [*range(999)]


def test_weights_change_with_the_epoch() -> None:
    easy = np.arange(10) < 4
    phases = {0: easy, 2: np.ones(10)}
    assert set(weighted(10, phases, epoch=1)) == {0, 1, 2, 3}
    for epoch in (2, 9):
        assert set(weighted(10, phases, epoch=epoch)) == {*range(10)}


class Labelled(list[str]):
    targets = ("a", "b", "b", "b", "b", "b", "b", "b")


def test_balanced_classes_are_drawn_equally_often() -> None:
    weights = balanced(Labelled("xyyyyyyy"))
    assert np.bincount(weighted(8, weights)).tolist()[0] == 4


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0, 2.0], r"shape \[2\]; expected one for each of 3 samples"),
        ([1.0, -2.0, 1.0], "numbers from 0 on"),
        ([0.0, 0.0, 0.0], "not all 0"),
        ([1.0, np.inf, 0.0], "finite"),
        ({1: [1.0, 1.0, 1.0]}, "the epochs 1: expected 0"),
        ({}, "the epochs none"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        integer_weights(weights, 3)


def test_a_data_set_without_labels_is_named() -> None:
    with pytest.raises(DataError, match=r"list has no targets .* data.weights.labels"):
        balanced(["x"])

"""The order of samples that lie in shards, and which data worker reads what of it."""

import tracemalloc
from collections.abc import Sequence
from hashlib import sha256
from itertools import product

import numpy as np
import pytest

from runner.data.order import Indices, Interleaving, WindowOrder

LAYOUTS = [(1,), (0, 1, 0), (3, 0, 5, 1), (0, 0, 17), (1,) * 30, (10, 20, 30, 7), (100,), (99, 1), (64, 0, 64)]
STREAMS = [
    Interleaving(1, 1, 1),
    Interleaving(1, 8, 3),
    Interleaving(3, 4, 2),
    Interleaving(4, 16, 4),
    Interleaving(7, 5, 8),
    Interleaving(128, 2, 1),
]


def whole(shards: Sequence[int], streams: Interleaving, *, seed: int = 7, epoch: int = 3) -> Indices:
    return WindowOrder(shards, streams, seed=seed)(epoch, np.arange(sum(shards)))


def shard_of(shards: Sequence[int], samples: Indices) -> Indices:
    return np.searchsorted(np.cumsum(shards), samples, side="right")


@pytest.mark.parametrize("streams", STREAMS, ids=str)
@pytest.mark.parametrize("shards", LAYOUTS, ids=str)
def test_every_sample_has_one_place(shards: tuple[int, ...], streams: Interleaving) -> None:
    assert sorted(whole(shards, streams).tolist()) == [*range(sum(shards))]


def test_every_sample_has_one_place_at_sizes_around_a_round() -> None:
    streams = Interleaving(4, 6, 3)
    for size in range(1, 4 * 3 * 4 + 2):
        assert sorted(whole((size // 3, size - size // 3), streams).tolist()) == [*range(size)]


@pytest.mark.parametrize("streams", STREAMS, ids=str)
def test_a_place_has_its_sample_in_any_request(streams: Interleaving) -> None:
    shards = (10, 0, 20, 31, 7)
    order = WindowOrder(shards, streams, seed=7)
    for epoch in (0, 1, 2, 0):
        expected = whole(shards, streams, epoch=epoch).tolist()
        assert [int(order(epoch, np.array([place]))[0]) for place in range(68)] == expected
        assert order(epoch, np.array([67, 3, 3, 40])).tolist() == [expected[place] for place in (67, 3, 3, 40)]


def test_places_are_left_as_they_are() -> None:
    places = np.arange(40)
    WindowOrder((20, 20), Interleaving(3, 4, 2), seed=7)(0, places)
    assert places.tolist() == [*range(40)]


def test_the_order_is_frozen() -> None:
    shards = [17 * i % 50 for i in range(100)]
    found = sha256(whole(shards, Interleaving(8, 64, 4)).astype("<i8").tobytes()).hexdigest()
    assert found == "2bb6bcc4553a0a2e6aad4c5065d1925f7501cd9ef57d755c96e3be45567baea1"


def test_neighbouring_seeds_and_epochs_have_orders_of_their_own() -> None:
    shards, streams = (100,) * 10, Interleaving(4, 50, 5)
    orders = [whole(shards, streams, seed=seed, epoch=epoch) for seed, epoch in product(range(3), range(3))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.count_nonzero(one == other) < 120  # a shard may come to lie where it was


def test_an_epoch_is_one_pass_over_one_source() -> None:
    source, passed = WindowOrder((5, 5), Interleaving(2, 2, 1), seed=7).source_passes(3, np.array([0, 9]))
    assert (source.tolist(), passed.tolist()) == ([0, 0], [3, 3])


def test_a_reader_needs_one_window_of_each_stream_at_a_time() -> None:
    """A window is a run of the joined shards; of shards, so few are open as streams and borders within windows ask."""
    shards, streams = (40,) * 100, Interleaving(5, 80, 4)
    samples = whole(shards, streams)
    for start in range(
        0, 4000, 400
    ):  # in 400 positions each stream goes through one window of 80 = two or three shards
        of_all = shard_of(shards, samples[start : start + 400])
        assert len(set(of_all.tolist())) <= 5 * 3
    for stream in range(5):
        own = shard_of(shards, samples.reshape(-1, 5, 4)[:, stream].ravel())
        visited = own[np.flatnonzero(np.diff(own, prepend=-1))]
        last = {shard: place for place, shard in enumerate(own.tolist())}
        assert len(visited) > 20  # shuffled
        for shard in last:
            assert last[shard] - own.tolist().index(shard) < 80  # and done with soon


def test_a_whole_window_is_read_before_the_next_one() -> None:
    """With one shard, windows are ranges of indices; the leftovers of the last round stay in theirs."""
    samples = whole((100,), Interleaving(3, 10, 4))
    per_stream: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in samples.tolist():
        per_stream[(index >= 33) + (index >= 66)].append(index)
    for first, end, stream in ((0, 33, 0), (33, 66, 1), (66, 100, 2)):
        windows = [(index - first) // 10 for index in per_stream[stream]]
        assert len(windows) == end - first
        assert windows == sorted(windows)
        assert per_stream[stream] != sorted(per_stream[stream])


def test_a_billion_samples_need_no_list_of_them() -> None:
    order = WindowOrder([10**6] * 1000, Interleaving(16, 4096, 4), seed=7)
    tracemalloc.start()
    try:
        last = order(3, np.arange(10**9 - 64, 10**9))
        first = order(3, np.arange(64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len({*last.tolist(), *first.tolist()}) == 128
    assert peak < 4 << 20


def readers(streams: Interleaving, workers: int, *, slice_size: int, world: int, slices: int) -> list[set[int]]:
    """The streams that every data worker of every process reads: slice k goes to rank k % world, and there in turn."""
    found: list[set[int]] = [set() for _ in range(workers * world)]
    for k in range(slices):
        places = np.arange(k * slice_size, (k + 1) * slice_size)
        worker = k // world % workers * world + k % world
        found[worker] |= {*(places // streams.chunk % streams.count).tolist()}
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [8, 12, 16, 24])
def test_no_two_workers_read_one_stream(count: int, wanted: int, chunks: int, world: int) -> None:
    streams = Interleaving(count, 64, 4)
    workers = streams.max_workers(wanted, slice_size=4 * chunks, world=world)
    assert 1 <= workers <= wanted
    if workers > 1:
        found = readers(streams, workers, slice_size=4 * chunks, world=world, slices=3 * count)
        assert sum(map(len, found)) == len(set().union(*found)) == count


@pytest.mark.parametrize(
    ("count", "wanted", "world", "workers"),
    [
        (16, 4, 1, 4),
        (16, 3, 1, 2),
        (16, 5, 1, 4),
        (12, 5, 1, 3),
        (16, 4, 2, 2),
        (16, 8, 2, 2),
        (7, 4, 1, 1),
        (16, 1, 1, 1),
        (16, 0, 1, 0),
    ],
)
def test_workers_are_rounded_down_to_divide_the_streams(count: int, wanted: int, world: int, workers: int) -> None:
    assert Interleaving(count, 64, 2).max_workers(wanted, slice_size=8, world=world) == workers

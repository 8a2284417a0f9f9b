"""Exchanges between processes over a store: threads stand for processes, each with a connection of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from threads import ThreadRanks, ends_among
from torch._C._distributed_c10d import PrefixStore, TCPStore

from runner.distributed.communicator import gather, on_all_ranks, on_rank_zero
from runner.distributed.processes import Channel, PeerFailed
from runner.distributed.watchdog import MAIN, Failure, Watchdog
from runner.distributed.world import World
from runner.errors import DataError, EvaluationFailed

SIZE = 3
Work = Callable[[Channel, Watchdog], Any]


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def together(server: TCPStore, work: Work) -> list[Any]:
    """What each of three returns."""

    def connect(name: str) -> PrefixStore:
        return PrefixStore(name, TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False))

    def one(rank: int) -> Any:
        world = World(rank, SIZE)
        watch = Watchdog(connect("watch"), world, timeout=60, patience=0)
        try:
            return work(Channel(connect("channel"), world, watch, thread=MAIN), watch)
        finally:
            watch.close()

    with ThreadPoolExecutor(SIZE) as pool:
        return [*pool.map(one, range(SIZE))]


def test_broadcast_and_gather_reach_all_ranks(server: TCPStore) -> None:
    def work(channel: Channel, watch: Watchdog) -> Any:
        return channel.broadcast({"from": channel.rank}), channel.gather([channel.rank, 1.5, None])

    assert together(server, work) == [
        ({"from": 0}, [[0, 1.5, None], [1, 1.5, None], [2, 1.5, None]]),
        ({"from": 0}, None),
        ({"from": 0}, None),
    ]


def test_exchanged_values_are_not_kept(server: TCPStore) -> None:
    def work(channel: Channel, watch: Watchdog) -> None:
        for number in range(50):
            assert channel.broadcast(number if channel.rank == 0 else None) == number
            channel.gather("x" * 100)

    together(server, work)
    assert server.num_keys() <= 2 * SIZE + 2  # beats, and what the store has of its own


def test_an_error_of_one_rank_is_raised_on_all(server: TCPStore) -> None:
    def refuse() -> None:
        raise DataError("mine", kind="sample-changed")

    def work(channel: Channel, watch: Watchdog) -> list[tuple[str, str]]:
        raised = []
        for act in (
            lambda: on_rank_zero(channel, refuse),
            lambda: gather(channel, refuse if channel.rank == 2 else str),
        ):
            with pytest.raises(DataError) as error:
                act()
            raised.append((str(error.value), error.value.kind))
        return raised

    assert together(server, work) == [[("mine", "sample-changed"), ("rank 2: mine", "sample-changed")]] * SIZE


def test_a_rank_that_waits_for_a_failed_rank_gets_its_error(server: TCPStore) -> None:
    failed = threading.Event()

    def work(channel: Channel, watch: Watchdog) -> Failure | None:
        if channel.rank == 2:
            watch.fail(Failure(2, 5, "gone"))
            failed.set()
            return watch.failure
        failed.wait(30)
        later = watch.fail(Failure(channel.rank, 1, "another reason")) if channel.rank == 1 else None
        with pytest.raises(PeerFailed, match="gone") as error:
            channel.gather(None) if channel.rank == 0 else channel.broadcast(None)
        assert error.value.status == 5
        return later or watch.failure

    assert together(server, work) == [Failure(2, 5, "gone")] * SIZE


def test_an_error_keeps_its_class_kind_and_status() -> None:
    def fail() -> None:
        error = EvaluationFailed("no", kind="mine")
        error.status = 2
        raise error

    def work(comm: ThreadRanks) -> None:
        on_all_ranks(comm, fail if comm.rank == 1 else lambda: None)

    for error in ends_among(3, work):
        assert isinstance(error, EvaluationFailed)
        assert (str(error), error.kind, error.status) == ("rank 1: no", "mine", 2)

"""From a configuration and a data set to a stream: which tier, which plan, how many workers."""

import logging
from typing import Any

import pytest
import torch
from defaults import configured as default_config

from runner.data.iterable import IterableStream
from runner.data.loader import LoaderOptions
from runner.data.mixture import Mixture
from runner.data.order import Interleaving
from runner.data.stream import MapStyleStream, TrainingStream
from runner.data.training_data import training_data
from runner.distributed.world import World
from runner.errors import DataError

CPU = torch.device("cpu")


class Shards:
    """Numbers in shards; notes how much is read in turn."""

    counts = (40, 0, 60)
    lengths = (1, 2) * 50
    held = (0, 0)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        return index

    def hold(self, windows: int, window: int) -> None:
        self.held = (windows, window)


def made(samples: Any, *, workers: int = 0, **data: Any) -> tuple[TrainingStream, Any]:
    config = default_config({"data": {"batch_size": 16, "randomness": "off"} | data})
    return training_data(config, samples, LoaderOptions(workers), CPU, None, World())  # type: ignore[arg-type]


def test_a_list_is_shuffled_as_a_whole() -> None:
    stream, plan = made([1, 2, 3])
    assert isinstance(stream, MapStyleStream)
    assert (plan.interleaving, plan.shards) == (None, ())


@pytest.mark.parametrize(("batch", "chunk"), [(1, 1), (3, 1), (4, 1), (9, 1), (10, 2), (16, 4), (64, 16), (13, 1)])
def test_a_micro_batch_is_a_whole_number_of_chunks(batch: int, chunk: int) -> None:
    _, plan = made(Shards(), batch_size=batch)
    assert plan.shards == (40, 0, 60)
    assert plan.interleaving == Interleaving(96, 128, chunk)


def test_streams_that_are_read_in_turn_stay_open() -> None:
    for workers, windows in ((0, 96), (2, 61), (4, 31)):
        samples = Shards()
        made(samples, workers=workers)
        assert samples.held == (windows, 128)


def test_workers_that_would_read_the_same_streams_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "runner"):
        stream, _ = made(Shards(), workers=5)
    assert stream.workers == 4
    assert "4, not 5" in caplog.text
    assert "a multiple of runtime.num_workers x 4" in caplog.text


@pytest.mark.parametrize("how", [{"streams": {"count": 0}}, {"shuffle": False}])
def test_shards_may_be_read_in_any_order(how: dict[str, Any]) -> None:
    samples = Shards()
    stream, plan = made(samples, workers=5, **how)
    assert (plan.interleaving, plan.shards, stream.workers, samples.held) == (None, (), 5, (0, 0))


def test_batches_by_length_hold_all_streams_in_every_worker() -> None:
    samples = Shards()
    stream, plan = made(samples, workers=5, max_tokens=12)
    assert (plan.lengths, stream.workers, samples.held) == ((1, 2) * 50, 5, (192, 128))
    mixed = Mixture(sources={"a": samples, "b": [1, 2]}, weights={"a": 3, "b": 1})
    stream, plan = made(mixed, workers=3)
    assert [(source.samples, source.share, source.shards) for source in plan.sources] == [
        (100, 3, (40, 0, 60)),
        (2, 1, ()),
    ]
    assert (stream.workers, samples.held) == (3, (192, 128))


def test_counts_that_are_something_else_are_refused() -> None:
    class Classes(Shards):
        counts = (10, 10)

    with pytest.raises(DataError, match=r"add up to 20, its length is 100.*data\.streams\.count=0"):
        made(Classes())
    made(Classes(), streams={"count": 0})


def test_an_iterable_is_opaque() -> None:
    stream, plan = made(Stated())
    assert isinstance(stream, IterableStream)
    assert plan is None


class Stated:
    """An iterable with a state."""

    def __iter__(self) -> Any:
        return iter([1, 2])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

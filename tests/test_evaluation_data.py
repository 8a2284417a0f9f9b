"""Evaluation data dealt out to several processes."""

from typing import Any

import pytest
import torch

from runner.data.loader import LoaderOptions
from runner.data.stream import EvaluationData
from runner.distributed.world import World
from runner.errors import DataError

SIZES = [1, 2, 4, 5, 8, 9, 15, 16, 17]
CPU = torch.device("cpu")


def data(samples: Any, *, rank: int = 0, size: int = 1, workers: int = 0, **others: Any) -> EvaluationData:
    values = {"seed": 1, "batch_size": 4, "randomness": "sample", "loading": LoaderOptions(workers), "device": CPU}
    return EvaluationData(samples, world=World(rank, size), **(values | others))


def dealt(samples: Any, world: int, **others: Any) -> list[list[tuple[int, torch.Tensor]]]:
    """What every process gets."""
    return [[*data(samples, rank=rank, size=world, **others)] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_every_sample_counts_exactly_once(size: int, world: int) -> None:
    batches = [each for own in dealt(range(size), world) for each in own]
    counted = [index for weight, batch in batches if weight for index in batch.tolist()]
    assert sorted(counted) == [*range(size)]
    assert sum(weight for weight, _ in batches) == size
    assert all(weight in (0, len(batch)) for weight, batch in batches)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_all_processes_have_as_many_batches_and_none_is_empty(size: int, world: int) -> None:
    found = dealt(range(size), world)
    assert {len(own) for own in found} == {-(-size // (4 * world))}
    assert all(len(batch) for own in found for _, batch in own)


def test_only_the_last_round_is_padded() -> None:
    for own in dealt(range(17), 4):
        assert all(weight for weight, _ in own[:-1])
    assert [own[-1][0] for own in dealt(range(17), 4)] == [1, 0, 0, 0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_the_mean_is_that_of_one_process(size: int, world: int) -> None:
    def mean(world: int) -> float:
        batches = [each for own in dealt([float(i * i) for i in range(size)], world) for each in own]
        return float(sum(weight * batch.mean() for weight, batch in batches) / sum(weight for weight, _ in batches))

    assert mean(world) == pytest.approx(mean(1))


class Noisy:
    """Samples that draw, and of which one cannot be read."""

    def __init__(self, size: int, bad: int | None = None) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.bad:
            raise ValueError("cut off")
        return torch.rand(3)


def test_draws_of_a_sample_do_not_depend_on_the_processes() -> None:
    alone = [batch.tolist() for _, batch in dealt(Noisy(17), 1)[0]]
    for world in (2, 4):
        found = dealt(Noisy(17), world)
        assert [found[k % world][k // world][1].tolist() for k in range(5)] == alone


def test_padding_is_the_same_in_every_pass_and_with_workers() -> None:
    once = data(range(5), rank=3, size=4)
    expected = [(0, [0, 1, 2, 3])]
    for _ in range(2):
        assert [(weight, batch.tolist()) for weight, batch in once] == expected
    assert [(weight, batch.tolist()) for weight, batch in data(range(5), rank=3, size=4, workers=1)] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_is_reported_by_number_where_it_counts(workers: int) -> None:
    samples = Noisy(16, bad=5)
    assert len([*data(samples, rank=0, size=2, workers=workers)]) == 2
    with pytest.raises(DataError, match=r"sample 5 of Noisy cannot be read \(position 5\):[\s\S]*ValueError: cut off"):
        list(data(samples, rank=1, size=2, workers=workers))


def test_a_bad_record_is_never_replaced() -> None:
    with pytest.raises(DataError, match=r"fix it or take it out of data\.validation"):
        list(data(Noisy(3, bad=2)))

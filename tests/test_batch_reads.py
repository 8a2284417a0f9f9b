"""``__getitems__``, torch's protocol for reading the samples of a batch at once: used where it changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from runner.data.fetch import Fetcher
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan
from runner.data.probe import check_samples
from runner.data.stream import MapStyleStream

N, BATCH = 30, 5
CPU = torch.device("cpu")


class Single:
    """Notes its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        self.calls.append(index)
        return torch.tensor([index, 2 * index])


class Batched(Single):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        self.calls.append(tuple(indices))
        return [torch.tensor([index, 2 * index]) for index in indices]


class DrawsLate(Batched):
    """Draws at samples that the probe does not see; a batch draws for its last sample first."""

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.randint(100, (2,)) if N - 5 < index < N - 1 else 0
        return torch.tensor([index, 2 * index]) + noise

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices[::-1]][::-1]


class Other(Batched):
    """A batch is not the samples one by one."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [torch.tensor([index, 2 * index]) + len(indices) for index in indices]


class Collated(Batched):
    """A batch is one object."""

    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": torch.tensor(indices)}


class Broken(Batched):
    """A record cannot be read in a batch."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        if 13 in indices:
            raise OSError("a block is damaged")
        return super().__getitems__(indices)


class Short(Batched):
    """Leaves out a sample."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return super().__getitems__([index for index in indices if index != 13])


def fetcher(samples: Any, *, randomness: str = "sample", audit: bool = True) -> Fetcher:
    reader = Fetcher(samples, Plan(N, 1, BATCH, randomness=randomness), label="train")
    check_samples(reader, LoaderOptions(), audit=audit)
    return reader


def batches(samples: Any, workers: int = 0, randomness: str = "sample") -> list[Any]:
    plan = Plan(N, 1, BATCH, randomness=randomness)
    stream = MapStyleStream(Fetcher(samples, plan, label="train"), loading=LoaderOptions(workers), device=CPU)
    stream.open()
    read = []
    for _ in range(2 * N // BATCH):
        read += [batch for _, batch in stream.step()]
        stream.advance()
    stream.close()
    return read


@pytest.mark.parametrize("audit", [True, False])
@pytest.mark.parametrize("randomness", ["sample", "batch", "off"])
def test_a_batch_is_one_call(randomness: str, audit: bool) -> None:
    samples = Batched()
    reader = fetcher(samples, randomness=randomness, audit=audit)
    samples.calls.clear()
    slice_ = next(iter(reader.plan.steps(0, reader.order)))[0]
    assert len(reader[slice_].batch) == BATCH
    assert [len(call) for call in samples.calls] == [BATCH]


@pytest.mark.parametrize("kind", [Other, Collated])
def test_a_batch_that_differs_is_not_used(kind: type[Batched]) -> None:
    assert not fetcher(kind()).by_batch
    assert all(map(torch.equal, batches(kind()), batches(Single())))


@pytest.mark.parametrize("kind", [Batched, Broken, Short])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_samples_are_those_read_one_by_one(kind: type[Batched], workers: int) -> None:
    assert fetcher(kind()).by_batch
    assert all(map(torch.equal, batches(kind(), workers), batches(Single())))


def test_draws_keep_a_seed_for_each_sample() -> None:
    class OneByOne(DrawsLate):
        __getitems__ = None  # type: ignore[assignment]

    assert fetcher(DrawsLate()).by_batch
    assert all(map(torch.equal, batches(DrawsLate()), batches(OneByOne())))


def test_a_data_set_of_hugging_face_is_read_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"x": [[i, 2 * i] for i in range(N)], "y": [*range(N)]}).with_format("torch")

    class OneByOne:
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            return dataset[index]

    assert fetcher(dataset).by_batch
    for batch, other in zip(batches(dataset), batches(OneByOne()), strict=True):
        assert torch.equal(batch["x"], other["x"])
        assert torch.equal(batch["y"], other["y"])
        assert batch["x"].dtype == other["x"].dtype

"""Data sets of Hugging Face's library: what is promised for them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from runner.data.fetch import Fetcher
from runner.data.iterable import BatchOptions, IterableStream
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan
from runner.data.stream import MapStyleStream
from runner.errors import DataError

N, BATCH = 22, 4
CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small data set on disk; nothing of the network and of the home directory is touched."""
    for name in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
    ):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"x": [*range(N)], "name": [f"sample {number}" for number in range(N)]})
    made.save_to_disk(str(tmp_path / "data"))
    return datasets.load_from_disk(str(tmp_path / "data"))


def opaque(samples: Any, workers: int, **how: Any) -> IterableStream:
    options = BatchOptions(seed=1, batch_size=BATCH, randomness="sample", **how)
    return IterableStream(samples, options, micro_batches=1, loading=LoaderOptions(workers), device=CPU)


def steps(live: Any, count: int) -> list[list[int]]:
    found = []
    for _ in range(count):
        found.append([number for _, batch in live.step() for number in batch["x"].tolist()])
        live.advance()
    return found


def differing(samples: Any, workers: int, cuts: range, **how: Any) -> list[int]:
    """The cuts in two passes after which a resume does not bring what an uninterrupted run brings."""
    whole, live = [], opaque(samples, workers, **how)
    live.open()
    states = [live.state_dict()]
    while live.epochs < 2:
        whole += steps(live, 1)
        states.append(live.state_dict())
    for epoch in range(2):
        half = whole[epoch * len(whole) // 2 : (epoch + 1) * len(whole) // 2]
        assert sorted(number for batch in half for number in batch) == [*range(N)]
    found = []
    for cut in cuts:
        again = opaque(samples, workers, **how)
        again.load_state_dict(states[cut])
        found += [cut] if steps(again, len(whole) - cut) != whole[cut:] else []
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_one_is_like_any_other(data: Any, workers: int) -> None:
    fetcher = Fetcher(data.with_format("torch"), Plan(N, 1, BATCH), label="train")
    live = MapStyleStream(fetcher, loading=LoaderOptions(workers), device=CPU)
    live.open()
    drawn = [number for batch in steps(live, 11) for number in batch]
    assert sorted(drawn[:N]) == sorted(drawn[N:]) == [*range(N)]


@pytest.mark.parametrize(("workers", "cuts"), [(0, range(12)), (2, range(1, 12, 3))])
@pytest.mark.parametrize("form", [None, "torch"])
def test_an_unshuffled_iterable_is_resumed_exactly(data: Any, form: str | None, workers: int, cuts: range) -> None:
    assert differing(data.to_iterable_dataset(num_shards=4).with_format(form), workers, cuts) == []


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize(("workers", "cuts"), [(0, range(12)), (2, range(1, 12, 3))])
def test_a_shuffled_one_is_resumed_exactly_by_reading_again(data: Any, size: int, workers: int, cuts: range) -> None:
    shuffled = data.to_iterable_dataset(num_shards=4).shuffle(buffer_size=size, seed=3)
    assert differing(shuffled, workers, cuts, replay=True) == []


def test_a_shuffled_one_is_not_exact_by_its_own_state(data: Any) -> None:
    """So that it is noticed here when it is, and what is said about it can be mended."""
    shuffled = data.to_iterable_dataset(num_shards=4).shuffle(buffer_size=6, seed=3)
    assert differing(shuffled, 0, range(2, 4)) != []
    live = opaque(shuffled.map(dict), 0, audit=True)
    live.open()
    with pytest.raises(DataError, match=r"the state lacks something, as that of Hugging Face's shuffle.*data\.replay"):
        steps(live, 1)

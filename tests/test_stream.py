"""The training stream and its cursor, and passes over evaluation data."""

import json
import random
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from results import generator_bits
from torch.utils.data import DataLoader, IterableDataset

from runner.data.fetch import Fetcher
from runner.data.loader import Loader, LoaderOptions
from runner.data.plan import Plan
from runner.data.stream import EvaluationData, MapStyleStream, to_device
from runner.data.training_data import require_map_style
from runner.errors import DataError

N, BATCH = 10, 4
STEPS = 8  # 32 positions: three epochs and a bit
CPU = torch.device("cpu")


class Noisy:
    """Samples that draw from every global generator."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return index, random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    inner: Any
    name: str = "frozen"


class Named(UserDict[str, Any]):
    """A mapping with more than its items, as tokenizers return."""

    def __init__(self, *given: Any, name: str = "") -> None:
        super().__init__(*given)
        self.name = name


class Plain:
    """An object that knows nothing of devices."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.me, self.name = x, self, "plain"


class Graph:
    """Moves itself, to a new one or in place, and notes how it was asked."""

    def __init__(self, *, in_place: bool = False, simple: bool = False) -> None:
        self.asked: list[Any] = []
        self.in_place, self.simple = in_place, simple

    def to(self, device: torch.device, **how: Any) -> "Graph | None":
        if self.simple and how:
            raise TypeError("unexpected keyword argument")
        self.asked.append((device.type, how))
        return None if self.in_place else self


class Pair(NamedTuple):
    one: torch.Tensor
    two: list[torch.Tensor]


def stream(
    loading: LoaderOptions | None = None, *, batch: int = BATCH, consumed: int = 0, **plan: Any
) -> MapStyleStream:
    fetcher = Fetcher(Noisy(), Plan(N, 1, batch, **plan), label="train")
    opened = MapStyleStream(fetcher, loading=loading or LoaderOptions(), device=CPU)
    opened.consumed = consumed
    opened.open()
    return opened


def bits(batch: list[torch.Tensor]) -> list[bytes]:
    """One line of bytes per sample."""
    return [b"".join(field[row].numpy().tobytes() for field in batch) for row in range(len(batch[0]))]


def samples(opened: MapStyleStream, steps: int) -> list[bytes]:
    """The samples of the next steps, each step taken to its end."""
    found = []
    for _ in range(steps):
        for _, batch in opened.step():
            found += bits(batch)
        opened.advance()
    return found


def indices(opened: MapStyleStream, steps: int) -> list[int]:
    return [int.from_bytes(line[:8], "little") for line in samples(opened, steps)]


@pytest.fixture(scope="module")
def uninterrupted() -> list[bytes]:
    return samples(stream(), STEPS)


@pytest.mark.parametrize(
    "loading",
    [
        LoaderOptions(1),
        LoaderOptions(1, prefetch=1),
        LoaderOptions(3),
        LoaderOptions(3, prefetch=7),
        LoaderOptions(2, start_method="fork"),
        LoaderOptions(1, start_method="spawn"),
    ],
    ids=lambda how: f"{how.num_workers}-{how.prefetch}-{how.start_method}",
)
def test_the_bytes_are_the_same_however_they_are_loaded(loading: LoaderOptions, uninterrupted: list[bytes]) -> None:
    assert samples(stream(loading), STEPS) == uninterrupted


def test_a_plain_torch_loader_yields_the_same_bytes() -> None:
    """So that the day torchdata is gone is a day like any other."""
    plan = Plan(N, 1, BATCH)
    pieces = [step[0] for step in islice(plan.steps(0, plan.order()), STEPS)]
    fetcher = Fetcher(Noisy(), plan, label="train")
    plain: Any = DataLoader(fetcher, batch_size=None, sampler=pieces, num_workers=1, collate_fn=lambda fetched: fetched)
    here = Loader(fetcher, pieces, LoaderOptions())
    assert [(each.first, bits(each.batch)) for each in plain] == [(each.first, bits(each.batch)) for each in here]


def test_every_sample_comes_exactly_once_per_epoch(uninterrupted: list[bytes]) -> None:
    drawn = [int.from_bytes(line[:8], "little") for line in uninterrupted]
    for epoch in range(3):
        assert sorted(drawn[epoch * N : (epoch + 1) * N]) == [*range(N)]
    assert len(set(uninterrupted)) == STEPS * BATCH


def test_a_resume_at_any_step_goes_on_exactly(uninterrupted: list[bytes]) -> None:
    """Killed in the middle of the step after: what was fetched and not finished comes again."""
    for done in range(STEPS):
        killed = stream()
        samples(killed, done)
        next(killed.step())
        saved = json.loads(json.dumps(killed.state_dict()))
        resumed = MapStyleStream(
            Fetcher(Noisy(), Plan(N, 1, BATCH), label="train"), loading=LoaderOptions(), device=CPU
        )
        resumed.load_state_dict(saved)
        assert samples(resumed, STEPS - done) == uninterrupted[done * BATCH :]


def test_a_resume_at_any_position_goes_on_from_there(uninterrupted: list[bytes]) -> None:
    for position in range(3 * N):
        assert samples(stream(consumed=position, batch=1), 2) == uninterrupted[position : position + 2]


def test_every_sample_comes_once_per_epoch_however_a_run_is_cut() -> None:
    """Each life has other workers and another batch size, is killed at a random step and may have read ahead."""
    chance = random.Random(0)
    state = stream(batch=1).state_dict()
    drawn: list[int] = []
    while len(drawn) < 20 * N:
        plan, loading = Plan(N, 1, chance.randint(1, 2 * N)), LoaderOptions(chance.choice([0, 0, 0, 1]))
        life = MapStyleStream(Fetcher(Noisy(), plan, label="train"), loading=loading, device=CPU)
        life.load_state_dict(state)
        drawn += indices(life, chance.randint(0, 3))
        if chance.random() < 0.5:
            next(life.step())
        state = json.loads(json.dumps(life.state_dict()))
    for epoch in range(20):
        assert sorted(drawn[epoch * N : (epoch + 1) * N]) == [*range(N)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cursor_moves_when_a_step_is_done_and_not_before(workers: int) -> None:
    opened = stream(LoaderOptions(workers, prefetch=4))
    before = opened.state_dict()
    for _ in opened.step():
        pass
    assert opened.state_dict() == before
    opened.advance()
    assert opened.state_dict() == before | {"consumed": BATCH}


def test_a_step_that_leaves_samples_is_refused() -> None:
    opened = stream(micro_batches=2)
    next(opened.step())
    with pytest.raises(DataError, match=r"did not take all 2 micro-batches"):
        opened.advance()


def test_a_step_that_takes_exactly_all_batches_is_whole() -> None:
    opened = stream(micro_batches=2)
    batches = opened.step()
    assert [next(batches)[0], next(batches)[0]] == [0.5, 0.5]
    opened.advance()
    assert (opened.consumed, opened.ledger_line(1).last) == (BATCH, BATCH - 1)


def test_the_state_is_the_same_for_any_number_of_workers() -> None:
    found = []
    for workers in (0, 1, 3):
        opened = stream(LoaderOptions(workers))
        samples(opened, 3)
        found.append(opened.state_dict())
    assert found[0] == found[1] == found[2]


def test_epochs_are_counted_when_they_are_consumed() -> None:
    assert [stream(consumed=consumed).epochs for consumed in (0, 9, 10, 19, 20)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_join_to_the_global_batch(micro: int, uninterrupted: list[bytes]) -> None:
    opened = stream(micro_batches=micro)
    sizes = [(share, len(batch[0])) for share, batch in opened.step()]
    assert sizes == [(1 / micro, BATCH // micro)] * micro
    opened.advance()
    assert samples(opened, STEPS - 1) == uninterrupted[BATCH:]
    assert opened.consumed == STEPS * BATCH


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"samples": 11}, "samples: 10 then, 11 now"),
        ({"seed": 2}, "seed: 1 then, 2 now"),
        ({"shuffle": False}, "shuffle: True then, False now"),
        ({"tail": "drop"}, "tail: carry then, drop now"),
        ({"randomness": "off"}, "randomness: sample then, off now"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_position_in_other_data_is_refused(change: dict[str, Any], told: str) -> None:
    saved = stream().state_dict()
    plan = Plan(**({"samples": N, "seed": 1, "batch_size": BATCH} | change))
    with pytest.raises(DataError, match=told) as refused:
        MapStyleStream(Fetcher(Noisy(), plan, label="train"), loading=LoaderOptions(), device=CPU).load_state_dict(
            saved
        )
    assert "run.name" in str(refused.value)


def test_another_batch_size_is_refused_if_it_drops_others() -> None:
    stream(batch=5).load_state_dict(stream(batch=4).state_dict())
    with pytest.raises(DataError, match="batch_size: 4 then, 3 now"):
        stream(batch=3, tail="drop").load_state_dict(stream(batch=4, tail="drop").state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_leave_the_global_generators_alone(workers: int) -> None:
    before = generator_bits()
    samples(stream(LoaderOptions(workers)), 3)
    assert generator_bits() == before


@pytest.fixture(params=[0, 2], ids=lambda workers: f"{workers} workers")
def evaluation(request: pytest.FixtureRequest) -> EvaluationData:
    loading = LoaderOptions(request.param)
    return EvaluationData(Noisy(), seed=1, batch_size=BATCH, randomness="sample", loading=loading, device=CPU)


def test_an_evaluation_sees_every_sample_once_and_in_order(evaluation: EvaluationData) -> None:
    assert [(count, batch[0].tolist()) for count, batch in evaluation] == [
        (4, [0, 1, 2, 3]),
        (4, [4, 5, 6, 7]),
        (2, [8, 9]),
    ]


def test_every_evaluation_is_the_same_and_leaves_no_trace(evaluation: EvaluationData) -> None:
    """Also after one that was cut short by a signal."""
    before = generator_bits()
    first = [bits(batch) for _, batch in evaluation]
    next(iter(evaluation))
    assert [bits(batch) for _, batch in evaluation] == first
    assert generator_bits() == before


def test_an_evaluation_draws_nothing_that_training_draws(uninterrupted: list[bytes]) -> None:
    data = EvaluationData(Noisy(), seed=1, batch_size=3, randomness="sample", loading=LoaderOptions(), device=CPU)
    drawn = {line[8:] for _, batch in data for line in bits(batch)}  # all but the index
    assert len(drawn) == N
    assert not drawn & {line[8:] for line in uninterrupted}


def test_map_style_data_passes_the_check() -> None:
    for data in ([1, 2], Noisy(), torch.arange(3)):
        assert require_map_style(data, "data.train") is data


def test_data_without_positions_is_refused_by_key_and_type() -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([])

    both = "__len__ and __getitem__"
    for data, kind, missing in (
        (iter([1]), "list_iterator", both),
        (Endless(), "Endless", both),
        ({1}, "set", "__getitem__"),
    ):
        with pytest.raises(DataError, match=rf"^data\.train is of class .*{kind} without {missing}; both are needed"):
            require_map_style(data, "data.train")


@pytest.mark.parametrize("length", [2.0, -1, None])
def test_a_length_that_is_no_number_of_samples_is_refused(length: Any) -> None:
    class Odd:
        def __len__(self) -> Any:
            return length

        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(DataError, match=r"^data\.train is of class .*Odd, whose length is not a number of samples: "):
        require_map_style(Odd(), "data.train")


def test_empty_data_is_refused_by_key() -> None:
    with pytest.raises(DataError, match=r"^data\.validation is empty: list of length 0"):
        require_map_style([], "data.validation")


def test_every_tensor_of_a_batch_moves_to_the_device() -> None:
    x = torch.ones(2)
    batch = {"a": x, "b": [x, (x, "text", 3, None)], "c": Pair(x, [x])}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].is_meta
    assert isinstance(moved["b"], list)
    assert moved["b"][0].is_meta
    assert moved["b"][1][0].is_meta
    assert moved["b"][1][1:] == ("text", 3, None)
    assert isinstance(moved["c"], Pair)
    assert moved["c"].one.is_meta
    assert moved["c"].two[0].is_meta
    assert to_device(batch, CPU) is batch


def test_batches_of_any_kind_move_to_the_device() -> None:
    x, meta = torch.ones(2), torch.device("meta")
    named = to_device(Named({"x": x, "n": [x]}, name="tokens"), meta)
    assert (type(named), named.name, named["x"].is_meta, named["n"][0].is_meta) == (Named, "tokens", True, True)
    ordered = to_device(OrderedDict(b=x, a=1), meta)
    assert (type(ordered), [*ordered], ordered["b"].is_meta) == (OrderedDict, ["b", "a"], True)
    made = to_device(defaultdict(list, x=x), meta)
    assert (made["x"].is_meta, made["other"]) == (True, [])
    assert to_device(MappingProxyType({"x": x}), meta)["x"].is_meta
    frozen = to_device(Frozen(x, {"y": Frozen(x, None)}), meta)
    assert (frozen.x.is_meta, frozen.inner["y"].x.is_meta, frozen.name) == (True, True, "frozen")
    assert not x.is_meta
    plain = Plain(x)
    moved = to_device(plain, meta)
    assert (moved.x.is_meta, plain.x.is_meta, moved.name) == (True, False, "plain")
    packed = to_device(torch.nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)]), meta)
    assert (packed.data.is_meta, packed.batch_sizes.is_meta) == (True, False), "these stay on the host"


@pytest.mark.parametrize("how", [{}, {"in_place": True}, {"simple": True}], ids=str)
def test_an_object_that_moves_itself_does(how: dict[str, bool]) -> None:
    graph = Graph(**how)
    assert to_device([graph], torch.device("meta"))[0] is graph
    assert graph.asked == [("meta", {} if how.get("simple") else {"non_blocking": True})]
    assert to_device(graph, CPU) is graph
    assert len(graph.asked) == 1


def test_a_batch_without_tensors_is_not_copied() -> None:
    for value in ("text", b"bytes", 3, None, range(3), object(), np.ones(2), str):
        assert to_device(value, torch.device("meta")) is value


def test_a_state_that_is_ignored_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Remembers(Noisy):
        def state_dict(self) -> dict[str, Any]:
            raise AssertionError

        load_state_dict = state_dict

    for key in ("data.train", "data.validation"):
        require_map_style(Remembers(), key)
        assert f"ignored  state_dict of {key} (a " in caplog.text
    caplog.clear()
    require_map_style(Noisy(), "data.train")
    assert not caplog.text

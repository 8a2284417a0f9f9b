"""A generator is seeded for samples only once a sample was seen to draw from it. No sample may show this: each data set
here is read once as it is, and once by a fetcher that seeds everything from the start.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate, get_worker_info

from runner.data import probe, sandbox
from runner.data.fetch import Fetcher
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan, Slice
from runner.data.stream import MapStyleStream
from runner.rng import Generators, seed_all

N = 48
ALL = frozenset({"python", "numpy", "torch"})
CPU = torch.device("cpu")


def of_python() -> float:
    return random.gauss(0, 1)


def of_numpy() -> float:
    return float(np.random.randn())


def of_torch() -> float:
    return torch.randn(()).item()


DRAWS: dict[str, Callable[[], float]] = {"python": of_python, "numpy": of_numpy, "torch": of_torch}


class Data:
    """Samples made by a function of data set and index; counts how often each is read."""

    def __init__(self, make: Callable[["Data", int], Any], size: int = N) -> None:
        self.make = make
        self.reads = [0] * size

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return index, self.make(self, index)


def rarely(generator: str) -> Callable[[Data, int], Any]:
    """Draws in one of all samples."""
    return lambda data, index: DRAWS[generator]() if index == 29 else 0.0


def later(generator: str) -> Callable[[Data, int], Any]:
    """Draws from the second epoch on."""
    return lambda data, index: DRAWS[generator]() if sum(data.reads) > N else 0.0


def in_turn(data: Data, index: int) -> Any:
    """Draws from another generator in each third of the samples."""
    return [*DRAWS.values()][index % 3]()


def seeds_itself(data: Data, index: int) -> Any:
    """Seeds the generators, draws from them, and leaves them in one and the same state."""
    ambient = of_numpy() if index == 11 else 0.0
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(index)
    drawn = [draw() for draw in DRAWS.values()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    return ambient, drawn


def seeds_alone(data: Data, index: int) -> Any:
    return torch.manual_seed(index).initial_seed()


def stores(data: Data, index: int) -> Any:
    """Draws one gaussian, of a pair of which the other is in store for the next draw."""
    return np.random.standard_normal() if index > 30 else 0.0


def fails(data: Data, index: int) -> Any:
    """Whether it can be read depends on a draw."""
    if random.random() < 0.3:
        raise ValueError(index)
    return of_python()


KINDS: dict[str, Callable[[Data, int], Any]] = {
    **{f"rarely {name}": rarely(name) for name in DRAWS},
    **{f"later {name}": later(name) for name in DRAWS},
    "in turn": in_turn,
    "seeds itself": seeds_itself,
    "seeds alone": seeds_alone,
    "stores": stores,
    "fails": fails,
}


def noisy(rows: list[Any]) -> Any:
    return rows, [draw() for draw in DRAWS.values()]


def fetcher(
    make: Callable[[Data, int], Any], *, generators: frozenset[str] = frozenset(), size: int = N, **options: Any
) -> Fetcher:
    plan = Plan(size, 1, 4, randomness=options.pop("randomness", "sample"))
    made = Fetcher(Data(make, size), plan, label="train", substitute=True, **{"collate": list, **options})
    made.generators = generators
    return made


def batches(made: Fetcher, epochs: int = 3) -> list[Any]:
    count = epochs * len(made.samples) // 4
    return [(each.batch, each.bad_records) for each in (made[Slice(4 * number, 4)] for number in range(count))]


def without_errors(found: list[Any]) -> list[Any]:
    """Texts of errors name lines of the code."""
    return [(batch, [(bad.position, bad.index, bad.substitute) for bad in records]) for batch, records in found]


@pytest.mark.parametrize("randomness", ["sample", "batch"])
@pytest.mark.parametrize("collate", [list, noisy])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_that_of_full_seeding(kind: str, collate: Any, randomness: str) -> None:
    seed_all(5)
    options = {"collate": collate, "randomness": randomness}
    expected = without_errors(batches(fetcher(KINDS[kind], generators=ALL, **options)))
    seed_all(6)
    assert without_errors(batches(fetcher(KINDS[kind], **options))) == expected


@pytest.mark.parametrize("generator", DRAWS)
def test_one_sample_of_a_thousand_that_draws_is_seen(generator: str) -> None:
    expected = batches(fetcher(rarely(generator), generators=ALL, size=1000), 2)
    made = fetcher(rarely(generator), size=1000)
    assert batches(made, 2) == expected
    assert made.generators == {generator}
    assert sum(made.samples.reads) == 2004  # type: ignore[attr-defined]  # one slice was read again


def test_nothing_is_seeded_for_samples_that_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fetcher(lambda data, index: index, collate=None)
    monkeypatch.setattr(random, "seed", None)
    monkeypatch.setattr(np.random, "seed", None)
    batches(made)
    assert made.generators == frozenset()
    assert {*made.samples.reads} == {3}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warm", ["nothing", "a gaussian", "moves"])
def test_generators_of_training_do_not_move(kind: str, warm: str) -> None:
    """Whatever training does with them between two batches, and whatever gaussians they have in store."""

    def trained(read: Callable[[int], object]) -> list[Any]:
        seed_all(7)
        drawn: list[Any] = []
        for number in range(N // 4):
            read(number)
            drawn.append(of_torch())
            if warm == "a gaussian" or (warm == "moves" and number % 3 == 1):
                drawn += [random.gauss(0, 1), np.random.standard_normal()]
            if warm == "moves" and number % 4 == 2:
                state = np.random.get_state()
                drawn.append(np.random.standard_normal())
                read(number)
                np.random.set_state(state)
        state = Generators().state_dict()
        return [*drawn, random.gauss(0, 1), np.random.standard_normal(), state["torch"].tolist(), state["numpy"][2:]]

    made = fetcher(KINDS[kind], generators=frozenset({"numpy"} if kind in ("rarely numpy", "stores") else ()))
    assert trained(lambda number: made[Slice(4 * number, 4)]) == trained(lambda number: None)


def test_another_generator_of_numpy_stays_in_place() -> None:
    before = np.random.get_bit_generator()
    try:
        for bits in (np.random.PCG64(3), np.random.MT19937(3), np.random.SFC64(3)):
            np.random.set_bit_generator(bits)
            np.random.standard_normal()
            state = repr(np.random.get_state(legacy=False))
            assert batches(fetcher(in_turn)) == batches(fetcher(in_turn, generators=ALL))
            assert repr(np.random.get_state(legacy=False)) == state
            assert np.random.get_bit_generator() is bits
    finally:
        np.random.set_bit_generator(before)


def test_sandboxes_within_each_other_leave_no_trace() -> None:
    """A data set may read from another one in the same way."""
    inner = fetcher(in_turn)
    outer = fetcher(lambda data, index: (of_numpy(), inner[Slice(index, 1)].batch, of_numpy(), of_torch()))
    alone = fetcher(lambda data, index: (of_numpy(), [], of_numpy(), of_torch()))
    found = [[(row[0], row[2:]) for _, row in batch] for batch, _ in batches(outer, 1)]
    assert found == [[(row[0], row[2:]) for _, row in batch] for batch, _ in batches(alone, 1)]


def looks(data: Data, index: int) -> Any:
    """A generator of its own, seeded by what the global one was seeded with."""
    return np.random.default_rng(torch.initial_seed()).random()


def restores(data: Data, index: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        return of_torch()


def peeks(data: Data, index: int) -> Any:
    state = random.getstate()
    value = random.random()
    random.setstate(state)
    return value


@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("make", [looks, restores, peeks])
def test_samples_that_look_at_a_state_are_seeded(make: Any, audit: bool) -> None:
    made = fetcher(make)
    probe.check_samples(made, LoaderOptions(), audit=audit)
    assert made.generators == ALL
    assert batches(made, 1) == batches(fetcher(make, generators=ALL), 1)


@pytest.mark.parametrize("generator", DRAWS)
def test_the_audit_sees_what_samples_draw_from(generator: str) -> None:
    """So that no batch has to be read again."""
    made = fetcher(lambda data, index: DRAWS[generator]())
    probe.check_samples(made, LoaderOptions(), audit=True)
    assert made.generators == {generator}
    before = sum(made.samples.reads)  # type: ignore[attr-defined]
    batches(made, 1)
    assert sum(made.samples.reads) == before + N  # type: ignore[attr-defined]


def only_in_workers(data: Data, index: int) -> Any:
    return of_torch() if get_worker_info() is not None else 0.0


@pytest.mark.parametrize("kind", ["rarely torch", "later numpy", "in turn", "stores", "only in workers"])
def test_workers_see_draws_as_well(kind: str) -> None:
    """Each for itself, also those of which this process has seen nothing."""
    make = {**KINDS, "only in workers": only_in_workers}[kind]
    workers = LoaderOptions(2, start_method="fork")

    def stream(generators: frozenset[str]) -> Iterator[Any]:
        made = fetcher(make, generators=generators)
        with closing(MapStyleStream(made, loading=workers, device=CPU)) as opened:
            made.generators = generators
            opened.open()
            while True:
                yield [batch for _, batch in opened.step()]

    expected = [*islice(stream(ALL), N // 4)]
    assert [*islice(stream(frozenset()), N // 4)] == expected
    if kind in ("rarely torch", "in turn", "stores"):
        assert [[batch] for batch, _ in batches(fetcher(make), 1)] == expected


@pytest.mark.parametrize("memory", [False, True], ids=["by functions", "by memory"])
def test_python_is_looked_at_as_its_kind_allows(memory: bool) -> None:
    generator = sandbox.PythonGenerator(sandbox.python_memory() if memory else None)
    random.gauss(0, 1)
    before = random.getstate()
    saved = generator.enter()
    assert generator.state() == generator.fixed
    first = random.gauss(0, 1)
    assert generator.state() != generator.fixed
    generator.leave(saved)
    assert random.getstate() == before
    generator.enter()
    assert random.gauss(0, 1) == first
    generator.leave(saved)


class Pair(NamedTuple):
    image: torch.Tensor
    label: int


ROWS: dict[str, Callable[[int], Any]] = {
    "tensor and int": lambda index: (torch.full((2, 3), index), index),
    "list": lambda index: [torch.ones(2), index],
    "named tuple": lambda index: Pair(torch.ones(2), index),
    "nested": lambda index: ((torch.ones(2), index), {"number": index}),
    "bool among int": lambda index: (index if index % 2 else True,),
    "float among int": lambda index: (index if index % 2 else 0.5,),
    "tensor among int": lambda index: (index if index % 2 else torch.tensor(0.5),),
    "numpy among int": lambda index: (index if index % 2 else np.int32(7), np.float32(index)),
    "large int": lambda index: (2**63 - 1 - index, -(2**63) + index),
    "too large int": lambda index: (2**63 + index,),
    "text": lambda index: (torch.ones(2), str(index)),
    "parameter": lambda index: (torch.nn.Parameter(torch.ones(2)), index),
    "empty": lambda index: (),
    "lengths": lambda index: (index,) * (1 + index % 2),
    "shapes": lambda index: (torch.ones(1 + index % 2), index),
    "types": lambda index: (torch.ones(2, dtype=(torch.int64, torch.float32)[index % 2]),),
    "sparse": lambda index: (torch.ones(2).to_sparse(), index),
}


@pytest.mark.parametrize("kind", ROWS)
def test_batches_are_those_of_default_collate(kind: str) -> None:
    """Also in what it refuses, whichever way the rows are collated; only the remedies differ."""

    def read(collate: Any) -> tuple[str, str]:
        rows = fetcher(lambda data, index: None, collate=collate)
        rows.samples = [ROWS[kind](index) for index in range(N)]  # type: ignore[assignment]
        fetched = rows[Slice(0, 4)]
        described = [(type(each), getattr(each, "dtype", None), each) for each in fetched.batch or []]
        return repr((type(fetched.batch), described)), fetched.failure.rpartition("Error")[2].partition("\n")[0]

    assert read(None) == read(lambda rows: default_collate(rows))


@pytest.mark.parametrize("generator", DRAWS)
def test_a_collate_function_that_draws_is_seeded(generator: str) -> None:
    """Also where it draws only from the second epoch on, and no sample does."""
    calls: list[int] = []

    def collate(rows: list[Any]) -> Any:
        calls.append(len(rows))
        return rows, DRAWS[generator]() if len(calls) > N // 4 else 0.0

    expected = batches(fetcher(lambda data, index: index, generators=ALL, collate=collate))
    calls.clear()
    seed_all(9)
    assert batches(fetcher(lambda data, index: index, collate=collate)) == expected

"""The look at a few samples before training: do positions alone decide them, and are they what they were?"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from results import generator_bits

from runner.data import probe
from runner.data.fetch import Fetcher
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan
from runner.data.stream import EvaluationData, MapStyleStream
from runner.errors import DataError

N = 20


class Made:
    """Samples made by a function of their index."""

    def __init__(self, make: Callable[[int], Any], size: int = N) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def fetcher(make: Callable[[int], Any], *, size: int = N, randomness: str = "sample") -> Fetcher:
    return Fetcher(Made(make, size), Plan(size, 1, 2, randomness=randomness), label="train")


def sketch(make: Callable[[int], Any], *, size: int = N) -> probe.Sketch:
    """As a later attempt finds it in a checkpoint."""
    found: probe.Sketch = json.loads(json.dumps(probe.sketch(fetcher(make, size=size)), allow_nan=False))
    return found


def changed(then: Callable[[int], Any], now: Callable[[int], Any]) -> list[str]:
    return probe.differences(sketch(then), probe.sketch(fetcher(now)))


class Counter:
    calls = 0

    def __call__(self, index: int) -> int:
        self.calls += 1
        return self.calls


def hidden(draw: Callable[[Any], Any], generator: Any) -> Callable[[], Callable[[int], Any]]:
    """Samples that draw from a generator which no seed of the runner reaches."""
    return lambda: lambda index: (index, draw(generator))


OWN: dict[str, Callable[[], Callable[[int], Any]]] = {
    "numpy": hidden(lambda own: own.random(), np.random.default_rng(1)),
    "numpy, new every time": hidden(lambda own: own().random(), np.random.default_rng),
    "python": hidden(lambda own: {"x": own.random()}, random.Random(1)),
    "torch": hidden(lambda own: torch.rand(3, generator=own), torch.Generator().manual_seed(1)),
    "counter": Counter,
    "turns": hidden(lambda turns: next(turns), cycle(range(4))),  # the same again after each look at four samples
    "names": hidden(lambda own: {own.random(): 1}, random.Random(1)),
    "clock": hidden(lambda clock: clock(), time.time_ns),
    "system": hidden(lambda urandom: urandom(8), os.urandom),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("randomness", ["sample", "batch", "off"])
def test_draws_that_no_seed_reaches_are_refused(kind: str, randomness: str) -> None:
    with pytest.raises(DataError, match=r"^sample 0 of Made is different when it is drawn again with the same seed"):
        probe.require_pure(fetcher(OWN[kind](), randomness=randomness))


class Remembers:
    """Transforms a sample when it is read first, or opens a file then."""

    def __init__(self, samples: bool) -> None:
        self.samples, self.rows = samples, dict[int, float]()

    def __call__(self, index: int) -> float:
        key = index if self.samples else 0
        if key not in self.rows:
            self.rows[key] = random.random()
        return self.rows[key] if self.samples else index


@pytest.mark.parametrize("randomness", ["sample", "batch", "off"])
def test_samples_that_are_drawn_once_and_remembered_are_refused(randomness: str) -> None:
    with pytest.raises(DataError, match=r"^sample 0 of Made draws random numbers when it is read first, and is remem"):
        probe.require_pure(fetcher(Remembers(True), randomness=randomness))
    assert len(probe.require_pure(fetcher(Remembers(False), randomness=randomness))) == 4


@pytest.mark.parametrize("kind", ["numpy", "python", "torch", "clock"])
def test_a_collate_with_a_generator_of_its_own_is_refused(kind: str) -> None:
    draw = OWN[kind]()
    plan = Plan(N, 1, 2)
    with pytest.raises(DataError, match=r"^the collate function makes another batch of the same samples"):
        probe.require_pure(Fetcher(Made(int), plan, label="train", collate=lambda rows: [rows, draw(0)]))


@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
def test_a_collate_function_may_draw_from_global_generators(kind: str) -> None:
    asked = Fetcher(Made(int), Plan(N, 1, 2), label="train", collate=lambda rows: [rows, GLOBAL[kind](0)])
    assert len(probe.require_pure(asked)) == 4


GLOBAL: dict[str, Callable[[int], Any]] = {
    "python": lambda index: random.random(),
    "numpy": lambda index: np.random.rand(3),
    "torch": lambda index: torch.rand(3),
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_draws_are_refused_only_where_unseeded(kind: str) -> None:
    make = GLOBAL[kind]
    for randomness in ("sample", "batch"):
        assert len(probe.require_pure(fetcher(make, randomness=randomness))) == 4
    with pytest.raises(DataError, match=r"^sample 0 of Made draws random numbers, and data\.randomness=off seeds none"):
        probe.require_pure(fetcher(make, randomness="off"))


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_generators_are_left_alone(kind: str) -> None:
    before = generator_bits()
    for randomness in ("sample", "batch"):
        asked = fetcher(GLOBAL[kind], randomness=randomness)
        probe.require_pure(asked)
        probe.sketch(asked)
    assert generator_bits() == before


@dataclass
class Both:
    x: Any
    y: Any


class Plain:
    """An object of another package."""

    def __init__(self, value: Any) -> None:
        self.value = value


PURE: dict[str, Callable[[int], Any]] = {
    "nothing": lambda index: None,
    "text": lambda index: f"text {index}" * 20,
    "bytes": lambda index: bytes([index]) * 20,
    "numbers": lambda index: (index, index / 7, True, 10**30, 1j, np.float32(index), np.int8(1)),
    "nested": lambda index: {"a": [torch.full((2, 3), index), {"b": (np.ones(2), "c")}], 1: None},
    "dataclass": lambda index: Both(torch.ones(2), Both("a", [index])),
    "NaN": lambda index: (float("nan"), torch.full((3,), float("nan")), np.array([np.inf, np.nan])),
    "empty": lambda index: (torch.empty(0), np.empty((0, 3)), [], {}, "", b""),
    "scalars": lambda index: (torch.tensor(1.5), np.asarray(index)),
    "bfloat16": lambda index: torch.full((3,), index, dtype=torch.bfloat16),
    "half": lambda index: torch.full((3,), 60000, dtype=torch.float16),
    "complex": lambda index: torch.complex(torch.ones(2), torch.ones(2)),
    "sparse": lambda index: torch.sparse_coo_tensor([[0, 1]], [1.0, index], (3,), check_invariants=True),
    "gradient": lambda index: torch.ones(2, requires_grad=True),
    "strided": lambda index: (torch.arange(6).reshape(2, 3).T, np.arange(6)[::2]),
    "strings": lambda index: np.array(["a", f"{index}"]),
    "dates": lambda index: np.array(["2020-01-01"], dtype="datetime64[D]"),
    "sets": lambda index: ({"a", "b", f"{index}"}, frozenset({1, 2})),
    "objects": lambda index: Plain([index, "text"]),
    "tensors in objects": lambda index: Plain([torch.full((2,), index), torch.ones(2)]),
    "what cannot be pickled": lambda index: (threading.Lock(), index),
    "functions": lambda index: (lambda: index, index),
}


def test_tensors_in_objects_are_compared_by_content() -> None:
    one, same, other = (probe.content_digest(Plain([torch.full((2,), value)])) for value in (1.0, 1.0, 2.0))
    assert one == same != other


@pytest.mark.parametrize("kind", PURE)
def test_pure_samples_of_any_type_pass(kind: str) -> None:
    found = probe.require_pure(fetcher(PURE[kind]))
    assert found == probe.require_pure(fetcher(PURE[kind])) == probe.require_pure(fetcher(PURE[kind], randomness="off"))


def test_sets_are_equal_in_whatever_order_they_were_filled() -> None:
    one, other = {0, 8}, {8, 0}
    assert [*one] != [*other]
    assert probe.require_pure(fetcher(lambda index: one)) == probe.require_pure(fetcher(lambda index: other))


@pytest.mark.parametrize("kind", PURE)
def test_equal_samples_have_no_differences(kind: str) -> None:
    assert changed(PURE[kind], PURE[kind]) == []


ODD: dict[str, Callable[[int], Any]] = {
    "float8": lambda index: torch.ones(3).to(torch.float8_e4m3fn),
    "compressed rows": lambda index: torch.eye(3).to_sparse_csr(),
    "conjugate": lambda index: torch.complex(torch.ones(2), torch.ones(2)).conj(),
    "array of objects": lambda index: np.array([f"text {index}" * 9, None, [index]], dtype=object),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", ODD)
def test_pure_samples_of_rare_types_pass(kind: str) -> None:
    probe.require_pure(fetcher(ODD[kind]))
    assert changed(ODD[kind], ODD[kind]) == []


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000, 10**12])
def test_a_few_samples_from_the_first_to_the_last_are_looked_at(size: int) -> None:
    found = probe.probe_indices(size)
    assert found[0] == 0
    assert found[-1] == size - 1
    assert len(found) == min(size, 4)
    assert [*found] == sorted({*found})


def test_unreadable_samples_do_not_end_it() -> None:
    def make(index: int) -> int:
        if index == 0:
            raise OSError("no such file")
        return index

    assert len(probe.require_pure(fetcher(make))) == 4
    assert changed(make, make) == []


def unidentified(index: int) -> Any:
    """As pillow says of a cut picture: with an address, which is another one in every call."""
    held.append(object())
    raise OSError(f"cannot identify image file {held[-1]}")


held: list[object] = []


def test_the_wording_of_an_error_does_not_make_a_sample_impure() -> None:
    assert len(probe.require_pure(fetcher(unidentified))) == 4


def test_the_wording_of_an_error_does_not_make_the_data_another() -> None:
    assert changed(unidentified, unidentified) == []


def test_an_impure_sample_is_reported_by_its_place() -> None:
    class Located(Made):
        def locate(self, index: int) -> str:
            return f"line {index} of a.txt"

    data = Located(lambda index: time.time_ns() if index == N - 1 else index)
    with pytest.raises(DataError, match=r"^line 19 of a\.txt of .*Located is different"):
        probe.require_pure(Fetcher(data, Plan(N, 1, 2), label="train"))


def opened(make: Callable[[int], Any], workers: int = 1, *, collate: Callable[[Any], Any] = list) -> MapStyleStream:
    loading, cpu = LoaderOptions(workers), torch.device("cpu")
    fetcher = Fetcher(Made(make), Plan(N, 1, 2), label="train", collate=collate)
    stream = MapStyleStream(fetcher, loading=loading, device=cpu, audit=True)
    stream.open()
    return stream


def test_samples_that_depend_on_the_process_are_refused() -> None:
    with pytest.raises(DataError, match=r"^sample 0 of Made is different in a data worker than in this process"):
        next(opened(lambda index: (index, os.getpid())).step())


class Lazy:
    """Opens its file when it is first read."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(range(N)))
        self.path = path
        self.file: Any = None

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = self.path.open("rb", buffering=0)
        self.file.seek(index)
        return self.file.read(1)[0]

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.campaign)])
def test_no_worker_gets_a_file_that_the_look_opened(tmp_path: Path, method: str) -> None:
    """Forked workers would move its position under each other's hands; others could not be sent it."""
    data, plan, loading = (
        Lazy(tmp_path / "numbers"),
        Plan(N, 1, 2, shuffle=False),
        LoaderOptions(2, start_method=method),
    )
    cpu = torch.device("cpu")
    fetcher = Fetcher(data, plan, label="train", collate=list)
    stream = MapStyleStream(fetcher, loading=loading, device=cpu, audit=True)
    held_out = EvaluationData(
        data, seed=1, batch_size=2, randomness="sample", loading=loading, device=cpu, collate=list, audit=True
    )
    assert data.file is None
    stream.open()
    try:
        assert [batch for _, batch in stream.step()] == [[0, 1]]
        assert [number for _, batch in held_out for number in batch] == [*range(N)]
    finally:
        stream.close()
        held_out.close()


@pytest.mark.parametrize(
    ("end", "told"), [(lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"), (lambda: os._exit(3), "status 3")]
)
def test_a_data_set_that_ends_the_process_is_reported(end: Callable[[], Any], told: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.train: data worker 0 .* {told}"):
        opened(lambda index: end())


@pytest.mark.parametrize("kind", ["nested", "sets", "NaN", "what cannot be pickled"])
def test_pure_samples_are_the_same_in_a_worker(kind: str) -> None:
    """Samples of any type: only their digests are sent."""
    opened(PURE[kind], collate=len).ready()


def test_requests_of_the_audit_are_no_batches() -> None:
    found = [[batch for _, batch in opened(lambda index: index, workers).step()] for workers in (0, 1)]
    assert found[0] == found[1]


def test_noise_in_the_last_bits_of_floats_is_tolerated() -> None:
    def noisy(index: int) -> Any:
        x = torch.linspace(-1, 1, 100, dtype=torch.float64) * 10.0**index
        return x, x.numpy() * (1 + 1e-6), 0.1 * index

    def other(index: int) -> Any:
        x, y, z = noisy(index)
        return x * (1 + 1e-6 * torch.rand(100)), y * (1 - 1e-6), z * (1 + 1e-6)

    assert changed(noisy, other) == []


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (lambda index: {"x": torch.ones(3), "y": index + (index == 19)}, ["sample 19['y']: int 19 then, int 20 now"]),
        (
            lambda index: {"x": torch.ones(3).double(), "y": index},
            [
                f"sample {index}['x']: float32[3] of magnitude 1 +- 0 then, float64[3] of magnitude 1 +- 0 now"
                for index in (0, 12, 19, 6)
            ],
        ),
        (
            lambda index: {"x": torch.ones(2 if index == 6 else 3), "y": index},
            ["sample 6['x']: float32[3] of magnitude 1 +- 0 then, float32[2] of magnitude 1 +- 0 now"],
        ),
        (
            lambda index: {"x": torch.ones(3) * (1.01 if index == 0 else 1), "y": index},
            ["sample 0['x']: float32[3] of magnitude 1 +- 0 then, float32[3] of magnitude 1.01 +- 0 now"],
        ),
        (
            lambda index: {"x": torch.ones(3), "y": str(index) if index == 12 else index},
            ["sample 12['y']: int 12 then, str 12 now"],
        ),
    ],
    ids=["label", "dtype", "shape", "floats", "type"],
)
def test_a_change_is_reported_by_sample_and_path(now: Callable[[int], Any], told: list[str]) -> None:
    assert changed(lambda index: {"x": torch.ones(3), "y": index}, now) == told


def test_added_and_removed_values_are_reported() -> None:
    assert changed(lambda index: (1, 2), lambda index: (1, 2, 3) if index == 6 else (1, 2)) == [
        "sample 6: 2 values then, 3 now"
    ]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("a" * 100, "a" * 99 + "b"),
        (b"abc", b"abd"),
        (10**30, 10**30 + 1),
        (np.arange(1000), np.arange(1000)[::-1]),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (True, False),
        (0.0, 1e-6),
        (None, 0),
        ({"x": 1}, {"y": 1}),
        (np.array(["a"]), np.array(["b"])),
    ],
    ids=str,
)
def test_a_changed_value_of_any_type_is_reported(then: Any, now: Any) -> None:
    assert len(changed(lambda index: then, lambda index: now)) == 4


def test_only_samples_in_both_are_compared() -> None:
    assert probe.differences(sketch(lambda index: index), sketch(lambda index: index, size=30)) == []


def test_a_sketch_is_small_plain_json_whatever_the_sample() -> None:
    found = probe.sketch(fetcher(lambda index: {f"name {i}": torch.rand(64, 64) * 1e-5 for i in range(100)}))
    assert [*found] == ["0", "6", "12", "19"]
    assert len(json.dumps(found)) < 3000
    for kind in PURE:
        assert len(json.dumps(sketch(PURE[kind]))) < 2000


def test_a_sketch_does_not_depend_on_what_was_drawn_before() -> None:
    one = sketch(GLOBAL["torch"])
    torch.rand(1)
    assert sketch(GLOBAL["torch"]) == one


def test_a_long_list_of_numbers_is_one_value() -> None:
    tokens = [*range(100)]
    ((path, value),) = probe.leaves({"tokens": tokens})
    assert (path, value.tolist()) == ("['tokens']", tokens)
    assert [path for path, _ in probe.leaves([1, 2.0])] == ["[0]", "[1]"]

"""From positions to batches, as a pure function."""

import errno
import json
import random
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from runner.checkpoint.encoding import encode
from runner.data import probe
from runner.data.fetch import Fetcher
from runner.data.loader import LoaderOptions
from runner.data.order import splitmix64
from runner.data.plan import Plan, Slice
from runner.rng import Generators, seed_all

N = 10


class Noisy:
    """Samples that draw from every global generator, gaussians too, and note how many threads there were."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (index, *draw(), torch.get_num_threads())


def draw() -> tuple[Any, ...]:
    return random.gauss(0, 1), np.random.standard_normal(), np.random.random(), torch.randn(2).tolist()


def as_list(rows: list[Any]) -> list[Any]:
    return rows


def with_noise(rows: list[Any]) -> tuple[Any, ...]:
    """A collate function that draws."""
    return [row[0] for row in rows], draw()


def fetcher(*, randomness: str = "sample", seed: int = 1, label: str = "train", collate: Any = as_list) -> Fetcher:
    return Fetcher(Noisy(), Plan(N, seed, 4, randomness=randomness), label=label, collate=collate)


def rows(fetch: Fetcher, cuts: list[int]) -> list[Any]:
    """The samples between the first and the last cut, fetched slice by slice."""
    return [row for start, stop in pairwise(cuts) for row in fetch[Slice(start, stop - start)].batch]


def states() -> str:
    """Every bit of every global generator."""
    value, tensors = encode(Generators().state_dict(), "")
    return json.dumps([value, {name: sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_sample_is_the_same_however_positions_are_sliced() -> None:
    expected = rows(fetcher(), [0, 25])
    for cuts in ([0, 1, 2, 3, 25], [0, 10, 20, 25], [0, 9, 11, 25], [*range(26)]):
        assert rows(fetcher(), cuts) == expected


def test_a_slice_is_the_same_whatever_was_fetched_before() -> None:
    fetch = fetcher()
    expected = {first: fetcher()[Slice(first, 4)] for first in range(0, 40, 4)}
    for first in (36, 0, 8, 4, 8, 32):
        assert fetch[Slice(first, 4)] == expected[first]
    assert fetch[Slice(8, 4)].first == 8


def test_every_place_of_every_epoch_has_randomness_of_its_own() -> None:
    drawn = {str(row[1:]) for row in rows(fetcher(), [0, 3 * N])}
    assert len(drawn) == 3 * N


class Seeds:
    """Samples that are the seeds they would draw by."""

    def __getitem__(self, index: int) -> str:
        return hex(torch.initial_seed())

    def __len__(self) -> int:
        return N


@pytest.mark.parametrize(
    ("randomness", "seeds", "collating"),
    [
        ("sample", ["0x4d439fe083d82f18", "0x944b9fbcdd8b70bf", "0xe5b006eb03ef7caa"], "0x5b7653162b39be70"),
        ("batch", ["0x95ae742976fce418"] * 3, "0x5b7653162b39be70"),
    ],
)
def test_the_seeds_of_samples_are_frozen(randomness: str, seeds: list[str], collating: str) -> None:
    """A run that an older version began draws on as it would have."""
    plan = Plan(N, 1, 3, randomness=randomness)
    fetch = Fetcher(Seeds(), plan, label="train", collate=lambda rows: (rows, hex(torch.initial_seed())))
    probe.check_samples(fetch, LoaderOptions(), audit=False)  # sees that samples look at their seed
    assert fetch[Slice(9, 3)].batch == (seeds, collating)


@pytest.mark.parametrize("randomness", ["sample", "batch"])
def test_seed_label_and_position_decide_the_randomness(randomness: str) -> None:
    """Of samples and of collating: what an evaluation draws has nothing to do with what training draws."""
    kinds: list[dict[str, Any]] = [{}, {"seed": 2}, {"label": "evaluation"}]
    cuts = [0, 4, 8, 11, 2 * N]
    drawn = [row[1:-1] for kind in kinds for row in rows(fetcher(randomness=randomness, **kind), cuts)]
    for kind in kinds:
        collating = fetcher(randomness=randomness, collate=with_noise, **kind)
        drawn += [collating[Slice(start, stop - start)].batch[1] for start, stop in pairwise(cuts)]
    assert len({str(numbers) for numbers in drawn}) == len(kinds) * (2 * N + len(cuts) - 1)


def test_the_label_moves_no_sample() -> None:
    order = [[row[0] for row in rows(fetcher(label=label), [0, N])] for label in ("train", "evaluation")]
    assert order[0] == order[1]


def test_randomness_by_batch_seeds_once_per_slice() -> None:
    """The generators run on within a slice, so that where it begins decides what its samples draw."""
    one = rows(fetcher(randomness="batch"), [4, 8])
    assert one == rows(fetcher(randomness="batch"), [4, 8])
    assert [row[0] for row in one] == [row[0] for row in rows(fetcher(), [4, 8])]
    assert one[1:] != rows(fetcher(), [4, 8])[1:]
    assert len({str(row[1:]) for row in one}) == 4


def test_randomness_off_seeds_nothing() -> None:
    """Neither samples nor collating: they draw on from wherever the global generators are."""
    seed_all(5)
    drawn = [draw() for _ in range(5)]
    seed_all(5)
    assert [row[1:-1] for row in rows(fetcher(randomness="off"), [0, 4])] == drawn[:4]
    assert fetcher(randomness="off", collate=lambda _: None)[Slice(0, 0)].batch is None
    assert draw() == drawn[4]


def test_collating_draws_under_a_seed_of_its_own() -> None:
    """What it draws is neither moved by what samples drew nor the same for two slices."""
    indices, drawn = fetcher(collate=with_noise)[Slice(0, 4)].batch
    assert fetcher(collate=with_noise)[Slice(0, 4)].batch == (indices, drawn)
    assert Fetcher(range(N), fetcher().plan, label="train", collate=lambda _: draw())[Slice(0, 4)].batch == drawn
    assert fetcher(collate=with_noise)[Slice(4, 4)].batch[1] != drawn
    assert drawn not in [row[1:-1] for row in rows(fetcher(), [0, N])]


def test_without_a_collate_function_batches_are_those_of_torch() -> None:
    first, batch, *_ = Fetcher(range(N), Plan(N, 1, 4, shuffle=False), label="train")[Slice(8, 4)]
    assert first == 8
    assert torch.equal(batch, torch.tensor([8, 9, 0, 1]))


@pytest.mark.parametrize("randomness", ["sample", "batch"])
def test_the_global_generators_are_left_as_they_were(randomness: str) -> None:
    """Also those gaussians that python and numpy have in store."""
    seed_all(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    before = states()
    fetcher(randomness=randomness, collate=with_noise)[Slice(0, 4)]
    assert states() == before


@pytest.mark.parametrize("randomness", ["sample", "batch"])
def test_samples_are_fetched_on_one_thread(randomness: str, two_threads: None) -> None:
    """As in a worker: float sums depend on the number of threads."""
    assert {row[-1] for row in rows(fetcher(randomness=randomness), [0, N])} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ([torch.ones(2), torch.ones(3)], "of them, give all samples the same shape, or set data.collate to"),
        ([[1, 2], [1]], "of them, give all samples the same shape, or set data.collate to"),
        ([2**70, 1], "of them, set data.collate to"),
        ([object(), object()], "of them, set data.collate to"),
    ],
    ids=["tensors", "lists", "integers", "objects"],
)
def test_a_batch_that_cannot_be_made_has_its_remedy(samples: list[Any], told: str) -> None:
    failure = Fetcher(samples, Plan(2, 1, 2), label="train")[Slice(0, 2)].failure
    assert failure is not None
    assert told in failure


def test_a_failing_sample_restores_generators_and_threads(two_threads: None) -> None:
    def fail(_: list[Any]) -> None:
        raise KeyError

    seed_all(3)
    before = states()
    assert "cannot be collated" in fetcher(collate=fail)[Slice(0, 4)].failure
    assert states() == before
    assert torch.get_num_threads() == 2


class Sometimes:
    """One sample draws from one of the generators that are rarely used."""

    def __init__(self, generator: str) -> None:
        self.generator = generator
        self.calls = 0

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> object:
        self.calls += 1
        first = torch.rand(()).item()
        if index != 7 or self.generator == "torch":
            return index, first
        return index, first, random.gauss(0, 1) if self.generator == "python" else np.random.randn()


@pytest.mark.parametrize(("generator", "calls"), [("torch", 44), ("python", 48), ("numpy", 48)])
def test_seeding_only_used_generators_changes_no_sample(generator: str, calls: int) -> None:
    """The slice in which a sample first touches another generator is drawn again, with all of them seeded."""

    def fetched(step: int, *, drawn: tuple[str, ...] = ()) -> tuple[list[object], int]:
        samples = Sometimes(generator)
        fetcher = Fetcher(samples, Plan(10, 1, 4), label="train", collate=lambda rows: rows)
        fetcher.generators = frozenset(drawn)
        rows = [row for first in range(0, 40, step) for row in fetcher[Slice(first, min(step, 40 - first))].batch]
        return rows, samples.calls

    expected, _ = fetched(4, drawn=("python", "numpy", "torch"))
    assert fetched(4) == (expected, calls)
    assert fetched(1)[0] == fetched(3)[0] == fetched(10)[0] == expected


def test_one_word_is_mixed_as_many_are() -> None:
    words = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    assert [splitmix64(word) for word in words] == splitmix64(np.array(words, dtype=np.uint64)).tolist()


class Flaky:
    """Fails so many times at each sample, with an error."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left = error, [times] * N

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self.left[index] -= 1
        if self.left[index] >= 0:
            draw()
            raise self.error
        return (index, *draw())


class ReadTimeout(Exception):
    __module__ = "botocore.exceptions"


@pytest.mark.parametrize("substitute", [False, True])
@pytest.mark.parametrize(
    ("error", "times"),
    [
        (OSError(errno.EIO, "Input/output error"), 3),
        (OSError(errno.ESTALE, "Stale file handle"), 1),
        (TimeoutError(), 3),
        (ConnectionResetError(), 2),
        (ReadTimeout(), 3),
        (OSError("short read"), 1),
    ],
    ids=repr,
)
def test_a_read_error_that_passes_changes_nothing(
    error: Exception, times: int, substitute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    plan = Plan(N, 1, 4)
    expected = Fetcher(Flaky(error, 0), plan, label="train", collate=as_list, substitute=substitute)[Slice(2, 4)]
    assert (
        Fetcher(Flaky(error, times), plan, label="train", collate=as_list, substitute=substitute)[Slice(2, 4)]
        == expected
    )


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), KeyError(), ValueError()], ids=repr)
def test_an_error_of_the_data_is_not_tried_again(error: Exception) -> None:
    samples = Flaky(error, 1)
    fetcher = Fetcher(samples, Plan(N, 1, 4, shuffle=False), label="train", collate=as_list)
    fetcher.generators = frozenset({"python", "numpy", "torch"})
    (bad,) = fetcher[Slice(2, 4)].bad_records
    assert (bad.position, samples.left[2]) == (2, 0)


def test_a_lasting_error_is_reported_with_the_data_sets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (bad,) = Fetcher(Flaky(TimeoutError("gone"), 99), Plan(N, 1, 4), label="train")[Slice(0, 4)].bad_records
    assert bad.error.splitlines()[-1] == "TimeoutError: gone"
    assert "in __getitem__" in bad.error.splitlines()[0]
    assert "fetch.py" not in bad.error.replace("test_fetch.py", "")


class WithHoles:
    """Has no sample at some indices."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int | None:
        return None if index % 3 == 2 else index


def test_none_is_a_bad_record() -> None:
    plan = Plan(N, 1, 4, shuffle=False)
    (bad,) = Fetcher(WithHoles(), plan, label="train")[Slice(0, 4)].bad_records
    assert (bad.position, bad.index, bad.substitute) == (2, 2, None)
    assert "__getitem__ returned None" in bad.error
    fetched = Fetcher(WithHoles(), plan, label="train", substitute=True, collate=as_list)[Slice(0, 4)]
    (bad,) = fetched.bad_records
    assert fetched.batch == [0, 1, bad.substitute, 3]
    assert bad.substitute is not None
    assert bad.substitute % 3 != 2


@pytest.mark.parametrize("randomness", ["sample", "batch", "off"])
def test_recorded_substitutes_are_taken_again(randomness: str) -> None:
    """Also where the sample can be read now; nothing else moves, and the record is the same."""
    plan = Plan(N, 1, 4, randomness=randomness)
    seed_all(1)
    before = Fetcher(Flaky(KeyError(), 0), plan, label="train", substitute=True, collate=as_list)
    gone = before.order(0, np.array([5]))[0].item()
    before.samples.left[gone] = 10**9  # type: ignore[attr-defined]
    then = before[Slice(4, 4)]
    again = Fetcher(Flaky(KeyError(), 0), plan, label="train", substitute=True, collate=as_list)
    again.substitutions = {bad.position: bad.substitute for bad in then.bad_records if bad.substitute is not None}
    seed_all(1)
    now = again[Slice(4, 4)]
    assert [(bad.position, bad.index, bad.substitute) for bad in now.bad_records] == [
        (bad.position, bad.index, bad.substitute) for bad in then.bad_records
    ]
    assert now.digest == then.digest
    if randomness == "sample":
        assert now.batch == then.batch

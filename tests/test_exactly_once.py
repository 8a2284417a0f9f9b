"""Every sample exactly once per epoch: on real processes that are killed, and proven by the audit of the ledger."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import Ended, Lives
from marks import quick_first
from mine.data import save_hugging_face, write_shards
from results import results
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from runner.data import fetch, order
from runner.data.fetch import Fetcher
from runner.data.loader import LoaderOptions, without_noise
from runner.data.plan import Plan
from runner.data.stream import MapStyleStream
from runner.distributed.world import World
from runner.runs.__main__ import main as runs

KILLS = int(os.environ.get("RUNNER_KILLS", "50"))
USER = Path(__file__).parent / "user"
CPU = torch.device("cpu")
SECOND_EPOCH = slice(1000, 2000)

Live = Callable[..., Ended]


@pytest.fixture
def live(life: Lives, tmp_path: Path) -> Live:
    """One life of a user's experiment, in a root of this test."""

    def one(experiment: str, *more: str, step: int | None = None, after: float | None = None) -> Ended:
        command = ("--config-dir", "conf", f"experiment={experiment}", f"run.root={tmp_path}", *more)
        return life(*command, cwd=USER, step=step, after=after)

    return one


def audited(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the audit says; its exit status must agree."""
    capsys.readouterr()
    status = runs(["audit", str(folder), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (0 if found["holds"] else 1)
    return found


# The scenario that this project began with: 1000 samples, shuffled, stopped in the middle of the second epoch.


def stopped_in_the_second_epoch() -> list[int]:
    """The samples of two epochs, with a stop after step 150 of 200."""

    def stream() -> MapStyleStream:
        return MapStyleStream(
            Fetcher(range(1000), Plan(1000, 1, 10), label="train"), loading=LoaderOptions(), device=CPU
        )

    def drawn(opened: MapStyleStream, steps: int) -> Iterator[int]:
        for _ in range(steps):
            for _, batch in opened.step():
                yield from batch.tolist()
            opened.advance()

    first, second = stream(), stream()
    first.open()
    before = [*drawn(first, 150)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    return [*before, *drawn(second, 50)]


def test_a_stop_within_an_epoch_repeats_and_misses_nothing() -> None:
    counts = Counter(stopped_in_the_second_epoch()[SECOND_EPOCH])
    assert (sum(counts.values()) - len(counts), 1000 - len(counts)) == (0, 0)


def test_plain_torchdata_repeats_and_misses_246_samples() -> None:
    """So that the test above is known to be able to fail. RandomSampler has a generator of its own, as trainers give
    it; nothing saves that, so the resumed half is that of the first epoch's order.
    """

    def loader() -> Any:
        sampler = RandomSampler(range(1000), generator=torch.Generator().manual_seed(1))
        with without_noise():
            return StatefulDataLoader(range(1000), batch_size=10, sampler=sampler)  # type: ignore[arg-type,var-annotated]

    first, second = loader(), loader()
    assert len([*first]) == 100
    batches = iter(first)
    drawn = [next(batches) for _ in range(50)]
    second.load_state_dict(first.state_dict())
    counts = Counter(torch.cat([*drawn, *second]).tolist())
    assert (sum(counts.values()) - len(counts), 1000 - len(counts)) == (246, 246)


def test_a_killed_process_goes_on_within_the_second_epoch(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("data.train.size=1000", "data.batch_size=10", "trainer.max_steps=200", "run.name=r")
    assert live("rows", *more, "checkpoint.every_steps=7", step=150).status is None
    assert live("rows", *more, "checkpoint.every_steps=7").status == 0
    found = audited(tmp_path / "rows" / "r", capsys)
    assert found["again"] == {"steps": 2, "positions": 20, "differing": 0}  # 148 and 149: killed before 150 was noted
    rows = [{key: epoch[key] for key in ("epoch", "seen", "repeated", "missed")} for epoch in found["epochs"]]
    assert rows == [{"epoch": epoch, "seen": 1000, "repeated": 0, "missed": 0} for epoch in range(2)]


# Every tier, killed; each compared to the bit with the run that nobody killed.

# 100 samples in batches of 16: the first epoch ends within step 7.
MATRIX = [*product((0, 1, 3), (1, 5), (1, 6, 7, 10), (1, 2, 3), ("fork", "spawn"))]
CHOSEN = MATRIX if KILLS >= 1000 else random.Random(0).sample(MATRIX, max(4, KILLS // 8))


@pytest.mark.campaign
@pytest.mark.parametrize(("workers", "prefetch", "cut", "resumes", "method"), CHOSEN)
def test_cuts_change_nothing(
    workers: int,
    prefetch: int,
    cut: int,
    resumes: int,
    method: str,
    live: Live,
    tmp_path: Path,
    whole: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    how = ("trainer.max_steps=15", f"runtime.start_method={method}", f"runtime.prefetch={prefetch}", "run.name=r")
    for number in range(resumes):
        step = cut + number
        assert live("rows", *how, f"runtime.num_workers={workers}", step=step).status is None
    assert live("rows", *how, f"runtime.num_workers={(workers + 1) % 4}").status == 0
    assert not results(tmp_path / "rows" / "r").differences(whole("rows", "trainer.max_steps=15"))
    assert audited(tmp_path / "rows" / "r", capsys)["holds"]


@pytest.mark.campaign
def test_kills_while_the_number_of_workers_moves(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A life begins workers after about a second; at a random moment it is killed, until it has finished."""
    mark, chance = tmp_path / "read-by-a-worker", random.Random(5)
    slow = ("data.train._target_=mine.data.Slow", f"+data.train.mark={mark}", "trainer.max_steps=100")
    assert live("rows", *slow, "run.name=whole").status == 0
    assert not mark.exists()
    for seconds in count(3.0):
        more = ("run.name=r", "checkpoint.every_steps=10", "runtime.num_workers=auto")
        ended = live("rows", *slow, *more, after=chance.uniform(1, seconds))
        if ended.status is not None:
            break
    assert ended.status == 0, ended.output
    assert mark.exists()
    assert not results(tmp_path / "rows" / "r").differences(results(tmp_path / "rows" / "whole"))
    assert audited(tmp_path / "rows" / "r", capsys)["holds"]


@pytest.fixture(scope="session")
def whole(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The results of an experiment that nobody killed; each is run once."""
    root, known = tmp_path_factory.mktemp("whole"), dict[tuple[str, ...], Any]()

    def find(experiment: str, *more: str) -> Any:
        key = (experiment, *more)
        if key not in known:
            name = f"w{len(known)}"
            command = ("--config-dir", "conf", f"experiment={experiment}", f"run.root={root}", f"run.name={name}")
            ended = life(*command, *more, cwd=USER)
            assert ended.status == 0, ended.output
            known[key] = results(root / experiment / name)
        return known[key]

    return find


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 records in shards of which one is empty."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(str(folder), [30, 0, 1, 25, 44])
    return folder


SENTENCES = ("data.train._target_=mine.data.Sentences", "data.max_tokens=40")
TIERS = {
    "one sample": ("rows", ("data.train.size=1",), (0, 1, 0)),
    "fewer than a batch": ("rows", ("data.train.size=5",), (0, 1, 0)),
    "sharded": ("sharded", (), (0, 2, 3)),
    "mixture": ("mixture", (), (0, 2, 1)),
    "weighted": ("rows", ("+data.weights._target_=mine.data.harder",), (0, 2, 1)),
    "token budget": ("rows", (*SENTENCES, "trainer.accumulate=2"), (0, 2, 1)),
    "drop": ("rows", ("data.tail=drop",), (1, 0, 3)),
    "iterable": ("rows", ("data.train._target_=mine.data.Iterable",), (0, 0, 0)),
    "iterable in workers": ("rows", ("data.train._target_=mine.data.Iterable", "runtime.num_workers=2"), (2, 2, 2)),
    "replayed": ("rows", ("data.train._target_=mine.data.Stateless", "data.replay=true"), (0, 0, 0)),
    "hugging face": ("hugging_face", (), (0, 2, 1)),
    "hugging face iterable": ("hugging_face", ("data.train.iterable=true", "runtime.num_workers=2"), (2, 2, 2)),
    "substituted": ("rows", ("data.train._target_=mine.data.Broken", "data.on_bad_record=substitute"), (0, 2, 1)),
}


@pytest.mark.parametrize("tier", quick_first(TIERS, "sharded", "weighted", "iterable in workers", "substituted"))
def test_every_tier_survives_kills(
    tier: str, live: Live, tmp_path: Path, shards: Path, whole: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, more, workers = TIERS[tier]
    if experiment == "sharded":
        more = (*more, f"data.train.path={shards}")
    if experiment == "hugging_face":
        pytest.importorskip("datasets")
        save_hugging_face(str(tmp_path / "saved"), 100)
        more = (*more, f"data.train.folder={tmp_path}/saved")
    for cut, number in zip((3, 7, 23), workers, strict=True):
        ended = live(experiment, *more, "run.name=r", f"runtime.num_workers={number}", step=cut)
        assert ended.status is None, ended.output
    ended = live(experiment, *more, "run.name=r")
    assert ended.status == 0, ended.output
    folder = tmp_path / experiment / "r"
    assert not results(folder).differences(whole(experiment, *more))
    found = audited(folder, capsys)
    assert found["holds"], found["problems"]
    assert found["again"]["differing"] == 0
    assert found["indexed"] == ("iterable" not in tier and tier != "replayed")
    assert runs(["audit", str(folder)]) == 0
    often = "as often as data.weights say" if tier == "weighted" else "once"
    assert (f"Every sample exactly {often}" in capsys.readouterr().out) == found["indexed"]
    if found["indexed"]:
        assert sum(row["whole"] for row in found["epochs"]) >= 3
        assert all(row["repeated"] == row["missed"] == 0 for row in found["epochs"])


def test_any_number_of_processes_trains_on_the_same_samples() -> None:
    """Each process of a world takes its slices; together, step by step, they are those of one process."""

    def drawn(size: int, micro: int, consumed: int) -> list[list[Any]]:
        steps: list[list[Any]] = []
        streams = []
        for rank in range(size):
            plan = Plan(100, 3, 8, micro, world=World(rank, size))
            stream = MapStyleStream(Fetcher(list(range(100)), plan, label="train"), loading=LoaderOptions(), device=CPU)
            stream.consumed = consumed
            stream.open()
            streams.append(stream)
        for _ in range(20):
            parts = [[batch.tolist() for _, batch in stream.step()] for stream in streams]
            steps.append([index for pieces in zip(*parts, strict=True) for piece in pieces for index in piece])
            for stream in streams:
                stream.advance()
        assert len({json.dumps(stream.state_dict()) for stream in streams}) == 1
        digests = sum(stream.ledger_line(1).digest for stream in streams) % 2**64
        return [*steps, [digests]]

    expected = drawn(1, 1, 48)
    for size, micro in ((1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)):
        assert drawn(size, micro, 48) == expected


# Teeth: what the comparison with an uninterrupted run is worth. Each break is made in the resumed half only.


class Summed:
    """Samples that depend on order, randomness and, through a float sum, on the number of threads."""

    weights = torch.rand(400_000, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[int, float, float]:
        return index, torch.rand(()).item(), (self.weights * (index + 0.1)).sum().item()


def trained(monkeypatch: pytest.MonkeyPatch, wreck: Callable[[pytest.MonkeyPatch], None] | None) -> list[Any]:
    """The samples of 12 steps with a resume after the fifth, whose process has 2 threads and is wrecked."""
    saved, found = None, []
    with monkeypatch.context() as patch:
        for steps in (5, 7):
            stream = MapStyleStream(
                Fetcher(Summed(), Plan(50, 1, 8), label="train"), loading=LoaderOptions(), device=CPU
            )
            if saved is not None:
                stream.load_state_dict(saved)
            stream.open()
            for _ in range(steps):
                for _, batch in stream.step():
                    found.append([field.tolist() for field in batch])
                stream.advance()
            saved = json.loads(json.dumps(stream.state_dict()))
            torch.set_num_threads(2)
            if wreck is not None:
                wreck(patch)
    return found


def other_label(patch: pytest.MonkeyPatch) -> None:
    real = fetch.derive
    patch.setattr(fetch, "derive", lambda label, *parts: real(f"another {label}", *parts))


def other_order(patch: pytest.MonkeyPatch) -> None:
    real = order.permutation
    patch.setattr(order, "permutation", lambda size, label, *parts: real(size, f"another {label}", *parts))


def early_cursor(patch: pytest.MonkeyPatch) -> None:
    real = MapStyleStream.load_state_dict

    def load(self: MapStyleStream, state: dict[str, Any]) -> None:
        real(self, state | {"consumed": state["consumed"] + 8})  # as if it had moved when the batch was handed out

    patch.setattr(MapStyleStream, "load_state_dict", load)


def unpinned_threads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fetch, "one_thread", nullcontext)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("wreck", [other_label, other_order, early_cursor, unpinned_threads])
def test_a_wrecked_resume_is_seen(wreck: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(monkeypatch, None)
    torch.set_num_threads(1)
    assert trained(monkeypatch, None) == expected
    torch.set_num_threads(1)
    assert trained(monkeypatch, wreck) != expected

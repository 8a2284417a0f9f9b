"""What a ledger proves, and that it proves nothing where something is wrong."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner.data.fetch import Fetcher
from runner.data.ledger import Ledger, LedgerLine, LedgerReport, Segment, check_exactly_once, read_segments
from runner.data.loader import LoaderOptions
from runner.data.order import Interleaving, digest_words
from runner.data.plan import Plan, Source
from runner.data.stream import MapStyleStream
from runner.storage import LocalLocation

N, BATCH = 10, 4
PLAN = Plan(N, 1, BATCH)
AGAIN = {"steps": 0, "positions": 0, "differing": 0}


class Bumpy:
    """Samples of which some cannot be read."""

    def __init__(self, size: int = N, bad: Sequence[int] = ()) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise ValueError(index)
        return index


def digest_positions(positions: Any, indices: Any) -> int:
    return int(digest_words(positions, indices).sum(dtype=np.uint64))


def lines(
    plan: Plan, steps: int, *, begun: int = 0, consumed: int | None = None, bad: Sequence[int] = ()
) -> list[LedgerLine]:
    """The lines of real steps."""
    fetcher = Fetcher(Bumpy(plan.samples, bad), plan, label="train", substitute=bool(bad))
    stream = MapStyleStream(fetcher, loading=LoaderOptions(), device=torch.device("cpu"))
    stream.consumed = begun * plan.batch_size if consumed is None else consumed
    stream.open()
    found = []
    for step in range(begun + 1, begun + steps + 1):
        for _ in stream.step():
            pass
        stream.advance()
        found.append(stream.ledger_line(step))
    return found


def segment(found: Sequence[LedgerLine], *, step: int = 0, attempt: int = 1, grouping: int = BATCH) -> Segment:
    return Segment(step, attempt, "", grouping, tuple(found))


def verdict(
    found: Sequence[LedgerLine], plan: Plan | None = PLAN, *, committed: int | None = None, begun: int = 0
) -> LedgerReport:
    """Over one attempt."""
    return check_exactly_once(
        [segment(found)], plan, begun=begun, committed=found[-1].step if committed is None else committed
    )


def row(epoch: int, seen: int, **others: Any) -> dict[str, Any]:
    return {"epoch": epoch, "seen": seen, "repeated": 0, "missed": 0, "whole": True, "substituted": 0} | others


@pytest.fixture
def whole() -> list[LedgerLine]:
    """Eight steps: three epochs and two samples of the fourth."""
    return lines(PLAN, 8)


def test_every_sample_exactly_once_is_proven(whole: list[LedgerLine]) -> None:
    proof = verdict(whole)
    assert proof.holds
    assert (proof.steps, proof.positions, proof.again) == (8, 32, AGAIN)
    assert proof.epochs == [row(0, 10), row(1, 10), row(2, 10), row(3, 2, whole=False)]


def test_the_audit_reads_the_written_ledger(whole: list[LedgerLine], tmp_path: Path) -> None:
    location = LocalLocation(tmp_path)
    ledger = Ledger(location, attempt=1, recipe=PLAN.recipe(), grouping=BATCH)
    ledger.open(0)
    for line in whole:
        ledger.add(line)
    ledger.mark(8)
    ledger.flush()
    assert check_exactly_once(read_segments(location), PLAN, begun=0, committed=8) == verdict(whole)


KINDS: dict[str, dict[str, Any]] = {
    "in order": {"shuffle": False},
    "micro-batches": {"micro_batches": 2},
    "shards": {"shards": (6, 0, 4), "interleaving": Interleaving(2, 4, 1)},
    "budget": {"max_tokens": 8, "lengths": (1, 5, 2, 8, 3, 3, 1, 7, 2, 4)},
}


@pytest.mark.parametrize("tail", ["carry", "drop"])
def test_weighted_samples_are_proven_as_often_as_due(tail: str) -> None:
    """A line from elsewhere is no proof, though its samples be drawn often; nor is a step that was left out."""
    plan = Plan(N, 1, BATCH, tail=tail, weights={0: (1, 0, 5, 1, 1, 1, 1, 1, 1, 1), 2: (1,) * N})
    right = lines(plan, 30)
    proof = verdict(right, plan)
    size = plan.epoch_size
    assert proof.holds
    assert [row["seen"] for row in proof.epochs[2:4]] == [size, size]
    assert proof.epochs[0]["seen"] < size
    assert {(row["repeated"], row["missed"]) for row in proof.epochs} == {(0, 0)}
    assert not verdict(right, replace(plan, weights={0: (1,) * N})).holds
    assert not verdict([*right[:1], replace(right[1], digest=right[2].digest), *right[2:]], plan).holds
    assert not verdict([*right[:1], *right[2:]], plan).holds


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plan_is_proven(kind: str) -> None:
    plan = Plan(N, 1, BATCH, **KINDS[kind])
    proof = verdict(lines(plan, 30), plan)
    assert proof.holds
    assert proof.epochs[:3] == [row(0, 10), row(1, 10), row(2, 10)]


def test_dropped_samples_are_not_missed() -> None:
    plan = Plan(N, 1, BATCH, tail="drop")
    proof = verdict(lines(plan, 5), plan)
    assert proof.holds
    assert proof.epochs == [row(0, 8, dropped=2), row(1, 8, dropped=2), row(2, 4, dropped=2, whole=False)]


@pytest.mark.parametrize(
    "budget", [{}, {"max_tokens": 8, "lengths": (1, 5, 2, 8, 3, 3, 1, 7, 2, 4)}], ids=["", "budget"]
)
def test_a_mixture_has_a_row_for_every_pass_of_a_source(budget: dict[str, Any]) -> None:
    plan = Plan(N, 1, BATCH, sources=(Source(6, 1), Source(4, 3)), **budget)
    found = lines(plan, 40)
    positions = found[-1].last + 1
    proof = verdict(found, plan)
    assert proof.problems == []
    assert sum(one["seen"] for one in proof.epochs) == positions
    for source, size in ((0, 6), (1, 4)):
        rows = [one for one in proof.epochs if one["source"] == source]
        assert rows[:2] == [row(0, size, source=source), row(1, size, source=source)]
        assert [one["epoch"] for one in rows] == [*range(len(rows))]


def test_a_plain_text_of_positions_is_judged_without_a_plan(whole: list[LedgerLine]) -> None:
    assert verdict(whole, None).holds
    assert verdict(whole, None).epochs == []
    assert verdict([*whole[:3], *whole[4:]], None).problems


def moved(line: LedgerLine, by: int, *, longer: int = 0) -> LedgerLine:
    """The same step at other positions, honestly noted."""
    positions = np.arange(line.first + by, line.last + by + longer + 1)
    epochs, places = np.divmod(positions, N)
    order = PLAN.order()
    samples = np.array([order(int(e), np.array([p]))[0] for e, p in zip(epochs, places, strict=True)])
    return LedgerLine(line.step, int(positions[0]), int(positions[-1]), digest_positions(positions, samples))


def test_repeated_positions_are_reported(whole: list[LedgerLine]) -> None:
    proof = verdict([whole[0], moved(whole[1], -2, longer=2), *whole[2:]])
    assert proof.problems == ["positions 2 to 3 were trained again in step 2", "epoch 0: 2 repeated, 0 missed"]
    assert proof.epochs[0] == row(0, 10, repeated=2)


def test_positions_passed_over_are_reported(whole: list[LedgerLine]) -> None:
    proof = verdict([whole[0], moved(whole[1], 2, longer=-2), *whole[2:]])
    assert proof.problems == ["positions 4 to 5 were passed over before step 2", "epoch 0: 0 repeated, 2 missed"]
    assert proof.epochs[0] == row(0, 8, missed=2, whole=False) | {"whole": proof.epochs[0]["whole"]}


@pytest.mark.parametrize(("by", "told"), [(-1, "3 to 3 were trained again"), (1, "4 to 4 were passed over before")])
def test_a_single_position_is_reported(by: int, told: str, whole: list[LedgerLine]) -> None:
    proof = verdict([whole[0], moved(whole[1], by, longer=-by), *whole[2:]])
    assert proof.problems[0].startswith(f"positions {told}")
    assert len(proof.problems) == 2


def test_the_audit_does_not_depend_on_its_chunk_size(whole: list[LedgerLine], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = verdict(whole)
    for together in (1, 5, 9):
        monkeypatch.setattr("runner.data.ledger.CHUNK_POSITIONS", together)
        assert verdict(whole) == expected


def test_a_step_done_twice_instead_of_the_next_is_reported(whole: list[LedgerLine]) -> None:
    """The cursor that did not move: what the project is about."""
    twice = [*whole[:3], *(replace(line, step=line.step + 1) for line in whole[2:])]
    assert verdict(twice).problems == ["positions 8 to 11 were trained again in step 4", *verdict(twice).problems[1:]]
    assert not verdict(twice).holds


def test_a_missing_step_is_reported(whole: list[LedgerLine]) -> None:
    problems = verdict([*whole[:3], *whole[5:]]).problems
    assert problems[:2] == ["steps 4 to 5 are not in the ledger", "positions 12 to 19 were passed over before step 6"]
    assert problems[2:] == ["epoch 1: 0 repeated, 8 missed"]


def test_a_missing_segment_is_reported(whole: list[LedgerLine]) -> None:
    cut = [segment(whole[:3]), segment(whole[5:], step=5)]
    assert "steps 4 to 5 are not in the ledger" in check_exactly_once(cut, PLAN, begun=0, committed=8).problems


def test_a_missing_first_step_is_reported(whole: list[LedgerLine]) -> None:
    problems = verdict(whole[1:]).problems
    assert problems[:2] == ["steps 1 to 1 are not in the ledger", "positions 0 to 3 were passed over before step 2"]


def test_another_digest_is_no_evidence(whole: list[LedgerLine]) -> None:
    proof = verdict([whole[0], replace(whole[1], digest=5), *whole[2:]])
    assert proof.problems == [
        "step 2 has other samples than the plan says: digest 0000000000000005",
        "epoch 0: 0 repeated, 4 missed",
    ]


def test_another_seed_proves_nothing(whole: list[LedgerLine]) -> None:
    proof = verdict(whole, Plan(N, 2, BATCH))
    assert len([problem for problem in proof.problems if "other samples than the plan says" in problem]) == 8


def test_a_ledger_that_ends_before_the_commit_is_reported(whole: list[LedgerLine]) -> None:
    assert verdict(whole, committed=9).problems == ["the ledger ends before step 9, which is committed"]
    assert check_exactly_once([segment([])], PLAN, begun=0, committed=1).problems == [
        "the ledger ends before step 1, which is committed"
    ]


def test_steps_after_the_commit_are_not_judged(whole: list[LedgerLine]) -> None:
    proof = verdict([*whole[:5], replace(whole[5], digest=5), *whole[7:]], committed=5)
    assert proof.holds
    assert (proof.steps, proof.positions) == (5, 20)


def test_a_run_that_committed_nothing_has_nothing_to_prove(whole: list[LedgerLine]) -> None:
    assert verdict(whole, committed=0) == LedgerReport(0, 0, [], AGAIN)
    assert check_exactly_once([], PLAN, begun=0, committed=0).holds


def test_substitutes_are_counted_in_their_epoch() -> None:
    proof = verdict(lines(PLAN, 8, bad=(3, 7)))
    assert proof.holds
    assert [one["substituted"] for one in proof.epochs[:3]] == [2, 2, 2]


@pytest.mark.parametrize("begun", [1, 2, 3, 6])
def test_a_fork_is_judged_from_where_it_began(begun: int) -> None:
    """In the epoch that began before it nothing is missed, and nothing is repeated."""
    proof = check_exactly_once(
        [segment(lines(PLAN, 9, begun=begun), step=begun)], PLAN, begun=begun, committed=begun + 9
    )
    assert proof.problems == []
    assert sum(one["seen"] for one in proof.epochs) == 36
    assert [one["whole"] for one in proof.epochs].count(True) >= 2


def test_a_gap_in_a_fork_is_reported() -> None:
    found = lines(PLAN, 9, begun=2)
    proof = check_exactly_once([segment([*found[:2], *found[3:]], step=2)], PLAN, begun=2, committed=11)
    assert proof.problems[:2] == [
        "steps 5 to 5 are not in the ledger",
        "positions 16 to 19 were passed over before step 6",
    ]
    late = check_exactly_once([segment(found[1:], step=2)], PLAN, begun=2, committed=11)
    assert late.problems[0] == "steps 3 to 3 are not in the ledger"


def lives(*pieces: Sequence[LedgerLine]) -> list[Segment]:
    """Attempt after attempt, each gone on before its first line."""
    return [segment(found, step=found[0].step - 1, attempt=i) for i, found in enumerate(pieces, start=1)]


def test_undone_steps_are_counted_and_not_held_against_the_run(whole: list[LedgerLine]) -> None:
    proof = check_exactly_once(lives(whole[:6], whole[3:5], whole[4:8]), PLAN, begun=0, committed=8)
    assert proof.holds
    assert proof.again == {"steps": 4, "positions": 16, "differing": 0}  # 4, 5, then 5, 6
    assert proof.epochs == verdict(whole).epochs


def test_steps_undone_by_an_older_checkpoint_all_count(whole: list[LedgerLine]) -> None:
    proof = check_exactly_once(lives(whole[:6], whole[2:6], whole[2:8]), PLAN, begun=0, committed=8)
    assert proof.holds
    assert proof.again == {"steps": 8, "positions": 32, "differing": 0}


def test_undone_steps_that_differ_are_reported(whole: list[LedgerLine]) -> None:
    other = replace(whole[4], digest=5)
    proof = check_exactly_once(lives([*whole[:4], other, whole[5]], whole[3:8]), PLAN, begun=0, committed=8)
    assert proof.problems == [f"step 5 was done again with other samples: {other}, then {whole[4]}"]
    assert proof.again == {"steps": 3, "positions": 12, "differing": 1}


def test_a_later_segment_of_the_same_attempt_undoes_nothing(whole: list[LedgerLine]) -> None:
    proof = check_exactly_once([segment(whole[:5]), segment(whole[5:], step=5)], PLAN, begun=0, committed=8)
    assert proof.holds
    assert proof.again == AGAIN


def test_steps_done_again_in_other_groups_are_not_compared(whole: list[LedgerLine]) -> None:
    pairs = lines(replace(PLAN, batch_size=2), 6, begun=3, consumed=12)
    both = [segment(whole[:6]), segment(pairs, step=3, attempt=2, grouping=2)]
    proof = check_exactly_once(both, PLAN, begun=0, committed=9)
    assert proof.holds
    assert proof.again == {"steps": 3, "positions": 6, "differing": 0}
    assert proof.positions == 24


def test_a_million_samples_are_proven() -> None:
    """Built from the plan: a real stream would take its time."""
    plan = Plan(10**6, 1, 1000)
    order = plan.order()
    found = []
    for step in range(1, 1501):
        positions = np.arange((step - 1) * 1000, step * 1000)
        samples = np.concatenate([order(epoch, np.arange(*span)) for epoch, *span in spans(positions)])
        found.append(LedgerLine(step, int(positions[0]), int(positions[-1]), digest_positions(positions, samples)))
    proof = verdict(found, plan)
    assert proof.holds
    assert proof.epochs == [row(0, 10**6), row(1, 500_000, whole=False)]


def spans(positions: Any) -> list[tuple[int, int, int]]:
    epoch, place = divmod(int(positions[0]), 10**6)
    return [(epoch, place, place + len(positions))]


def test_digests_of_slices_add_up() -> None:
    positions, samples = np.arange(10), np.arange(10)[::-1].copy()
    parts = [digest_positions(positions[at : at + 3], samples[at : at + 3]) for at in range(0, 10, 3)]
    assert sum(parts) % 2**64 == digest_positions(positions, samples)
    assert digest_positions(positions, samples) != digest_positions(positions, np.roll(samples, 1))
    assert len({*chain(parts)}) == 4


def test_steps_in_the_first_groups_again_are_not_compared(whole: list[LedgerLine]) -> None:
    """Attempt 1 did step 5 elsewhere than attempt 3, which began where the smaller batches of attempt 2 had led."""
    pairs = lines(replace(PLAN, batch_size=2), 1, begun=3, consumed=12)
    fours = lines(PLAN, 2, begun=4, consumed=14)
    three = [segment(whole[:6]), segment(pairs, step=3, attempt=2, grouping=2), segment(fours, step=4, attempt=3)]
    assert check_exactly_once(three, PLAN, begun=0, committed=6).problems == []

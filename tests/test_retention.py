"""Which checkpoints stay: by rule, and against a restatement of the rules that tries every commit by itself."""

import math
import random

import pytest

from runner.checkpoint.manifest import CommitId
from runner.checkpoint.store import CommitInfo, Retention, best_first


def known(attempt: int, step: int, *, objective: float | None = None, state: str = "verified") -> CommitInfo:
    return CommitInfo(CommitId.new(attempt, step), state == "verified", state == "damaged", objective)


def left(retention: Retention, *commits: CommitInfo) -> list[tuple[int, int]]:
    return sorted((one.attempt, one.step) for one in retention.reasons(commits))


def test_the_newest_stay_by_attempt_then_by_step() -> None:
    history = [known(1, 10), known(1, 30), known(2, 20), known(1, 20), known(2, 5)]
    assert left(Retention(2), *history) == [(2, 5), (2, 20)]
    assert left(Retention(3), *history) == [(1, 30), (2, 5), (2, 20)]


def test_newer_unverified_checkpoints_stay_and_do_not_count() -> None:
    history = [known(1, 1), known(1, 2), known(1, 3, state="unknown"), known(1, 4), known(1, 5, state="unknown")]
    assert left(Retention(2), *history) == [(1, 2), (1, 3), (1, 4), (1, 5)]


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_two_verified_checkpoints_always_stay(asked: int) -> None:
    assert left(Retention(asked, best=0), *[known(1, step) for step in range(5)]) == [(1, 3), (1, 4)]


def test_with_fewer_than_two_verified_nothing_goes() -> None:
    history = [known(1, 1, state="unknown"), known(1, 2, state="unknown"), known(1, 3), known(1, 4, state="damaged")]
    assert len(left(Retention(2), *history)) == 4


def test_damaged_checkpoints_go_after_enough_verified_newer() -> None:
    history = [known(1, step, state="damaged" if step in (2, 4) else "verified") for step in range(1, 6)]
    assert left(Retention(2), *history) == [(1, 3), (1, 4), (1, 5)]


def test_of_every_multiple_the_preferred_checkpoint_stays() -> None:
    history = [known(1, step) for step in (5, 10, 10, 15, 20)] + [known(2, step) for step in (10, 25, 30, 31, 32)]
    assert left(Retention(2, every_steps=10), *history) == [(1, 20), (2, 10), (2, 30), (2, 31), (2, 32)]


def test_of_a_multiple_a_good_checkpoint_stays() -> None:
    history = [known(1, 10), known(2, 10, state="damaged"), known(2, 11), known(2, 12)]
    assert left(Retention(2, every_steps=10), *history) == [(1, 10), (2, 11), (2, 12)]


@pytest.mark.parametrize(("mode", "step"), [("min", 3), ("max", 1), (None, None)])
def test_the_best_stays(mode: str | None, step: int | None) -> None:
    history = [known(1, 1, objective=0.9), known(1, 2, objective=0.5), known(1, 3, objective=0.1), known(1, 4)]
    expected = [(1, 5), (1, 6)]
    kept = left(Retention(2, mode=mode), *history, known(1, 5), known(1, 6))
    assert kept == ([(1, step), *expected] if step else expected)


def test_of_equal_ones_the_earlier_is_better_and_nan_never() -> None:
    values = {1: math.nan, 2: 0.5, 3: 0.5, 4: math.inf, 5: None}
    history = [known(1, step, objective=value) for step, value in values.items()]
    assert [one.id.step for one in best_first(history, "min")] == [2, 3, 4]
    assert [one.id.step for one in best_first(history, "max")] == [4, 2, 3]


def test_of_a_repeated_step_only_the_newer_can_be_the_best() -> None:
    """Attempt 2 continued from step 20: what attempt 1 did after it is no part of the run any more."""
    again = [known(2, 30, objective=0.6), known(2, 50, objective=0.7)]
    undone = [known(1, 30, objective=0.8), known(1, 40, objective=0.9)]
    history = [known(1, 20, objective=0.5), *undone, *again]
    assert [(one.id.attempt, one.id.step) for one in best_first(history, "max")] == [(2, 50), (2, 30), (1, 20)]


def test_a_damaged_checkpoint_is_not_the_best() -> None:
    history = [known(1, 1, objective=0.1, state="damaged"), known(1, 2, objective=0.2), known(1, 3), known(1, 4)]
    assert left(Retention(2, mode="min"), *history) == [(1, 2), (1, 3), (1, 4)]


def test_each_reason_is_reported() -> None:
    history = [known(1, 10), known(1, 11, objective=0.1), known(1, 12), known(1, 13, state="damaged"), known(1, 14)]
    reasons = Retention(2, every_steps=10, mode="min").reasons(history)
    assert {commit.step: why for commit, why in reasons.items()} == {
        14: "newest",
        13: "damaged, too few good ones are newer",
        12: "newest",
        11: "best",
        10: "multiple of 10",
    }


def stays(one: CommitInfo, commits: list[CommitInfo], retention: Retention) -> bool:
    """The rules, each for itself."""
    newer = [other for other in commits if other.id > one.id]
    if sum(other.verified and not other.damaged for other in newer) < max(retention.last, 2):
        return True
    if one.damaged:
        return False
    good = [other for other in commits if not other.damaged]
    if retention.every_steps and one.id.step % retention.every_steps == 0:
        return not any(other.id.step == one.id.step and other.id > one.id for other in good)
    if retention.mode is None:
        return False
    sign = 1 if retention.mode == "min" else -1
    undone = [o for o in good if any(b.id.attempt > o.id.attempt and b.id.step <= o.id.step for b in good)]
    rivals = [o for o in good if o not in undone and o.objective is not None and o.objective == o.objective]
    if one not in rivals:
        return False
    mine = (sign * (one.objective or 0), one.id.step)
    return sum((sign * (o.objective or 0), o.id.step) < mine for o in rivals) < retention.best


def test_the_policy_is_its_rules() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        places = {(chance.randint(1, 3), chance.randint(1, 12)) for _ in range(chance.randint(0, 14))}
        values = [None, math.nan, 0.1, 0.2, 0.3, -math.inf]
        states = ["verified", "verified", "unknown", "damaged"]
        commits = [known(*at, objective=chance.choice(values), state=chance.choice(states)) for at in places]
        retention = Retention(
            chance.randint(0, 4), chance.choice([None, 2, 5]), chance.randint(0, 3), chance.choice(["min", "max", None])
        )
        kept = {*retention.reasons(commits)}
        assert kept == {one.id for one in commits if stays(one, commits, retention)}
        verified = sum(one.verified and not one.damaged for one in commits)
        assert sum(one.verified and one.id in kept for one in commits) >= min(verified, 2)
        assert verified >= 2 or len(kept) == len(commits)

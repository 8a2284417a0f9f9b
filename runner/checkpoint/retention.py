"""Which checkpoints are kept: a pure function of what is known about the existing ones."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.checkpoint.manifest import CommitId

LEAST = 2  # verified commits that are always kept, so that the loss of any one object leaves a checkpoint


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """What is known of a commit when it is decided whether it is kept.

    ``verified``: its bytes were written, or all of them read, by this process. One that is neither verified nor
    damaged may be good.
    """

    id: CommitId
    verified: bool = False
    damaged: bool = False
    objective: float | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """The ``last`` commits, one of every multiple of ``every_steps``, and the ``best`` by the objective.

    Without a ``mode`` (min, max) there is no objective.
    """

    last: int = LEAST
    every_steps: int | None = None
    best: int = 1
    mode: str | None = None

    def pins(self, step: int) -> bool:
        """Whether commits of that step stay for good."""
        return self.every_steps is not None and step % self.every_steps == 0

    def kept(self, commits: Iterable[CommitInfo]) -> set[CommitId]:
        """The commits to keep: at least two verified ones, and all if there are fewer."""
        return {*self.reasons(commits)}

    def reasons(self, commits: Iterable[CommitInfo]) -> dict[CommitId, str]:
        """The commits to keep, the newest first, each with the reason in a few words."""
        newest_first = sorted(commits, key=lambda commit: commit.id, reverse=True)
        best = {commit.id for commit in ranked(newest_first, self.mode)[: self.best]}
        found: dict[CommitId, str] = {}
        verified, pinned = 0, set[int]()
        for commit in newest_first:
            step = commit.id.step
            first_of_step = self.pins(step) and not commit.damaged and step not in pinned
            if first_of_step:
                pinned.add(step)
            if verified < max(self.last, LEAST):
                found[commit.id] = "damaged, too few good ones are newer" if commit.damaged else "newest"
                verified += commit.verified and not commit.damaged
            elif commit.id in best:
                found[commit.id] = "best"
            elif first_of_step:
                found[commit.id] = f"multiple of {self.every_steps}"
        return found


def ranked(commits: Sequence[CommitInfo], mode: str | None) -> list[CommitInfo]:
    """The commits that are not damaged and have an objective, the best first, of equal ones the earlier step.

    One for each step, and none that a newer attempt did not begin from: its step was done again, or it is from a
    process that went on after it had been superseded.
    """
    found: list[CommitInfo] = []
    attempt, below, lowest = 0, math.inf, math.inf
    for commit in sorted(commits, key=lambda commit: commit.id, reverse=True):
        if commit.damaged:
            continue
        if commit.id.attempt != attempt:
            attempt, below = commit.id.attempt, lowest
        if commit.id.step < min(below, found[-1].id.step if found else math.inf) and _is_number(commit.objective):
            found.append(commit)
        lowest = min(lowest, commit.id.step)
    sign = {"min": 1, "max": -1}.get(mode or "")
    return [] if sign is None else sorted(found, key=lambda one: (sign * (one.objective or 0.0), one.id.step))


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)

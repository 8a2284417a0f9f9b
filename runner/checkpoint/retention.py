"""The retention policy: which checkpoints of a run are kept. ``CheckpointStore.retain`` removes the others.

Kept are

* the newest checkpoints, until ``keep_last`` of them are verified (at least two, whatever the configuration says);
* the ``keep_best`` best by the objective;
* the newest undamaged one of every step that is a multiple of ``keep_every_steps``.

The policy is a function of its arguments and remembers nothing between two calls. ``verified`` means that this process
wrote or read the bytes, so a resumed run keeps more for a while. ``python -m runner.runs prune`` applies the same rules
with the numbers of its own options.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.checkpoint.manifest import CommitId
from runner.config.schema import LEAST_KEPT


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """A commit as the policy sees it.

    ``verified``: this process wrote its bytes, or read all of them. A commit that is neither verified nor ``damaged``
    may be good.
    """

    id: CommitId
    verified: bool = False
    damaged: bool = False
    objective: float | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """The policy with its numbers. ``mode`` is min or max; without it no checkpoint is better than another."""

    last: int = LEAST_KEPT
    every_steps: int | None = None
    best: int = 1
    mode: str | None = None

    def pins(self, step: int) -> bool:
        """Whether the newest commit of this step is always kept."""
        return self.every_steps is not None and step % self.every_steps == 0

    def kept(self, commits: Iterable[CommitInfo]) -> set[CommitId]:
        """The commits to keep: at least two verified ones, and all if there are fewer."""
        return {*self.reasons(commits)}

    def reasons(self, commits: Iterable[CommitInfo]) -> dict[CommitId, str]:
        """The commits to keep, the newest first, each with the reason in a few words."""
        newest_first = sorted(commits, key=lambda commit: commit.id, reverse=True)
        best = {commit.id for commit in ranked(newest_first, self.mode)[: self.best]}
        reasons: dict[CommitId, str] = {}
        verified, pinned = 0, set[int]()
        for commit in newest_first:
            step = commit.id.step
            first_of_step = self.pins(step) and not commit.damaged and step not in pinned
            if first_of_step:
                pinned.add(step)
            if verified < max(self.last, LEAST_KEPT):
                reasons[commit.id] = "damaged, too few good ones are newer" if commit.damaged else "newest"
                verified += commit.verified and not commit.damaged
            elif commit.id in best:
                reasons[commit.id] = "best"
            elif first_of_step:
                reasons[commit.id] = f"multiple of {self.every_steps}"
        return reasons


def ranked(commits: Sequence[CommitInfo], mode: str | None) -> list[CommitInfo]:
    """The undamaged commits with an objective, the best first; of equal ones the earlier step first. Empty without a
    ``mode``.

    Only commits that the newest state descends from, one for each step: where a newer attempt resumed from an earlier
    step, the steps after it were done again, or come from a process that went on after it had been superseded.
    """
    lineage: list[CommitInfo] = []
    attempt, limit, lowest = 0, math.inf, math.inf  # of an older attempt only steps below ``limit`` count
    for commit in sorted(commits, key=lambda commit: commit.id, reverse=True):
        if commit.damaged:
            continue
        if commit.id.attempt != attempt:
            attempt, limit = commit.id.attempt, lowest
        below = min(limit, lineage[-1].id.step) if lineage else limit
        if commit.id.step < below and commit.objective is not None and not math.isnan(commit.objective):
            lineage.append(commit)
        lowest = min(lowest, commit.id.step)
    sign = {"min": 1, "max": -1}.get(mode or "")
    if sign is None:
        return []
    return sorted(lineage, key=lambda commit: (sign * (commit.objective or 0.0), commit.id.step))

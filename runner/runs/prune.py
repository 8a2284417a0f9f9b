"""Removes old checkpoints of a run on which no process works, by the rules of a running one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.checkpoint.manifest import CommitId, parse_data
from runner.checkpoint.store import CheckpointStore, CommitInfo, Retention
from runner.checkpoint.tensor_file import Damaged
from runner.config.schema import LEAST_KEPT
from runner.errors import ConfigError
from runner.run import attempts
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts
from runner.runs.listing import format_table


def prune(
    directory: RunDirectory, *, last: int, every_steps: int | None, best: int, remove: bool
) -> list[dict[str, Any]]:
    """All checkpoints, the newest first, with whether each is kept and why. With ``remove`` removes the others, once
    all bytes of two kept ones are verified.

    Raises ConfigError for numbers that are too small, RunInUse while a process works on the run.
    """
    for name, value, least in (("last", last, LEAST_KEPT), ("every-steps", every_steps, 1), ("best", best, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} is too small: at least {least}")
    facts = RunFacts(directory)
    objective, newest = facts.identity.get("objective") or {}, facts.newest
    retention = Retention(last, every_steps, best, objective.get("mode") if objective.get("metric") else None)
    attempts.raise_if_live(directory.location)
    store = CheckpointStore(directory.location)
    if remove:
        _verify(store, retention)
    commits = _survey(store)
    reasons = retention.reasons(commits)
    sizes = Counter[CommitId | None]()
    for entry in store.location.list("data"):
        sizes[parse_data(entry.name)] += entry.size
    if remove:  # files of a process that starts meanwhile belong to a newer attempt and are kept
        store.remove([commit.id for commit in commits], {*reasons}, attempt=newest.number + 1 if newest else 0)
    return [
        {
            "commit": str(commit.id),
            "step": commit.id.step,
            "objective": commit.objective,
            "size": sizes[commit.id],
            "keep": commit.id in reasons,
            "why": reasons.get(commit.id, "damaged" if commit.damaged else "older"),
        }
        for commit in commits
    ]


def format_prune(rows: Sequence[Mapping[str, Any]], *, removed: bool) -> str:
    """The rows as text."""
    sizes = [row["size"] for row in rows if not row["keep"]]
    verb = "Removed" if removed else "Nothing was changed. --yes would remove"
    table = format_table(rows, ["commit", "step", "objective", "size", "keep", "why"])
    return f"{table}\n\n{verb} {len(sizes)} of {len(rows)} checkpoints, {sum(sizes) / 1e6:.1f} MB."


def _survey(store: CheckpointStore) -> list[CommitInfo]:
    """All commits; a commit counts as verified if its manifest and the sizes of its files are right."""
    return [replace(commit, verified=not commit.damaged) for commit in store.survey()]


def _verify(store: CheckpointStore, retention: Retention) -> None:
    """Read the newest kept commits until two are verified. A damaged commit changes which commits are kept."""
    while len(store.verified) < LEAST_KEPT:
        unproven = retention.kept(_survey(store)) - store.verified - store.damaged
        if not unproven:
            return  # there are fewer than two, so everything is kept
        newest = max(unproven)
        try:
            store.open(newest).verify()
            store.verified.add(newest)
        except Damaged:
            store.damaged.add(newest)

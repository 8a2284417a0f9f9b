"""Removes old checkpoints of a run on which no process works, by the same policy as a running one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.checkpoint.manifest import CommitId, parse_data
from runner.checkpoint.retention import CommitInfo, Retention
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import Damaged
from runner.config.schema import LEAST_KEPT
from runner.errors import ConfigError
from runner.run import attempt_records, attempts
from runner.run.directory import RunDirectory
from runner.runs import listing


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
    goal = (directory.identity() or {}).get("objective") or {}
    retention = Retention(last, every_steps, best, goal.get("mode") if goal.get("metric") else None)
    newest = attempt_records.last(directory.location)
    attempts.raise_if_live(directory.location)
    store = CheckpointStore(directory.location)
    if remove:
        _verify(store, retention)
    known = _survey(store)
    reasons = retention.reasons(known)
    rows = _rows(known, reasons, store)
    if remove:  # files of a process that starts meanwhile belong to a newer attempt and are kept
        store.remove([one.id for one in known], {*reasons}, attempt=newest.number + 1 if newest else 0)
    return rows


def text(rows: Sequence[Mapping[str, Any]], *, removed: bool) -> str:
    """The same for people."""
    gone = [row["size"] for row in rows if not row["keep"]]
    would = "Removed" if removed else "Nothing was changed. --yes would remove"
    told = listing.table(rows, ["commit", "step", "objective", "size", "keep", "why"])
    return f"{told}\n\n{would} {len(gone)} of {len(rows)} checkpoints, {sum(gone) / 1e6:.1f} MB."


def _survey(store: CheckpointStore) -> list[CommitInfo]:
    """All commits; one counts as verified if its manifest and the sizes of its files are right."""
    return [replace(one, verified=not one.damaged) for one in store.survey()]


def _verify(store: CheckpointStore, retention: Retention) -> None:
    """Read the newest kept commits until two are verified. A damaged one changes which commits are kept."""
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


def _rows(known: list[CommitInfo], reasons: dict[CommitId, str], store: CheckpointStore) -> list[dict[str, Any]]:
    sizes = Counter[CommitId | None]()
    for entry in store.location.list("data"):
        sizes[parse_data(entry.name)] += entry.size
    return [
        {
            "commit": str(one.id),
            "step": one.id.step,
            "objective": one.objective,
            "size": sizes[one.id],
            "keep": one.id in reasons,
            "why": reasons.get(one.id, "damaged" if one.damaged else "older"),
        }
        for one in known
    ]

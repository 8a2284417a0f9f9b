"""Thinning out the checkpoints of a run that nobody works on, by the policy that runs themselves go by."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.checkpoint.manifest import CommitId, parse_data
from runner.checkpoint.retention import LEAST, Kept, Retention
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensors import Damaged
from runner.errors import ConfigError
from runner.run import attempts, records
from runner.run.directory import RunDirectory
from runner.runs import screen


def prune(
    directory: RunDirectory, *, last: int, every_steps: int | None, best: int, remove: bool
) -> list[dict[str, Any]]:
    """Every checkpoint, the newest first: what it is, whether it is kept and why. Removes the others only if told to,
    and then not before all bytes of two that are kept were verified.

    Raises ConfigError for numbers that cannot be meant, RunInUse while a process has the run.
    """
    for name, value, least in (("last", last, LEAST), ("every-steps", every_steps, 1), ("best", best, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} is too small: at least {least}")
    goal = (directory.identity() or {}).get("objective") or {}
    retention = Retention(last, every_steps, best, goal.get("mode") if goal.get("metric") else None)
    newest = records.last(directory.location)
    attempts.raise_if_live(directory.location)
    store = CheckpointStore(directory.location)
    if remove:
        _verify(store, retention)
    known = _survey(store)
    reasons = retention.reasons(known)
    rows = _rows(known, reasons, store)
    if remove:  # a process that starts now is of a newer attempt, whose files are not touched
        store.remove([one.id for one in known], {*reasons}, attempt=newest.number + 1 if newest else 0)
    return rows


def text(rows: Sequence[Mapping[str, Any]], *, removed: bool) -> str:
    """The same for people."""
    gone = [row["size"] for row in rows if not row["keep"]]
    would = "Removed" if removed else "Nothing was changed. --yes would remove"
    told = screen.table(rows, ["commit", "step", "objective", "size", "keep", "why"])
    return f"{told}\n\n{would} {len(gone)} of {len(rows)} checkpoints, {sum(gone) / 1e6:.1f} MB."


def _survey(store: CheckpointStore) -> list[Kept]:
    """Every commit that is not known as damaged counts as good: manifest and sizes are right."""
    return [replace(one, verified=not one.damaged) for one in store.survey()]


def _verify(store: CheckpointStore, retention: Retention) -> None:
    """Read the newest of those to be kept until two are proven good. Damage found on the way changes what is kept."""
    while len(store.verified) < LEAST:
        unproven = retention.kept(_survey(store)) - store.verified - store.damaged
        if not unproven:
            return  # there are fewer than two, so everything is kept
        newest = max(unproven)
        try:
            store.open(newest).verify()
            store.verified.add(newest)
        except Damaged:
            store.damaged.add(newest)


def _rows(known: list[Kept], reasons: dict[CommitId, str], store: CheckpointStore) -> list[dict[str, Any]]:
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

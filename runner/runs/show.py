"""How the configurations and the results of two runs differ.

Everything about one run: its attempts, what changed between them, and how many steps each lost.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from runner.checkpoint import manifest
from runner.run import attempt_records, drift
from runner.run.directory import RunDirectory
from runner.run.parent import ParentRecord
from runner.runs import listing
from runner.runs.listing import Facts, integer, overview


def diff(a: RunDirectory, b: RunDirectory) -> dict[str, Any]:
    """The keys that differ in the configurations and in the results, with their values in ``a`` and ``b``. If a side
    lacks the key, it is left out.
    """
    (first, then), (second, now) = _sides(a), _sides(b)
    return {
        "a": a.location.url,
        "b": b.location.url,
        "configuration": sides(drift.compare(first, second), "a", "b"),
        "result": sides(drift.compare(then, now), "a", "b"),
    }


def sides(differences: Sequence[drift.ChangedKey], left: str, right: str) -> list[dict[str, Any]]:
    """Differences as plain values, without what is absent."""
    rows = ({"key": each.key, left: each.saved, right: each.now} for each in differences)
    return [{name: value for name, value in row.items() if value is not drift.ABSENT} for row in rows]


def diff_text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    parts = [listing.pairs({"a": found["a"], "b": found["b"]})]
    for what in ("configuration", "result"):
        rows = found[what]
        parts.append(f"{what}\n{diff_table(rows, 'a', 'b')}" if rows else f"The {what}s do not differ.")
    return "\n\n".join(parts)


def diff_table(rows: Sequence[Mapping[str, Any]], *columns: str) -> str:
    """Differences as a table; ``columns`` end with the two sides."""
    shown = [{**row, **{side: _shown(row, side) for side in columns[-2:]}} for row in rows]
    return listing.table(shown, [*columns[:-2], "key", *columns[-2:]])


def _sides(directory: RunDirectory) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Configuration and result of a run, or how far it has come."""
    facts = Facts.of(directory)
    line, result = overview(directory.name, directory, facts), facts.result or {}
    shown = {key: result[key] for key in ("reason", "epochs", "metrics") if key in result}
    return facts.identity, {"status": line.status, "step": line.step, "objective": result.get("objective"), **shown}


def _shown(row: Mapping[str, Any], side: str) -> str:
    return listing.value(row[side]) if side in row else "(absent)"


_ATTEMPTS = ("attempt", "outcome", "started", "resumed", "step", "committed", "lost", "host", "reason")


def details(directory: RunDirectory) -> dict[str, Any]:
    """Everything about one run, as plain values."""
    facts = Facts.of(directory)
    history = attempt_records.history(directory.location)
    newest = facts.newest.claim if facts.newest else {}
    origin = ParentRecord.of(directory)
    begun = origin.start if origin else 0
    return {
        **asdict(overview(directory.name, directory, facts)),
        "url": directory.location.url,
        "record": facts.record,
        "identity": facts.identity,
        "result": facts.result,
        "overrides": newest.get("overrides"),
        "attempts": [
            {**_attempt(record), "lost": lost} for record, lost in zip(history, _lost(history, begun), strict=True)
        ],
        "drift": _drift(directory, history),
        "checkpoints": [asdict(commit) for commit in manifest.commits(directory.location)],
    }


def details_text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    result, overrides = found["result"] or {}, found["overrides"]
    facts = {key: found[key] for key in ("run", "url", "status", "step", "max_steps", "objective")} | {
        "created": found["record"].get("created"),
        "parent": _lineage(found["record"].get("parent")),
        "overrides": shlex.join(map(str, overrides)) if isinstance(overrides, list) else None,
        "result": _result(result) if result else None,
    }
    parts = [listing.pairs(facts), "attempts\n" + listing.table(found["attempts"], _ATTEMPTS)]
    told = [attempt["reason"] for attempt in found["attempts"][-1:]]
    if told and told[0] and listing.cell(told[0]) != told[0]:
        parts.append(f"why the last attempt ended\n{told[0]}")
    if found["drift"]:
        parts.append("accepted changes\n" + diff_table(found["drift"], "attempt", "before", "after"))
    parts.append("checkpoints, newest first\n" + listing.table(found["checkpoints"], ["step", "attempt", "nonce"]))
    return "\n\n".join(parts)


def _attempt(record: attempt_records.AttemptRecord) -> dict[str, Any]:
    end = record.end or {}
    return {
        "attempt": record.number,
        "outcome": record.outcome(),
        "reason": end.get("reason"),
        "resumed": record.beat.get("resumed"),
        "step": record.beat.get("step"),
        "committed": record.beat.get("committed"),
        "unusable": record.beat.get("unusable"),
        "seen": record.seen(),
        **{key: record.claim.get(key) for key in ("started", "host", "pid", "overrides", "topology", "version")},
    }


def _lost(history: Sequence[attempt_records.AttemptRecord], begun: int) -> list[int | None]:
    """The number of steps that had to be repeated after each attempt, at least: a heartbeat records the step only now
    and then. None if no later attempt has resumed yet.
    """
    found: list[int | None] = []
    resumed = None
    for record in reversed(history):
        reached = integer((record.end or record.beat).get("step"))
        commit = manifest.parse_commit(f"{resumed}.json")
        lost = None if reached is None or resumed is None else reached - (commit.step if commit else begun)
        found.append(lost if lost is None else max(lost, 0))
        resumed = told if isinstance(told := record.beat.get("resumed"), str) else resumed
    return found[::-1]


def _drift(directory: RunDirectory, history: list[attempt_records.AttemptRecord]) -> list[dict[str, Any]]:
    """What each attempt changed in the configuration that the run had until then."""
    before = configured = directory.configured() or {}
    found = []
    for record in history:
        accepted = record.claim.get("accepted")
        after = accepted if isinstance(accepted, dict) else configured
        changes = sides(drift.compare(before, after), "before", "after")
        found += [{"attempt": record.number, **change} for change in changes]
        before = after
    return found


def _lineage(parent: Any) -> str | None:
    if not isinstance(parent, dict):
        return None
    inherited = {"model": "weights", "all": "everything"}.get(str(parent.get("inherit")), "something")
    return f"{inherited} of step {parent.get('step')} of {parent.get('run')}"


def _result(result: Mapping[str, Any]) -> str:
    metrics = result.get("metrics")
    told = f"step {listing.cell(result.get('step'))} ({listing.cell(result.get('reason'))})"
    return f"{told}, {listing.scalars(metrics)}" if isinstance(metrics, dict) and metrics else told

"""One run in detail: its attempts, accepted changes and lost steps; and the differences between two runs."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from runner.checkpoint import manifest
from runner.run import drift
from runner.run.attempt_records import AttemptRecord
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts, integer
from runner.runs.listing import format_cell, format_facts, format_setting, format_table

_ATTEMPT_COLUMNS = ("attempt", "outcome", "started", "resumed", "step", "committed", "lost", "host", "reason")


def details(directory: RunDirectory) -> dict[str, Any]:
    """Everything about one run, as plain values."""
    facts, attempts = RunFacts(directory), []
    for record, lost in zip(facts.attempts, _lost_steps(facts.attempts, facts.start), strict=True):
        ending = {"attempt": record.number, "outcome": record.outcome(), "reason": record.ending("reason")}
        beat = {key: record.beat.get(key) for key in ("resumed", "step", "committed", "unusable")}
        claim = {key: record.claim.get(key) for key in ("started", "host", "pid", "overrides", "topology", "version")}
        attempts.append({**ending, **beat, "seen": record.seen(), **claim, "lost": lost})
    changes: list[dict[str, Any]] = []  # that an attempt made to the configuration that the run had until then
    before = configured = directory.configured() or {}
    for record in facts.attempts:
        accepted = record.claim.get("accepted")
        after = accepted if isinstance(accepted, dict) else configured
        changes += [{"attempt": record.number, **row} for row in _changes(before, after, "before", "after")]
        before = after
    return {
        **asdict(facts.summary()),
        "url": directory.location.url,
        "record": facts.record,
        "identity": facts.identity,
        "result": facts.result,
        "overrides": facts.newest.claim.get("overrides") if facts.newest else None,
        "attempts": attempts,
        "drift": changes,
        "checkpoints": [asdict(commit) for commit in facts.commits],
    }


def format_details(run: Mapping[str, Any]) -> str:
    """The values of ``details`` as text."""
    facts = {key: run[key] for key in ("run", "url", "status", "step", "max_steps", "objective")}
    facts["created"] = run["record"].get("created")
    if isinstance(parent := run["record"].get("parent"), dict):
        inherited = {"model": "weights", "all": "everything"}.get(str(parent.get("inherit")), "something")
        facts["parent"] = f"{inherited} of step {parent.get('step')} of {parent.get('run')}"
    if isinstance(run["overrides"], list):
        facts["overrides"] = shlex.join(map(str, run["overrides"]))
    if result := run["result"]:
        metrics = result["metrics"].items() if isinstance(result.get("metrics"), dict) else ()
        values = "".join(f", {format_cell(name)} {format_cell(value)}" for name, value in metrics)
        facts["result"] = f"step {format_cell(result.get('step'))} ({format_cell(result.get('reason'))}){values}"
    parts = [format_facts(facts), "attempts\n" + format_table(run["attempts"], _ATTEMPT_COLUMNS)]
    reason = run["attempts"][-1]["reason"] if run["attempts"] else None
    if reason and format_cell(reason) != reason:  # too long for the table
        parts.append(f"why the last attempt ended\n{reason}")
    if run["drift"]:
        parts.append("accepted changes\n" + _format_changes(run["drift"], "attempt", "before", "after"))
    parts.append("checkpoints, newest first\n" + format_table(run["checkpoints"], ["step", "attempt", "nonce"]))
    return "\n\n".join(parts)


def diff(a: RunDirectory, b: RunDirectory) -> dict[str, Any]:
    """The keys that differ in configuration and result, with their values in ``a`` and ``b``, unless absent there."""
    left, right = RunFacts(a), RunFacts(b)
    configuration = _changes(left.identity, right.identity, "a", "b")
    result = _changes(_progress(left), _progress(right), "a", "b")
    return {"a": a.location.url, "b": b.location.url, "configuration": configuration, "result": result}


def format_diff(differences: Mapping[str, Any]) -> str:
    """The values of ``diff`` as text."""
    parts = [format_facts({"a": differences["a"], "b": differences["b"]})]
    for half in ("configuration", "result"):
        rows = differences[half]
        parts.append(f"{half}\n{_format_changes(rows, 'a', 'b')}" if rows else f"The {half}s do not differ.")
    return "\n\n".join(parts)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], left: str, right: str) -> list[dict[str, Any]]:
    """The keys that differ, as plain values under ``left`` and ``right``, without absent ones."""
    rows = ({"key": each.key, left: each.saved, right: each.now} for each in drift.compare(before, after))
    return [{name: value for name, value in row.items() if value is not drift.ABSENT} for row in rows]


def _format_changes(rows: Sequence[Mapping[str, Any]], *columns: str) -> str:
    """Differences as a table; ``columns`` end with the names of the two sides."""
    *others, left, right = columns
    cells = [dict(row) for row in rows]
    for cell in cells:
        cell |= {side: format_setting(cell[side]) if side in cell else "(absent)" for side in (left, right)}
    return format_table(cells, [*others, "key", left, right])


def _progress(facts: RunFacts) -> dict[str, Any]:
    summary, result = facts.summary(), facts.result or {}
    rest: dict[str, Any] = {key: result[key] for key in ("reason", "epochs", "metrics") if key in result}
    return {"status": summary.status, "step": summary.step, "objective": result.get("objective"), **rest}


def _lost_steps(attempts: Sequence[AttemptRecord], start: int) -> list[int | None]:
    """The number of steps that had to be repeated after each attempt, at least: a heartbeat records the step only now
    and then. None if no later attempt has resumed yet. ``start``: the step after which the run started.
    """
    lost: list[int | None] = []
    resumed = None  # the checkpoint from which the next attempt resumed
    for record in reversed(attempts):
        reached = integer((record.end or record.beat).get("step"))
        commit = manifest.parse_commit(f"{resumed}.json")
        again = None if reached is None else max(reached - (commit.step if commit else start), 0)
        lost.append(None if resumed is None else again)
        resumed = own if isinstance(own := record.beat.get("resumed"), str) else resumed
    return lost[::-1]

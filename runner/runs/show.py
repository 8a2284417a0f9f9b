"""One run in detail: its attempts, accepted changes and lost steps; and the differences between two runs."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from runner.checkpoint import manifest
from runner.run.attempts import AttemptRecord
from runner.run.directory import RunDirectory
from runner.run.opening import ABSENT, compare
from runner.run_facts import RunFacts, integer
from runner.runs.listing import format_cell, format_facts, format_setting, format_table

_ATTEMPT_COLUMNS = ("attempt", "outcome", "started", "resumed", "step", "committed", "lost", "host", "reason")


def details(directory: RunDirectory) -> dict[str, Any]:
    """Everything about one run, as plain values."""
    facts = RunFacts(directory)
    lost = _lost_steps(facts.attempts, facts.start)
    return {
        **asdict(facts.summary()),
        "url": directory.location.url,
        "record": facts.record,
        "identity": facts.identity,
        "result": facts.result,
        "overrides": facts.newest.claim.get("overrides") if facts.newest else None,
        "attempts": [{**_attempt(record), "lost": steps} for record, steps in zip(facts.attempts, lost, strict=True)],
        "drift": _accepted_changes(directory, facts.attempts),
        "checkpoints": [asdict(commit) for commit in facts.commits],
    }


def format_details(run: Mapping[str, Any]) -> str:
    """The values of ``details`` as text."""
    result, overrides = run["result"] or {}, run["overrides"]
    facts = {key: run[key] for key in ("run", "url", "status", "step", "max_steps", "objective")} | {
        "created": run["record"].get("created"),
        "parent": _format_parent(run["record"].get("parent")),
        "overrides": shlex.join(map(str, overrides)) if isinstance(overrides, list) else None,
        "result": _format_result(result) if result else None,
    }
    parts = [format_facts(facts), "attempts\n" + format_table(run["attempts"], _ATTEMPT_COLUMNS)]
    reason = run["attempts"][-1]["reason"] if run["attempts"] else None
    if reason and format_cell(reason) != reason:  # too long for the table
        parts.append(f"why the last attempt ended\n{reason}")
    if run["drift"]:
        parts.append("accepted changes\n" + _format_changes(run["drift"], "attempt", "before", "after"))
    parts.append("checkpoints, newest first\n" + format_table(run["checkpoints"], ["step", "attempt", "nonce"]))
    return "\n\n".join(parts)


def diff(a: RunDirectory, b: RunDirectory) -> dict[str, Any]:
    """The keys that differ in the configurations and in the results, with their values in ``a`` and ``b``. A side that
    lacks the key is left out.
    """
    left, right = RunFacts(a), RunFacts(b)
    return {
        "a": a.location.url,
        "b": b.location.url,
        "configuration": _changes(left.identity, right.identity, "a", "b"),
        "result": _changes(_progress(left), _progress(right), "a", "b"),
    }


def format_diff(differences: Mapping[str, Any]) -> str:
    """The values of ``diff`` as text."""
    parts = [format_facts({"a": differences["a"], "b": differences["b"]})]
    for half in ("configuration", "result"):
        rows = differences[half]
        parts.append(f"{half}\n{_format_changes(rows, 'a', 'b')}" if rows else f"The {half}s do not differ.")
    return "\n\n".join(parts)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], left: str, right: str) -> list[dict[str, Any]]:
    """The keys that differ, as plain values under ``left`` and ``right``, without absent ones."""
    rows = ({"key": each.key, left: each.saved, right: each.now} for each in compare(before, after))
    return [{name: value for name, value in row.items() if value is not ABSENT} for row in rows]


def _format_changes(rows: Sequence[Mapping[str, Any]], *columns: str) -> str:
    """Differences as a table; ``columns`` end with the names of the two sides."""
    *others, left, right = columns
    cells = [
        {**row, **{side: format_setting(row[side]) if side in row else "(absent)" for side in (left, right)}}
        for row in rows
    ]
    return format_table(cells, [*others, "key", left, right])


def _progress(facts: RunFacts) -> dict[str, Any]:
    """The result of a run, or how far it has come."""
    summary, result = facts.summary(), facts.result or {}
    rest: dict[str, Any] = {key: result[key] for key in ("reason", "epochs", "metrics") if key in result}
    return {"status": summary.status, "step": summary.step, "objective": result.get("objective"), **rest}


def _attempt(record: AttemptRecord) -> dict[str, Any]:
    return {
        "attempt": record.number,
        "outcome": record.outcome(),
        "reason": record.ending("reason"),
        **{key: record.beat.get(key) for key in ("resumed", "step", "committed", "unusable")},
        "seen": record.seen(),
        **{key: record.claim.get(key) for key in ("started", "host", "pid", "overrides", "topology", "version")},
    }


def _lost_steps(attempts: Sequence[AttemptRecord], start: int) -> list[int | None]:
    """The number of steps that had to be repeated after each attempt, at least: a heartbeat records the step only now
    and then. None if no later attempt has resumed yet. ``start``: the step after which the run started.
    """
    lost: list[int | None] = []
    resumed = None  # the checkpoint from which the next attempt resumed
    for record in reversed(attempts):
        reached = integer((record.end or record.beat).get("step"))
        commit = manifest.parse_commit(f"{resumed}.json")
        if reached is None or resumed is None:
            lost.append(None)
        else:
            lost.append(max(reached - (commit.step if commit else start), 0))
        resumed = own if isinstance(own := record.beat.get("resumed"), str) else resumed
    return lost[::-1]


def _accepted_changes(directory: RunDirectory, attempts: Sequence[AttemptRecord]) -> list[dict[str, Any]]:
    """The changes that each attempt made to the configuration that the run had until then."""
    before = configured = directory.configured() or {}
    changes = []
    for record in attempts:
        accepted = record.claim.get("accepted")
        after = accepted if isinstance(accepted, dict) else configured
        changes += [{"attempt": record.number, **row} for row in _changes(before, after, "before", "after")]
        before = after
    return changes


def _format_parent(parent: Any) -> str | None:
    if not isinstance(parent, dict):
        return None
    inherited = {"model": "weights", "all": "everything"}.get(str(parent.get("inherit")), "something")
    return f"{inherited} of step {parent.get('step')} of {parent.get('run')}"


def _format_result(result: Mapping[str, Any]) -> str:
    text = f"step {format_cell(result.get('step'))} ({format_cell(result.get('reason'))})"
    metrics = result.get("metrics")
    values = metrics.items() if isinstance(metrics, dict) else ()
    return ", ".join([text, *(f"{format_cell(name)} {format_cell(value)}" for name, value in values)])

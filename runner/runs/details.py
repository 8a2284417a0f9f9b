"""Everything about one run: its attempts, what changed between them, and how many steps each lost."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from runner.checkpoint import manifest
from runner.run import drift, records
from runner.run.directory import RunDirectory
from runner.run.parent import Origin
from runner.runs import diff, screen
from runner.runs.overview import Facts, integer, overview

_ATTEMPTS = ("attempt", "outcome", "started", "resumed", "step", "committed", "lost", "host", "reason")


def details(directory: RunDirectory) -> dict[str, Any]:
    """Everything about one run, as plain values."""
    facts = Facts.of(directory)
    history = records.history(directory.location)
    newest = facts.newest.claim if facts.newest else {}
    origin = Origin.of(directory)
    begun = origin.begun if origin else 0
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


def text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    result, overrides = found["result"] or {}, found["overrides"]
    facts = {key: found[key] for key in ("run", "url", "status", "step", "max_steps", "objective")} | {
        "created": found["record"].get("created"),
        "parent": _lineage(found["record"].get("parent")),
        "overrides": shlex.join(map(str, overrides)) if isinstance(overrides, list) else None,
        "result": _result(result) if result else None,
    }
    parts = [screen.pairs(facts), "attempts\n" + screen.table(found["attempts"], _ATTEMPTS)]
    told = [attempt["reason"] for attempt in found["attempts"][-1:]]
    if told and told[0] and screen.cell(told[0]) != told[0]:
        parts.append(f"why the last attempt ended\n{told[0]}")
    if found["drift"]:
        parts.append("accepted changes\n" + diff.table(found["drift"], "attempt", "before", "after"))
    parts.append("checkpoints, newest first\n" + screen.table(found["checkpoints"], ["step", "attempt", "nonce"]))
    return "\n\n".join(parts)


def _attempt(record: records.Record) -> dict[str, Any]:
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


def _lost(history: Sequence[records.Record], begun: int) -> list[int | None]:
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


def _drift(directory: RunDirectory, history: list[records.Record]) -> list[dict[str, Any]]:
    """What each attempt changed in the configuration that the run had until then."""
    before = configured = directory.configured() or {}
    found = []
    for record in history:
        accepted = record.claim.get("accepted")
        after = accepted if isinstance(accepted, dict) else configured
        changes = diff.sides(drift.compare(before, after), "before", "after")
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
    told = f"step {screen.cell(result.get('step'))} ({screen.cell(result.get('reason'))})"
    return f"{told}, {screen.scalars(metrics)}" if isinstance(metrics, dict) and metrics else told

"""The commands that show runs: the list under a root, one run in detail, the differences between two; and how all
commands print values on a terminal.

Control characters are escaped where a value is printed, because anyone may have written it.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from tabulate import tabulate

from runner.checkpoint import manifest
from runner.config.identity import ABSENT, compare
from runner.errors import ConfigError, printable
from runner.run import code
from runner.run.attempts import HIGHEST, AttemptRecord
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts, RunSummary, integer, map_runs

# The statuses of runs, the most interesting first.
_UNDONE = ("running", "unknown", "failed", "diverged", "killed", "interrupted", "superseded", "new")
STATES = (*_UNDONE, "finished", "complete", "unreadable")
SORTS = ("status", "step", "objective", "attempts", "age", "name")
_COLUMNS = ("status", "step / max", "objective", "attempts", "age", "host")
_ATTEMPT_COLUMNS = ("attempt", "outcome", "started", "resumed", "step", "committed", "lost", "host", "reason")
_WIDEST = 64  # characters of a cell
_WIDEST_NAME = 1000  # characters of the name of a run, or of a fact that has a line for itself
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def list_runs(
    root: str, selects: Callable[[RunSummary], bool], options: Mapping[str, Any] | None = None
) -> list[RunSummary]:
    """The selected runs under a root. Raises ConfigError if there are no runs at all, StorageError for the root."""
    runs = map_runs(root, lambda path, facts: facts.summary(path), lambda summary: summary, options)
    return [*filter(selects, runs)]


def sort_runs(runs: list[RunSummary], column: str, *, reverse: bool = False) -> list[RunSummary]:
    """The runs by a column of ``SORTS``, the youngest first by age; those without a value are last either way."""

    def key(run: RunSummary) -> Any:
        if column == "status":
            return STATES.index(run.state) if run.state in STATES else len(STATES)
        if column == "age":
            return -datetime.fromisoformat(run.last_seen).timestamp() if run.last_seen else None
        return getattr(run, "run" if column == "name" else column)

    valued = sorted((run for run in runs if key(run) is not None), key=key, reverse=reverse)
    return valued + [run for run in runs if key(run) is None]


def format_runs(runs: list[RunSummary]) -> str:
    """The table of the list."""
    return format_table(map(_row, runs), ["run", *_COLUMNS])


def _row(run: RunSummary) -> dict[str, Any]:
    steps = run.step if run.max_steps is None else f"{run.step} / {run.max_steps}"
    age = None
    if run.last_seen is not None:  # another machine's clock may be ahead
        seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(run.last_seen)).total_seconds()
        age = next((f"{seconds // size:.0f} {unit} ago" for unit, size in _UNITS if seconds >= size), "now")
    return {**asdict(run), "step / max": steps, "age": age}


def format_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows under the columns' names; a missing value stays empty."""
    widths = {"run": _WIDEST_NAME}  # other commands need it, and the runs of a sweep may differ only at its end
    cells = [[format_cell(row.get(name), widest=widths.get(name, _WIDEST)) for name in columns] for row in rows]
    return tabulate(cells, headers=list(map(format_cell, columns)), disable_numparse=True)


def format_facts(facts: Mapping[str, Any]) -> str:
    """A line for each fact that is not None."""
    lines = [(name, format_cell(value, widest=_WIDEST_NAME)) for name, value in facts.items() if value is not None]
    return tabulate(lines, tablefmt="plain", disable_numparse=True)


def format_cell(value: Any, *, widest: int = _WIDEST) -> str:
    """A value in a line of at most ``widest`` characters."""
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else printable(value).partition("\n")[0]
    return text if len(text) <= widest else f"{text[: widest - 3]}..."


def format_setting(value: Any) -> str:
    """A value of a configuration as JSON, but a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def setting(text: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``; a value that is JSON is parsed. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text} is not a setting: give KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def details(directory: RunDirectory, *, with_code: bool = False) -> dict[str, Any]:
    """Everything about one run, as plain values; ``with_code`` also what code each attempt ran."""
    facts, attempts = RunFacts(directory), []
    for record, lost in zip(facts.attempts, _lost_steps(facts.attempts, facts.start), strict=True):
        ending = {"attempt": record.number, "outcome": record.outcome(), "reason": record.ending("reason")}
        beat = {key: record.beat.get(key) for key in ("resumed", "step", "committed", "unusable")}
        claim = {key: record.claim.get(key) for key in ("started", "host", "pid", "overrides", "topology", "version")}
        attempts.append({**ending, **beat, "last_seen": record.last_sign(), **claim, "lost": lost})
    changes: list[dict[str, Any]] = []  # rows: a changed key, and the attempt that accepted it
    before = configured = directory.configuration() or {}
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
        **({"code": _codes(facts)} if with_code else {}),
    }


def format_details(run: Mapping[str, Any]) -> str:
    """The values of ``details`` as text."""
    facts = {key: run[key] for key in ("run", "url", "status", "step", "max_steps", "objective")}
    facts["created"] = run["record"].get("created")
    if isinstance(parent := run["record"].get("parent"), dict):
        inherited = {"model": "weights", "all": "everything"}.get(str(parent.get("inherit")), "something")
        step = "" if str(parent.get("commit")).startswith("xxh3:") else f" of step {parent.get('step')}"
        facts["parent"] = f"{inherited}{step} of {parent.get('run')}"
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
    return "\n\n".join([*parts, *_format_codes(run["code"])] if "code" in run else parts)


def _codes(facts: RunFacts) -> list[dict[str, Any]]:
    """The code of each attempt that ran other code than the attempt before, and the files ``edited`` in between."""
    codes, before = [], code.CodeRecord()
    for record in facts.attempts:
        if (now := code.read(record.location, record.name)) is not None:
            codes.append({"attempt": record.number, "edited": before.edited(now), **asdict(now)})
            before = now
    return codes


def _format_codes(codes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not codes:
        yield "code\nNo attempt has a record of it: this version is the first that makes one."
        return
    cells = []
    for each in codes:
        commits = [f"{commit[:12]}{'+' * (top in each['diffs'])}" for top, commit in each["commits"].items()]
        edited = ", ".join(each["edited"])
        row = {"attempt": each["attempt"], "commit": ", ".join(commits), "files": len(each["files"]), "edited": edited}
        cells.append(row)
    table = format_table(cells, ["attempt", "commit", "files", "edited"])
    yield f"code, where an attempt changed it (+: with changes that are not committed)\n{table}"
    newest = codes[-1]
    yield f"files of attempt {newest['attempt']}\n{format_facts(newest['files'])}"
    yield f"packages of attempt {newest['attempt']}\n" + " ".join(f"{k}={v}" for k, v in newest["packages"].items())
    for each in codes:
        for top, diff in each["diffs"].items():
            yield f"changes of attempt {each['attempt']} that are not committed, in {top}\n{diff}"


def diff(a: RunDirectory, b: RunDirectory) -> dict[str, Any]:
    """The keys that differ in configuration and result, with their values in ``a`` and ``b``, unless absent there."""
    left, right = RunFacts(a), RunFacts(b)
    return {
        "a": a.location.url,
        "b": b.location.url,
        "configuration": _changes(left.identity, right.identity, "a", "b"),
        "code": _changes(_code(left), _code(right), "a", "b"),
        "result": _changes(_progress(left), _progress(right), "a", "b"),
    }


def _code(facts: RunFacts) -> dict[str, Any]:
    """The newest code of a run, by commit, file and package."""
    record = code.newest(facts.directory.location, below=HIGHEST) or code.CodeRecord()
    commits = {"commit" if number == 0 else top: commit for number, (top, commit) in enumerate(record.commits.items())}
    packages = {f"package {name}": version for name, version in record.packages.items()}
    return {**commits, **{f"file {name}": digest for name, digest in record.files.items()}, **packages}


def format_diff(differences: Mapping[str, Any]) -> str:
    """The values of ``diff`` as text."""
    parts = [format_facts({"a": differences["a"], "b": differences["b"]})]
    for part in ("configuration", "code", "result"):
        rows, same = differences[part], f"The {part}s do not differ."
        same = "The code does not differ, as far as it is recorded." if part == "code" else same
        parts.append(f"{part}\n{_format_changes(rows, 'a', 'b')}" if rows else same)
    return "\n\n".join(parts)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], left: str, right: str) -> list[dict[str, Any]]:
    """The keys that differ, with their values under ``left`` and ``right``, unless absent there."""
    rows = ({"key": each.key, left: each.before, right: each.now} for each in compare(before, after))
    return [{name: value for name, value in row.items() if value is not ABSENT} for row in rows]


def _format_changes(rows: Sequence[Mapping[str, Any]], *columns: str) -> str:
    """Differences as a table; the last two of ``columns`` name the sides."""
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
    """The number of steps that had to be repeated after each attempt, or a little less, as a heartbeat records the step
    only now and then. None if no later attempt has resumed yet. ``start``: the step after which the run started.
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

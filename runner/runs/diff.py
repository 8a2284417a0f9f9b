"""How the configurations and the results of two runs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from runner.run import drift
from runner.run.directory import RunDirectory
from runner.runs import screen
from runner.runs.overview import Facts, overview


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


def sides(differences: Sequence[drift.Difference], left: str, right: str) -> list[dict[str, Any]]:
    """Differences as plain values, without what is absent."""
    rows = ({"key": each.key, left: each.saved, right: each.now} for each in differences)
    return [{name: value for name, value in row.items() if value is not drift.ABSENT} for row in rows]


def text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    parts = [screen.pairs({"a": found["a"], "b": found["b"]})]
    for what in ("configuration", "result"):
        rows = found[what]
        parts.append(f"{what}\n{table(rows, 'a', 'b')}" if rows else f"The {what}s do not differ.")
    return "\n\n".join(parts)


def table(rows: Sequence[Mapping[str, Any]], *columns: str) -> str:
    """Differences as a table; ``columns`` end with the two sides."""
    shown = [{**row, **{side: _shown(row, side) for side in columns[-2:]}} for row in rows]
    return screen.table(shown, [*columns[:-2], "key", *columns[-2:]])


def _sides(directory: RunDirectory) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Configuration and result of a run, or how far it has come."""
    facts = Facts.of(directory)
    line, result = overview(directory.name, directory, facts), facts.result or {}
    shown = {key: result[key] for key in ("reason", "epochs", "metrics") if key in result}
    return facts.identity, {"status": line.status, "step": line.step, "objective": result.get("objective"), **shown}


def _shown(row: Mapping[str, Any], side: str) -> str:
    return screen.value(row[side]) if side in row else "(absent)"

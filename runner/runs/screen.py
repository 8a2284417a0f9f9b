"""Values as text for a terminal: tables, ages; control characters are escaped, because anyone may have written them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from tabulate import tabulate

from runner.errors import printable

_WIDEST = 64  # characters of a cell
_NAME = 1000  # characters of a name or a fact
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows under the columns' names; what a row does not have stays empty. The name of a run is never cut: other
    commands need it, and the runs of a sweep may differ in nothing but its end.
    """
    cells = [[cell(row.get(each), widest=_NAME if each == "run" else _WIDEST) for each in columns] for row in rows]
    return tabulate(cells, headers=list(map(cell, columns)), disable_numparse=True)


def pairs(facts: Mapping[str, Any]) -> str:
    """A line for each fact that there is."""
    known = [(name, cell(value, widest=_NAME)) for name, value in facts.items() if value is not None]
    return tabulate(known, tablefmt="plain", disable_numparse=True)


def cell(value: Any, *, widest: int = _WIDEST) -> str:
    """A value in a line of at most ``widest`` characters."""
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else printable(value).partition("\n")[0]
    return text if len(text) <= widest else f"{text[: widest - 3]}..."


def value(found: Any) -> str:
    """A value of a configuration, as it is written there."""
    return found if isinstance(found, str) else json.dumps(found, default=str)


def scalars(values: Mapping[str, Any]) -> str:
    """Names with their values in one line."""
    return ", ".join(f"{cell(name)} {cell(value)}" for name, value in values.items())


def age(time: str | None) -> str | None:
    """How long ago a time (ISO 8601 with a zone) was, for people; another machine's clock may be ahead."""
    if time is None:
        return None
    seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(time)).total_seconds()
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "now"

"""The list of runs under a root: selection, order and table."""

import os.path
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from runner.runs import screen
from runner.runs.overview import Overview

# The statuses of runs, the most interesting first.
STATES = (
    "running",
    "unknown",
    "failed",
    "diverged",
    "killed",
    "interrupted",
    "superseded",
    "new",
    "finished",
    "complete",
    "unreadable",
)
_COLUMNS = ("status", "step / max", "objective", "attempts", "age", "host")
SORTS = ("status", "step", "objective", "attempts", "age", "name")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which runs to show: with these statuses, of this experiment, with this text in their name. None: any."""

    states: Sequence[str] | None = None
    experiment: str | None = None
    match: str | None = None

    def takes(self, row: Overview) -> bool:
        """Whether the run is selected. Of an unreadable run only the name is known."""
        return (
            (self.states is None or row.state in self.states)
            and (self.experiment is None or row.experiment == self.experiment)
            and (self.match is None or self.match in row.run)
        )


def ordered(rows: list[Overview], column: str, *, reverse: bool = False) -> list[Overview]:
    """The rows by a column of ``SORTS``, the youngest first by age; those without a value are last either way."""
    keyed = [(_key(row, column), row) for row in rows]
    known = sorted(((key, row) for key, row in keyed if key is not None), key=lambda pair: pair[0], reverse=reverse)
    return [row for _, row in known] + [row for key, row in keyed if key is None]


def text(rows: list[Overview]) -> str:
    """The table."""
    return screen.table(map(_cells, rows), ["run", *_COLUMNS])


def narrow(rows: list[Overview]) -> str:
    """The table for a screen that may cut its lines: short names behind the values, and above it what they lack."""
    shared, names = _short([row.run for row in rows])
    cells = [
        {**_cells(row), "run": name, "status": screen.cell(row.status, widest=22)}
        for row, name in zip(rows, names, strict=True)
    ]
    table = screen.table(cells, [*_COLUMNS[:3], "run", *_COLUMNS[3:]])
    return f"{f'all in {screen.cell(shared)}' if shared else ''}\n{table}"


def _short(names: list[str]) -> tuple[str, list[str]]:
    """What all names have in common, folders and overrides, and each name without it."""
    if len(names) < 2:
        return "", names
    folders, leaves = zip(*(name.rpartition("/")[::2] for name in names), strict=True)
    parts, words = [folder.split("/") for folder in folders], [leaf.split(",") for leaf in leaves]
    top = len([part for part in os.path.commonpath(folders).split("/") if part])
    alike = {*words[0]}.intersection(*words)
    short = [
        "/".join([*part[top:], ",".join(word for word in each if word not in alike) or ",".join(each)])
        for part, each in zip(parts, words, strict=True)
    ]
    return "/".join([*parts[0][:top], ",".join(word for word in words[0] if word in alike)]), short


def _key(row: Overview, column: str) -> Any:
    if column == "status":
        return STATES.index(row.state) if row.state in STATES else len(STATES)
    if column == "age":
        return -datetime.fromisoformat(row.seen).timestamp() if row.seen else None
    return row.run if column == "name" else getattr(row, column)


def _cells(row: Overview) -> dict[str, Any]:
    steps = row.step if row.max_steps is None else f"{row.step} / {row.max_steps}"
    return {**asdict(row), "step / max": steps, "age": screen.age(row.seen)}

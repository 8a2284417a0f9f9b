"""The list of runs under a root: selection, order and table; and how all commands print values on a terminal.

Control characters are escaped where a value is printed, because anyone may have written it.
"""

import json
import os.path
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from tabulate import tabulate

from runner.errors import printable
from runner.run_facts import RunSummary, map_runs

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
SORTS = ("status", "step", "objective", "attempts", "age", "name")
_COLUMNS = ("status", "step / max", "objective", "attempts", "age", "host")
_WIDEST = 64  # characters of a cell
_WIDEST_NAME = 1000  # of the name of a run, or of a fact that has a line for itself
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which runs to show: with these statuses, of this experiment, with this text in their name. None: any."""

    states: Sequence[str] | None = None
    experiment: str | None = None
    match: str | None = None

    def includes(self, run: RunSummary) -> bool:
        """Whether the run is selected. Of an unreadable run only the name is known."""
        return (
            (self.states is None or run.state in self.states)
            and (self.experiment is None or run.experiment == self.experiment)
            and (self.match is None or self.match in run.run)
        )


def list_runs(root: str, selection: Selection) -> list[RunSummary]:
    """The selected runs under a root. Raises ConfigError if there are no runs at all, StorageError for the root."""
    runs = map_runs(root, lambda path, facts: facts.summary(path), lambda summary: summary)
    return [run for run in runs if selection.includes(run)]


def sort_runs(runs: list[RunSummary], column: str, *, reverse: bool = False) -> list[RunSummary]:
    """The runs by a column of ``SORTS``, the youngest first by age; those without a value are last either way."""
    keyed = [(_sort_key(run, column), run) for run in runs]
    valued = sorted(((key, run) for key, run in keyed if key is not None), key=lambda pair: pair[0], reverse=reverse)
    return [run for _, run in valued] + [run for key, run in keyed if key is None]


def _sort_key(run: RunSummary, column: str) -> Any:
    if column == "status":
        return STATES.index(run.state) if run.state in STATES else len(STATES)
    if column == "age":
        return -datetime.fromisoformat(run.seen).timestamp() if run.seen else None
    return run.run if column == "name" else getattr(run, column)


def format_runs(runs: list[RunSummary]) -> str:
    """The table of the list."""
    return format_table(map(_row, runs), ["run", *_COLUMNS])


def format_narrow(runs: list[RunSummary]) -> str:
    """The table for a screen that cuts its lines: shortened names behind the values, and above the table the part that
    all names share.
    """
    shared, names = _shorten([run.run for run in runs])
    rows = [
        {**_row(run), "run": name, "status": format_cell(run.status, widest=22)}
        for run, name in zip(runs, names, strict=True)
    ]
    table = format_table(rows, [*_COLUMNS[:3], "run", *_COLUMNS[3:]])
    return f"{f'all in {format_cell(shared)}' if shared else ''}\n{table}"


def _shorten(names: list[str]) -> tuple[str, list[str]]:
    """The folders and overrides that all names share, and each name without them."""
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


def _row(run: RunSummary) -> dict[str, Any]:
    steps = run.step if run.max_steps is None else f"{run.step} / {run.max_steps}"
    return {**asdict(run), "step / max": steps, "age": _age(run.seen)}


def _age(time: str | None) -> str | None:
    """How long ago a time (ISO 8601 with a zone) was; another machine's clock may be ahead."""
    if time is None:
        return None
    seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(time)).total_seconds()
    return next((f"{seconds // size:.0f} {unit} ago" for unit, size in _UNITS if seconds >= size), "now")


def format_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows under the columns' names; a missing value stays empty. The name of a run is never cut: other commands
    need it, and the runs of a sweep may differ in nothing but its end.
    """
    cells = [
        [format_cell(row.get(column), widest=_WIDEST_NAME if column == "run" else _WIDEST) for column in columns]
        for row in rows
    ]
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

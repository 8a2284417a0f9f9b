"""The list of runs under a root: selection, order and table."""

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
    columns = ["run", "status", "step / max", "objective", "attempts", "age", "host"]
    return screen.table(map(_cells, rows), columns)


def _key(row: Overview, column: str) -> Any:
    if column == "status":
        return STATES.index(row.state) if row.state in STATES else len(STATES)
    if column == "age":
        return -datetime.fromisoformat(row.seen).timestamp() if row.seen else None
    return row.run if column == "name" else getattr(row, column)


def _cells(row: Overview) -> dict[str, Any]:
    steps = row.step if row.max_steps is None else f"{row.step} / {row.max_steps}"
    return {**asdict(row), "step / max": steps, "age": screen.age(row.seen)}

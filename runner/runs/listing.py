"""Values as text for a terminal: tables, ages; control characters are escaped, because anyone may have written them.

One line about a run, and about all runs under a root, from their directories alone.

A directory may be damaged, or written by anyone: a value is used only if it has the expected type.

The list of runs under a root: selection, order and table.
"""

import json
import os.path
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

from tabulate import tabulate

from runner.checkpoint import manifest
from runner.errors import ConfigError, RunnerError, StorageError, printable
from runner.run import attempt_records
from runner.run.attempt_records import AttemptRecord
from runner.run.directory import FOLDERS, RunDirectory
from runner.storage import find_folders

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


T = TypeVar("T")

_MARKER = "run.json"
_READERS = 8
_LARGEST = sys.float_info.max
# Errors that values cause which no run writes.
_UNUSABLE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True)
class Overview:
    """One run in a line. ``run``: its path under the root; ``step``: the last committed one; ``seen``: the last sign of
    life of its process (ISO 8601, UTC). Of an unreadable run only the path is known.
    """

    run: str
    experiment: str
    status: str
    step: int | None
    max_steps: int | None
    objective: float | None
    attempts: int | None
    seen: str | None
    host: str | None

    @property
    def state(self) -> str:
        """The first word of the status, without what explains it."""
        return self.status.partition(" ")[0].rstrip(":")


@dataclass(frozen=True, slots=True)
class Facts:
    """The records of a run directory, each read once."""

    record: Mapping[str, Any]
    identity: Mapping[str, Any]
    result: Mapping[str, Any] | None
    newest: AttemptRecord | None

    @classmethod
    def of(cls, directory: RunDirectory) -> "Facts":
        """Read them. Raises ConfigError for what is no run directory, StorageError for a damaged one."""
        record = directory.record()
        if record is None:
            raise ConfigError(f"{directory.location.url} is not a run directory: it has no {_MARKER}")
        newest = attempt_records.newest(directory.location)
        identity = directory.identity_since(newest) or {}
        return cls(record, identity, directory.result(identity), newest)


@contextmanager
def guarded(url: str) -> Iterator[None]:
    """What looks at a run: values in it that cannot be used are a StorageError, whatever they have caused."""
    try:
        yield
    except _UNUSABLE as error:
        raise StorageError(f"{url} has a value that cannot be used: {error!r:.300}") from error


def find(root: str) -> dict[str, RunDirectory]:
    """All runs under a root, by their path under it. Raises ConfigError if there are none."""
    found = {
        folder: RunDirectory(root, *folder.rpartition("/")[::2], location)
        for folder, location in find_folders(root, _MARKER, own=FOLDERS).items()
        if folder != "."
    }
    if not found:
        raise ConfigError(f"no runs under {root}; give the run.root of the runs you mean")
    return found


def of_each_run(root: str, look: Callable[[str, RunDirectory], T], unreadable: Callable[[Overview], T]) -> list[T]:
    """Call ``look`` for each run under a root, in threads; for a run that cannot be read call ``unreadable`` with an
    overview that says why. Raises ConfigError and StorageError for the root.
    """

    def one(found: tuple[str, RunDirectory]) -> T:
        run, directory = found
        try:
            with guarded(directory.location.url):
                return look(run, directory)
        except RunnerError as error:
            url = printable(directory.location.url)
            status = f"unreadable: {str(error).replace(f'{url}/', '').replace(url, 'it')[:300]}"
            return unreadable(Overview(run, directory.experiment, status, None, None, None, None, None, None))

    with ThreadPoolExecutor(_READERS) as pool:
        return [*pool.map(one, find(root).items())]


def overviews(root: str) -> list[Overview]:
    """All runs under a root in a line each. Raises ConfigError and StorageError for the root."""
    return of_each_run(root, lambda run, directory: overview(run, directory, Facts.of(directory)), lambda line: line)


def overview(run: str, directory: RunDirectory, facts: Facts) -> Overview:
    """One run in a line. Lists its commits only if no result tells the step."""
    newest, result = facts.newest, facts.result or {}
    status = "complete" if facts.result else newest.outcome() if newest else "new"
    step = integer(result.get("step"))
    if step is None:
        commits = manifest.commits(directory.location)
        step = commits[0].step if commits else 0
    return Overview(
        run=run,
        experiment=str(facts.record.get("experiment")),
        status=status,
        step=step,
        max_steps=integer((facts.identity.get("trainer") or {}).get("max_steps")),
        objective=number((result.get("objective") or {}).get("value")),
        attempts=newest.number if newest else 0,
        seen=_time(newest.seen()) if newest else None,
        host=_text(newest.claim.get("host")) if newest else None,
    )


def number(value: Any) -> float | None:
    """``value`` if it is a finite number that a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -_LARGEST <= value <= _LARGEST else None


def integer(value: Any) -> int | None:
    """``value`` if it is a whole number that a step may be."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _time(value: Any) -> str | None:
    """``value`` if it is a time with a zone."""
    try:
        return value if datetime.fromisoformat(value).tzinfo else None
    except (TypeError, ValueError):
        return None


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
    return table(map(_cells, rows), ["run", *_COLUMNS])


def narrow(rows: list[Overview]) -> str:
    """The table for a screen that may cut its lines: short names behind the values, and above it what they lack."""
    shared, names = _short([row.run for row in rows])
    cells = [
        {**_cells(row), "run": name, "status": cell(row.status, widest=22)}
        for row, name in zip(rows, names, strict=True)
    ]
    text = table(cells, [*_COLUMNS[:3], "run", *_COLUMNS[3:]])
    return f"{f'all in {cell(shared)}' if shared else ''}\n{text}"


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
    return {**asdict(row), "step / max": steps, "age": age(row.seen)}

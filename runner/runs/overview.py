"""One line about a run, and about all runs under a root, from their directories alone.

A directory may be damaged, or written by anyone: a value is used only if it has the expected type.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from runner.checkpoint import manifest
from runner.errors import ConfigError, RunnerError, StorageError, printable
from runner.run import records
from runner.run.directory import FOLDERS, RunDirectory
from runner.run.records import Record
from runner.storage import find_folders

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
    newest: Record | None

    @classmethod
    def of(cls, directory: RunDirectory) -> "Facts":
        """Read them. Raises ConfigError for what is no run directory, StorageError for a damaged one."""
        record = directory.record()
        if record is None:
            raise ConfigError(f"{directory.location.url} is not a run directory: it has no {_MARKER}")
        newest = records.last(directory.location)
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

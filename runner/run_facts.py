"""The facts of a run that its directory records. Everything that looks at runs reads them here, each at most once.

A directory may be damaged, or written by anyone: a value is used only if it has the expected type. Does not import
torch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

from runner.checkpoint import manifest
from runner.checkpoint.manifest import CommitId
from runner.errors import ConfigError, RunnerError, StorageError, printable
from runner.run import attempts
from runner.run.attempts import AttemptRecord
from runner.run.directory import FOLDERS, RunDirectory
from runner.run.parent import ParentRecord
from runner.storage import find_folders

T = TypeVar("T")

_MARKER = "run.json"
_READERS = 8  # threads; a remote root answers many requests at a time
_LARGEST = sys.float_info.max
# What values cause that no run writes.
_UNUSABLE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, MemoryError, RecursionError)


class RunFacts:
    """The recorded facts of one run. Each is read when it is first used, and then kept; lists are newest first, but
    ``attempts`` oldest first. ``result`` is None while the run is not finished, ``committed`` and ``start`` are 0
    without a checkpoint and a fork.

    Reading raises ConfigError where there is no run, StorageError for damaged records.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._location = directory.location

    @cached_property
    def record(self) -> Mapping[str, Any]:
        record = self.directory.record()
        if record is None:
            raise ConfigError(f"{self._location.url} is not a run directory: it has no {_MARKER}")
        return record

    @cached_property
    def newest(self) -> AttemptRecord | None:
        return attempts.newest(self._location)

    @cached_property
    def attempts(self) -> list[AttemptRecord]:
        return attempts.history(self._location)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.directory.identity_since(self.newest) or {}

    @cached_property
    def result(self) -> dict[str, Any] | None:
        return self.directory.result(self.identity)

    @cached_property
    def commits(self) -> list[CommitId]:
        return manifest.commits(self._location)

    @cached_property
    def start(self) -> int:
        origin = ParentRecord.of(self.directory)
        return origin.start if origin else 0

    @property
    def committed(self) -> int:
        return self.commits[0].step if self.commits else 0

    @property
    def step(self) -> int:
        """The step of the result or, while there is none, of the newest checkpoint."""
        step = integer((self.result or {}).get("step"))
        return self.committed if step is None else step

    def summary(self, run: str | None = None) -> "RunSummary":
        """The run in one line, under its name or its path ``run`` below a root."""
        newest = self.newest
        record, result = self.record, self.result or {}
        return RunSummary(
            run=self.directory.name if run is None else run,
            experiment=str(record.get("experiment")),
            status="complete" if self.result else newest.outcome() if newest else "new",
            step=self.step,
            max_steps=integer((self.identity.get("trainer") or {}).get("max_steps")),
            objective=number((result.get("objective") or {}).get("value")),
            attempts=newest.number if newest else 0,
            last_seen=_time(newest.last_sign()) if newest else None,
            host=host if newest and isinstance(host := newest.claim.get("host"), str) else None,
        )


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run in a line. ``run``: its name or its path below the root; ``step``: the last committed one; ``last_seen``:
    when its process last gave a sign of life (ISO 8601, UTC). An unreadable run has only ``run`` and ``experiment``.
    """

    run: str
    experiment: str
    status: str
    step: int | None = None
    max_steps: int | None = None
    objective: float | None = None
    attempts: int | None = None
    last_seen: str | None = None
    host: str | None = None

    @property
    def state(self) -> str:
        """The first word of the status, without the explanation after it."""
        return self.status.partition(" ")[0].rstrip(":")


@contextmanager
def refuse_unusable(url: str) -> Iterator[None]:
    """Within the block records are used: whatever error an unusable value in them causes becomes a StorageError."""
    try:
        yield
    except _UNUSABLE as error:
        raise StorageError(f"{url} has a value that cannot be used: {error!r:.300}") from error


def map_runs(
    root: str,
    read: Callable[[str, RunFacts], T],
    unreadable: Callable[[RunSummary], T],
    options: Mapping[str, Any] | None = None,
) -> list[T]:
    """Call ``read`` with the path below the root and the facts of each run under it, in threads; for a run that cannot
    be read call ``unreadable`` with a summary that says why. ``options`` are those of fsspec for the root.

    Raises ConfigError if there are no runs, and StorageError for the root.
    """
    folders = {folder: at for folder, at in find_folders(root, _MARKER, options, own=FOLDERS).items() if folder != "."}
    if not folders:
        raise ConfigError(f"no runs under {root}; give the run.root of the runs you mean")

    def call(folder: str) -> T:
        experiment, _, variant = folder.rpartition("/")
        location = folders[folder]
        try:
            with refuse_unusable(location.url):
                return read(folder, RunFacts(RunDirectory(root, experiment, variant, location, options)))
        except RunnerError as error:
            url = printable(location.url)
            reason = str(error).replace(f"{url}/", "").replace(url, "it")[:300]
            return unreadable(RunSummary(folder, experiment, f"unreadable: {reason}"))

    with ThreadPoolExecutor(_READERS) as pool:
        return [*pool.map(call, folders)]


def number(value: Any) -> float | None:
    """``value`` if it is a finite number that a float can be."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
    return value if usable else None


def integer(value: Any) -> int | None:
    """``value`` if it is a whole number that a step may be."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None


def _time(value: Any) -> str | None:
    """``value`` if it is a time with a zone."""
    try:
        return value if datetime.fromisoformat(value).tzinfo else None
    except (TypeError, ValueError):
        return None

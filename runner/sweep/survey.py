"""The status of the runs of a sweep, found out before anything is started. Does not import torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from runner.checkpoint.manifest import commits
from runner.errors import ConfigError, DriftRefused, RunnerError, printable
from runner.job import Job
from runner.run import records
from runner.run.records import Record

DONE, DIVERGED, FAILED, RUNNING, CUT, NEW = "done", "diverged", "failed", "in use", "to resume", "new"
_SHOWN = 20  # runs of one status


@dataclass(frozen=True, slots=True)
class Found:
    """One run: its status, its last committed step and its objective.

    ``attempts`` is the number of the newest attempt, if the run is not done; ``failures`` is how many of the last
    attempts failed in a row; ``final``: do not try again.
    """

    run: str
    status: str
    step: int = 0
    objective: float | None = None
    attempts: int = 0
    failures: int = 0
    reason: str = ""
    final: bool = False
    exit_status: int = 1
    error: BaseException | None = None

    @property
    def why(self) -> str:
        """The reason with all lines of a message that is meant for the user: the remedy may be in the last."""
        return printable(self.error) if isinstance(self.error, RunnerError) else self.reason


def look(job: Job) -> Found:
    """The status of one run. For a finished run this takes a single read."""
    name = job.directory.name
    try:
        result = job.directory.result(job.identity) or job.open().result
        if result is not None:
            goal = result.get("objective") or {}
            return Found(name, DONE, result.get("step", 0), goal.get("value"))
        return _unfinished(job)
    except RunnerError as error:
        return refused(name, error)


def refused(run: str, error: RunnerError) -> Found:
    """The status of a run that cannot start, because of ``error``."""
    final = isinstance(error, ConfigError | DriftRefused)
    return Found(run, FAILED, reason=_line(error), final=final, exit_status=error.status, error=error)


def failed(found: Found, error: BaseException) -> Found:
    """The status of a run that has just failed, and that was ``found`` before."""
    status = error.status if isinstance(error, RunnerError) else 1
    reason = _line(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {_line(error)}"
    return Found(
        found.run,
        FAILED,
        found.step,
        attempts=found.attempts,
        failures=found.failures + 1,
        reason=reason,
        final=isinstance(error, ConfigError | DriftRefused),
        exit_status=status,
        error=error,
    )


def table(found: Sequence[Found]) -> str:
    """Counts by status, and the runs themselves: the first of each status where there are many."""
    counts = Counter(one.status for one in found)
    order = [NEW, CUT, FAILED, RUNNING, DIVERGED, DONE]
    lines = [", ".join(f"{counts[status]} {status}" for status in reversed(order) if counts[status])]
    rows = []
    for status in order:
        alike = [one for one in found if one.status == status]
        rows += [_row(one) for one in alike[:_SHOWN]]
        if len(alike) > _SHOWN:
            rows.append([f"... and {len(alike) - _SHOWN} more", status, "", "", ""])
    columns = ["run", "status", "step", "objective", "reason"]
    return "\n".join([*lines, "", tabulate(rows, headers=columns, disable_numparse=True)])


def _row(one: Found) -> list[str]:
    status = f"{one.status} (retry {one.failures})" if one.status == FAILED and not one.final else one.status
    objective = "" if one.objective is None else f"{one.objective:.6g}"
    return [printable(one.run), status, str(one.step or ""), objective, printable(one.reason)[:80]]


def _unfinished(job: Job) -> Found:
    location, name = job.directory.location, job.directory.name
    history = records.history(location)
    if not history:
        return Found(name, NEW)
    last = history[-1]
    committed = commits(location)
    step = committed[0].step if committed else 0
    if last.watched():
        return Found(name, RUNNING, step, attempts=last.number, reason=last.owner())
    if _outcome(last) == "diverged":
        return Found(name, DIVERGED, step, attempts=last.number, reason=_reason(last))
    failures = 0
    while failures < len(history) and _outcome(history[-1 - failures]) == "failed":
        failures += 1
    status = FAILED if failures else CUT
    return Found(name, status, step, attempts=last.number, failures=failures, reason=_reason(last))


def _outcome(record: Record) -> Any:
    return (record.end or {}).get("outcome")


def _reason(record: Record) -> str:
    return _line((record.end or {}).get("reason") or "")


def _line(text: Any) -> str:
    return printable(str(text).partition("\n")[0])

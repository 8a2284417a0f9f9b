"""The status of the runs of a sweep, found out before anything is started. Does not import torch."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate

from runner import signals
from runner.checkpoint.manifest import CommitId, commits
from runner.errors import ConfigError, DriftRefused, RunnerError, printable
from runner.run import attempt_records
from runner.run.attempt_records import AttemptRecord
from runner.run_spec import RunSpec

DONE, DIVERGED, FAILED, RUNNING, CUT, NEW = "done", "diverged", "failed", "in use", "to resume", "new"
_SHOWN = 20  # runs of one status
_READERS = 8

Overrides = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """One run: its status, its last committed step and its objective.

    ``attempts`` is the number of the newest attempt, if the run is not done; ``failures`` is how many of the last
    attempts in a row failed, or were killed without a new checkpoint; ``final``: do not try again; ``unclear``: the
    attempt of another machine that is not known to be dead.
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
    unclear: AttemptRecord | None = field(default=None, repr=False)

    @property
    def why(self) -> str:
        """The reason with all lines of a message that is meant for the user: the remedy may be in the last."""
        return printable(self.error) if isinstance(self.error, RunnerError) else self.reason


def survey(jobs: Mapping[Overrides, RunSpec | RunnerError]) -> dict[Overrides, Found]:
    """The status of the run of each job; an error in place of a job is one that has failed."""
    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip(jobs, pool.map(_look, jobs.items()), strict=True))
        unclear = {each: one.unclear for each, one in found.items() if one.unclear}
        for each in _beating(unclear, pool):
            found[each] = replace(found[each], status=RUNNING, failures=0, reason=unclear[each].owner())
    return found


def _look(item: tuple[Overrides, RunSpec | RunnerError]) -> Found:
    """The status of one run, if ``unclear`` is dead. For a finished run this takes a read and a listing."""
    overrides, job = item
    if isinstance(job, RunnerError):
        return _refused(" ".join(overrides), job)
    name = job.directory.name
    try:
        result = job.directory.finished(job.identity) or job.open().result
        if result is not None:
            goal = result.get("objective") or {}
            return Found(name, DONE, result.get("step", 0), goal.get("value"))
        return _unfinished(job)
    except RunnerError as error:
        return _refused(name, error)


def _refused(run: str, error: RunnerError) -> Found:
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


def _unfinished(job: RunSpec) -> Found:
    location, name = job.directory.location, job.directory.name
    history = attempt_records.history(location)
    if not history:
        return Found(name, NEW)
    last = history[-1]
    committed = commits(location)
    step = committed[0].step if committed else 0
    alive = last.alive()
    if alive:
        return Found(name, RUNNING, step, attempts=last.number, reason=last.owner())
    if _outcome(last) == "diverged":
        return Found(name, DIVERGED, step, attempts=last.number, reason=_reason(last))
    failures, reason = _failures(history, committed), _reason(last)
    if last.end is None and failures:
        reason = f"killed before a new checkpoint{f', {failures} times in a row' if failures > 1 else ''}"
    status = FAILED if _outcome(last) == "failed" else CUT
    unclear = last if alive is None else None
    return Found(name, status, step, attempts=last.number, failures=failures, reason=reason, unclear=unclear)


def _failures(history: Sequence[AttemptRecord], committed: Sequence[CommitId]) -> int:
    """How many of the last attempts in a row failed, or were killed without a new checkpoint; not counting those that
    a cluster ended to queue their job again.
    """
    saved = {commit.attempt for commit in committed}
    failures, later = 0, attempt_records.cluster_job()
    for record in reversed(history):
        job = record.claim.get("cluster")
        killed = record.end is None and not record.beat.get("committed") and record.number not in saved
        if not killed and _outcome(record) != "failed":
            break
        failures += not (killed and attempt_records.requeued(job, later))
        later = job
    return failures


def _beating(unclear: Mapping[Overrides, AttemptRecord], pool: Executor) -> set[Overrides]:
    """Those whose heartbeat changes. All are watched at the same time: a thousand dead runs take as long as one, and a
    look at each.
    """
    silent, living = dict(unclear), set()
    patience = max((record.patience for record in silent.values()), default=0.0)
    began = time.monotonic()
    while silent:
        last = time.monotonic() - began > patience
        looks = [*pool.map(lambda record: attempt_records.read(record.location, record.name), silent.values())]
        for (each, before), now in zip([*silent.items()], looks, strict=True):
            alive = now.alive() if now else False  # a claim may be withdrawn
            if alive or (alive is None and now and now.beat != before.beat):
                living.add(each)
            if alive is False or each in living:
                del silent[each]
        if last:
            break
        signals.raise_if_received("while watching whether other machines work on runs of the sweep")
        time.sleep(patience / 12)
    return living


def _outcome(record: AttemptRecord) -> Any:
    return (record.end or {}).get("outcome")


def _reason(record: AttemptRecord) -> str:
    return _line((record.end or {}).get("reason") or "")


def _line(text: Any) -> str:
    return printable(str(text).partition("\n")[0])

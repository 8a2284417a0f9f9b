"""The status of the runs of a sweep, read from the storage before anything is started. Does not import torch."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate

from runner.checkpoint.manifest import CommitId
from runner.errors import ConfigError, DriftRefused, RunnerError, printable
from runner.run.attempts import AttemptRecord, cluster_job, requeued
from runner.run_facts import RunFacts
from runner.run_spec import RunSpec

DONE, DIVERGED, FAILED, RUNNING, CUT, NEW = "done", "diverged", "failed", "in use", "to resume", "new"
_ROWS = 20  # of one status in a table
_READERS = 8  # threads

Overrides = tuple[str, ...]  # of one job, which they identify
Specs = Mapping[Overrides, RunSpec | RunnerError]  # an error where the overrides cannot be used


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run: its status, its last committed step and its objective.

    ``attempts``: the number of the newest attempt, if the run is not done. ``failures``: how many of the last attempts
    in a row failed, or were killed without a new checkpoint. ``final``: do not try again. ``unclear``: the attempt of
    another machine of which only its heartbeat can tell whether it lives.
    """

    run: str
    status: str
    step: int = 0
    objective: float | None = None
    attempts: int = 0
    failures: int = 0
    reason: str = ""
    final: bool = False
    error: BaseException | None = None
    unclear: AttemptRecord | None = field(default=None, repr=False)

    @property
    def exit_status(self) -> int:
        """The exit status of a run that failed."""
        return self.error.status if isinstance(self.error, RunnerError) else 1

    @property
    def message(self) -> str:
        """The reason with all lines of a message that is meant for the user: the remedy may be in the last."""
        return printable(self.error) if isinstance(self.error, RunnerError) else self.reason

    def failed(self, error: BaseException, *, failures: int) -> "RunStatus":
        """The status after a failure with ``error``, the last of ``failures`` in a row."""
        name = "" if isinstance(error, RunnerError) else f"{type(error).__name__}: "
        final = isinstance(error, ConfigError | DriftRefused)
        return RunStatus(
            self.run, FAILED, self.step, None, self.attempts, failures, name + _first_line(error), final, error
        )


def survey(specs: Specs) -> dict[Overrides, RunStatus]:
    """The status of the run of each job; an error in place of a specification is a job that has failed.

    Heartbeats of other machines are watched last, and all from the same moment: a thousand dead runs take as long as
    one, and a look at each. Raises Interrupted after a stop signal.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        statuses = dict(zip(specs, pool.map(_status, specs.items()), strict=True))
        since = time.monotonic()
        unclear = {job: status.unclear for job, status in statuses.items() if status.unclear}
        alive = pool.map(lambda record: record.watched(since), unclear.values())
        for job in (job for job, lives in zip(unclear, alive, strict=True) if lives):
            statuses[job] = replace(statuses[job], status=RUNNING, failures=0, reason=unclear[job].owner())
    return statuses


def format_statuses(statuses: Sequence[RunStatus]) -> str:
    """Counts by status, and the runs themselves: the first of each status where there are many."""
    counts = Counter(run.status for run in statuses)
    order = [NEW, CUT, FAILED, RUNNING, DIVERGED, DONE]
    rows = []
    for status in order:
        alike = [run for run in statuses if run.status == status]
        rows += [_row(run) for run in alike[:_ROWS]]
        if len(alike) > _ROWS:
            rows.append([f"... and {len(alike) - _ROWS} more", status, "", "", ""])
    table = tabulate(rows, headers=["run", "status", "step", "objective", "reason"], disable_numparse=True)
    return f"{', '.join(f'{counts[status]} {status}' for status in reversed(order) if counts[status])}\n\n{table}"


def _row(run: RunStatus) -> list[str]:
    status = f"{run.status} (retry {run.failures})" if run.status == FAILED and not run.final else run.status
    objective = "" if run.objective is None else f"{run.objective:.6g}"
    return [printable(run.run), status, str(run.step or ""), objective, printable(run.reason)[:80]]


def _status(job: tuple[Overrides, RunSpec | RunnerError]) -> RunStatus:
    """The status of one run, if an ``unclear`` attempt is dead. For a finished run this takes a read and a listing."""
    overrides, spec = job
    if isinstance(spec, RunnerError):
        return RunStatus(" ".join(overrides), NEW).failed(spec, failures=0)
    name = spec.directory.name
    try:
        result = spec.directory.finished(spec.identity) or spec.open().result
        if result is not None:
            objective = result.get("objective") or {}
            return RunStatus(name, DONE, result.get("step", 0), objective.get("value"))
        return _unfinished(name, RunFacts(spec.directory))
    except RunnerError as error:
        return RunStatus(name, NEW).failed(error, failures=0)


def _unfinished(name: str, facts: RunFacts) -> RunStatus:
    if not facts.attempts:
        return RunStatus(name, NEW)
    last = facts.attempts[-1]
    alive, outcome, reason = last.alive(), last.ending("outcome"), _first_line(last.ending("reason") or "")
    status = RunStatus(name, CUT, facts.committed, attempts=last.number, reason=reason)
    if alive:
        return replace(status, status=RUNNING, reason=last.owner())
    if outcome == "diverged":
        return replace(status, status=DIVERGED)
    failures = _failures(facts.attempts, facts.commits)
    if last.end is None and failures:
        reason = f"killed before a new checkpoint{f', {failures} times in a row' if failures > 1 else ''}"
    return replace(
        status,
        status=FAILED if outcome == "failed" else CUT,
        failures=failures,
        reason=reason,
        unclear=last if alive is None else None,
    )


def _failures(attempts: Sequence[AttemptRecord], commits: Sequence[CommitId]) -> int:
    """How many of the last attempts in a row failed, or were killed without a new checkpoint; not counting those that
    a cluster ended to queue their job again.
    """
    saved = {commit.attempt for commit in commits}
    failures, later = 0, cluster_job()
    for record in reversed(attempts):
        job = record.claim.get("cluster")
        killed = record.end is None and not record.beat.get("committed") and record.number not in saved
        if not killed and record.ending("outcome") != "failed":
            break
        failures += not (killed and requeued(job, later))
        later = job
    return failures


def _first_line(text: Any) -> str:
    return printable(str(text).partition("\n")[0])

"""A launcher around the configured launcher, which gets only the jobs that are not done.

Hydra creates launchers in one function, which is replaced here. Before anything starts, the status of all runs is read
from the storage, without importing torch. A finished run gives its stored objective; a run that another process works
on is waited for; a run that fails is tried again, and never ends the sweep.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from runner import signals
from runner.app import absolute_root, storage_options
from runner.checkpoint.manifest import CommitId
from runner.config.identity import compare
from runner.config.schema import OnConflict, refuse_secrets
from runner.distributed.world import world
from runner.errors import ConfigError, DriftRefused, Interrupted, JobDied, RunInUse, RunnerError, printable
from runner.run.attempts import AttemptRecord, cluster_job, requeued
from runner.run.opening import RunSpec, open_run
from runner.run_facts import RunFacts
from runner.signals import SWEEP_VARIABLE, StopRequest
from runner.storage import open_location
from runner.sweep.jobs import BASIC_LAUNCHER, Overrides, SignalLoader, SpecLoader, isolate

log = logging.getLogger("runner")

DONE, DIVERGED, FAILED, RUNNING, RESUMABLE, NEW = "done", "diverged", "failed", "in use", "to resume", "new"
Specs = Mapping[Overrides, RunSpec | RunnerError]  # an error where the overrides cannot be used

_instantiate = Plugins.instantiate_launcher
_POLL_SECONDS = 2.0
_WORST_LAST = (0, 75, 4, 3, 2, 5, 1)  # exit statuses
_ROWS = 20  # runs of each status in a table
_READERS = 8  # threads


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run: its status, its last committed step and its objective."""

    run: str
    status: str
    step: int = 0
    objective: float | None = None
    attempts: int = 0  # the number of the newest attempt, if the run is not done
    failures: int = 0  # the number of last attempts in a row that failed, or were killed without a new checkpoint
    reason: str = ""
    final: bool = False  # do not try again
    error: BaseException | None = None
    unclear: AttemptRecord | None = field(default=None, repr=False)  # on another machine; alive if its heartbeat moves

    @property
    def message(self) -> str:
        """The reason, with all lines of an error of the runner: the remedy may be in the last line."""
        return printable(self.error) if isinstance(self.error, RunnerError) else self.reason

    def failed(self, error: BaseException, *, failures: int) -> "RunStatus":
        """The status after a failure with ``error``, the last of ``failures`` in a row."""
        name = "" if isinstance(error, RunnerError) else f"{type(error).__name__}: "
        final = isinstance(error, ConfigError | DriftRefused)
        reason = name + _first_line(error)
        return replace(self, status=FAILED, objective=None, failures=failures, reason=reason, final=final, error=error)


@dataclass(slots=True)
class SweepReport:
    """How the jobs of a command ended, over all calls of the launcher."""

    statuses: dict[Overrides, RunStatus] = field(default_factory=dict)
    launched: int = 0

    @property
    def exit_status(self) -> int:
        errors = [run.error for run in self.statuses.values() if run.status == FAILED]
        statuses = [error.status if isinstance(error, RunnerError) else 1 for error in errors]
        return max(statuses, key=_WORST_LAST.index, default=0)

    def summary(self) -> str | None:
        """The final table; None if nothing was launched, because then the first table says it all."""
        return format_statuses([*self.statuses.values()]) if self.launched and self.statuses else None


def install() -> SweepReport:
    """Put this launcher around every launcher that Hydra creates from now on."""
    report = SweepReport()

    def instantiate(plugins: Any, hydra_context: HydraContext, task_function: TaskFunction, config: Any) -> Launcher:
        if (processes := world().size) > 1:
            remedy = "Start it in one, with hydra/launcher=slurm_many for jobs of many, or each run by itself"
            raise ConfigError(f"a sweep (-m) was started in {processes} processes, each would run all jobs. {remedy}")
        if config.run.dry:
            raise ConfigError("run.dry=true tries a single run: leave -m out, and give each key one value")
        refuse_secrets(config)  # a sweeper would write them into names and studies
        loader: Any = SignalLoader(hydra_context.config_loader)
        inner_context = HydraContext(config_loader=loader, callbacks=hydra_context.callbacks)
        inner = _instantiate(plugins, inner_context, isolate(task_function, config), config)
        specs = SpecLoader(hydra_context.config_loader, config)
        hydra_context.config_loader = specs  # type: ignore[assignment]  # for the sweeper
        return SweepLauncher(inner, specs, config, report)

    Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign,assignment]
    return report


class SweepLauncher(Launcher):
    """Launches the jobs that are not done, with ``inner``, until all are done or have failed for good."""

    def __init__(self, inner: Launcher, specs: SpecLoader, config: DictConfig, report: SweepReport) -> None:
        self._inner = inner
        # Launched one by one in this process, so that failures are reported at once and signals stop the sweep.
        self._serial = config.hydra.launcher._target_ == BASIC_LAUNCHER
        self._specs = specs
        self._first: dict[str, tuple[Overrides, RunSpec]] = {}  # URL of the run -> its first job in all calls
        self._sweep = config.sweep
        self._steal = config.run.on_conflict is OnConflict.steal
        root = open_location(absolute_root(config), storage_options(config))
        self._stop = None if self._serial else StopRequest(root)
        self._launcher_failed = False
        self._report = report

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Does nothing: the inner launcher was set up when it was made."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One return value per job, in order; NaN for a job without an objective, because a sweeper must not end for
        one job. Raises Interrupted after a stop signal.
        """
        if not job_overrides:
            raise ConfigError("the sweep has no jobs: one of its glob() or choice() matches nothing")
        setup_globals()
        jobs = [tuple(words) for words in job_overrides]
        composed = {job: self._specs.spec(job) for job in dict.fromkeys(jobs)}
        first_of = self._deduplicate(jobs, composed)
        specs = {job: composed[job] for job in first_of.values()}
        statuses = self._survey(specs)
        print(f"{format_statuses([*statuses.values()])}\n", flush=True)
        for run in {type(run.error): run for run in statuses.values() if run.error}.values():  # not a hundred alike
            log.error("failed   %s: %s", run.run, run.message)
        while True:
            startable = [job for job in specs if self._startable(statuses[job])]
            startable.sort(key=lambda job: statuses[job].failures)  # a job that may end this process comes last
            running = [job for job in specs if statuses[job].status == RUNNING]
            signals.raise_if_received(_progress(statuses))
            if startable:
                statuses |= self._launch(startable, specs, statuses, initial_job_idx)
            elif running:
                with self._stop.forward_signals() if self._stop else nullcontext():  # we may have started some of them
                    time.sleep(_POLL_SECONDS)
            else:
                break
            statuses |= self._survey({job: specs[job] for job in running})  # other processes may have finished them
        self._report.statuses |= statuses
        return [_job_return(job, statuses[first_of[job]]) for job in jobs]

    def _deduplicate(self, jobs: Sequence[Overrides], specs: Specs) -> dict[Overrides, Overrides]:
        """For each job the first job of the same run. Both must compute the same, since they get one result."""
        first: dict[str, Overrides] = {}  # in this call, which has no results of earlier calls
        representatives = {job: job for job in jobs}
        for job in jobs:
            spec = specs[job]
            if isinstance(spec, RunnerError):
                continue
            url = spec.directory.location.url
            other, other_spec = self._first.setdefault(url, (job, spec))
            differing = [change.key for change in compare(other_spec.identity, spec.identity)]
            differing += ["run.parent"] * (other_spec.parent != spec.parent)
            if differing:
                raise ConfigError(
                    f"two jobs of the sweep name one run, {spec.directory.name}, and differ in {', '.join(differing)}:"
                    f"\n  {' '.join(other)}\n  {' '.join(job)}\nNothing was started. Leave run.name out, so that the "
                    f"name is made from the overrides, or put into it what differs: 'run.name=NAME-${{{differing[0]}}}'"
                )
            if url in first:
                alike = "\n".join(f"  {' '.join(words)}" for words in (first[url], job))
                log.warning("hint     two jobs are one run, %s, which is done once:\n%s", spec.directory.name, alike)
            representatives[job] = first.setdefault(url, job)
        return representatives

    def _survey(self, specs: Specs) -> dict[Overrides, RunStatus]:
        return {job: self._settle(status) for job, status in survey(specs).items()}

    def _startable(self, run: RunStatus) -> bool:
        if run.status == FAILED:
            return not run.final
        return run.status in (NEW, RESUMABLE) or (run.status == RUNNING and self._steal)

    def _settle(self, run: RunStatus) -> RunStatus:
        """``run``, marked as ``final`` if it has failed, or was killed without a new checkpoint, too often."""
        often = run.failures > self._sweep.max_retries
        if run.status == RESUMABLE and often:
            error = JobDied(f"{run.reason}. Run it alone to see why, or try it again with a higher sweep.max_retries")
            return replace(run, status=FAILED, final=True, error=error)
        if run.status == FAILED and (often or not self._sweep.retry_failed):
            return replace(run, final=True)
        return run

    def _launch(
        self, startable: list[Overrides], specs: Specs, before: dict[Overrides, RunStatus], index: int
    ) -> dict[Overrides, RunStatus]:
        after: dict[Overrides, RunStatus] = {}
        for batch in [[job] for job in startable] if self._serial else [startable]:
            signals.raise_if_received(_progress(before | after))
            self._report.launched += len(batch)
            errors = self._run(batch, index + len(after))
            statuses = survey({job: specs[job] for job in batch})
            started = {job for job in batch if _has_started(before[job], statuses[job])}
            for job in batch:
                queued = bool(started) and job not in started
                run = after[job] = self._settle(_conclude(before[job], statuses[job], errors[job], queued=queued))
                if run.status == FAILED:
                    log.error("failed   %s: %s", run.run, run.message)
                elif isinstance(errors[job], JobDied):
                    log.warning("killed   %s, at step %d or later: %s", run.run, run.step, errors[job])
        return after

    def _run(self, batch: list[Overrides], index: int) -> dict[Overrides, BaseException | None]:
        try:
            if self._stop is None:
                returns = self._inner.launch(batch, index)
            else:  # in other processes: stop signals are passed on to them
                mark = f"+hydra.job.env_set.{SWEEP_VARIABLE}={self._stop.name}"
                with self._stop.forward_signals():
                    returns = self._inner.launch([[*job, mark] for job in batch], index)
                if signals.received() and not self._launcher_failed:  # else jobs may still have to obey it
                    self._stop.withdraw()
        except Exception as error:  # a worker died, or the cluster refused: the storage shows how far each job got
            self._launcher_failed = True
            log.error("the launcher ended early: %s: %s", type(error).__name__, error)
            return dict.fromkeys(batch, LauncherError(f"{type(error).__name__}: {error}"))
        # Without frames, which would keep all objects of the job alive.
        errors = (each._return_value if each.status is JobStatus.FAILED else None for each in returns)
        return {job: error and error.with_traceback(None) for job, error in zip(batch, errors, strict=True)}


class LauncherError(Exception):
    """The launcher itself failed, so that it is not known how its jobs ended."""


def _progress(statuses: dict[Overrides, RunStatus]) -> str:
    done = sum(run.status in (DONE, DIVERGED) for run in statuses.values())
    return f"in a sweep: {done} of {len(statuses)} runs are done, what was running is committed"


def _has_started(before: RunStatus, after: RunStatus) -> bool:
    """Whether a process has started or finished the run since ``before``."""
    return after.status == DONE or after.attempts > before.attempts


def _conclude(before: RunStatus, after: RunStatus, error: BaseException | None, *, queued: bool) -> RunStatus:
    """The status of a run whose job ended with ``error``, if the storage shows it as ``after``. An error of the
    launcher says nothing about a single job: it has failed only if it started and made no progress, and then for a
    reason of its own. If others of its batch started and it did not, it may still be ``queued`` in the cluster; it is
    launched again, and whichever job starts first does the work.
    """
    if after.status in (DONE, DIVERGED) or isinstance(error, RunInUse | Interrupted):
        return after
    if error is None:
        error = LauncherError("the job ended and has no result")
    if isinstance(error, LauncherError) and (queued or after.status == RUNNING):
        return after
    unreported = isinstance(error, LauncherError | JobDied)
    if unreported and after.step > before.step and after.status != FAILED:
        return after
    failures = max(before.failures + 1, after.failures)
    if unreported and _has_started(before, after) and (after.status == FAILED or not isinstance(error, JobDied)):
        return replace(after, failures=failures)
    return after.failed(error, failures=failures)


def _job_return(overrides: Overrides, run: RunStatus) -> JobReturn:
    if run.status == FAILED:
        error = run.error or RunnerError(run.reason)  # a failure of an earlier command is stored as its reason alone
        return _Failed(overrides=overrides, status=JobStatus.FAILED, _return_value=error)
    value = run.objective if run.status == DONE else math.nan
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)


class _Failed(JobReturn):
    """A failed job that does not raise when its value is read, because that would end the sweep."""

    return_value = math.nan


def survey(specs: Specs) -> dict[Overrides, RunStatus]:
    """The status of the run of each job. Heartbeats of other machines are watched last and all at the same time: a
    thousand dead runs take little longer than a single dead run. Raises Interrupted after a stop signal.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        statuses = dict(zip(specs, pool.map(_status, specs.items()), strict=True))
        since = time.monotonic()
        unclear = {job: status.unclear for job, status in statuses.items() if status.unclear}
        alive = pool.map(lambda record: record.is_alive_by_heartbeat(since), unclear.values())
        for job in (job for job, lives in zip(unclear, alive, strict=True) if lives):
            statuses[job] = replace(statuses[job], status=RUNNING, failures=0, reason=unclear[job].owner())
    return statuses


def format_statuses(statuses: Sequence[RunStatus]) -> str:
    """Counts by status, and the runs themselves: the first of each status where there are many."""
    counts = Counter(run.status for run in statuses)
    order = [NEW, RESUMABLE, FAILED, RUNNING, DIVERGED, DONE]
    rows = []
    for status in order:
        alike = [run for run in statuses if run.status == status]
        for run in alike[:_ROWS]:
            words = f"{status} (retry {run.failures})" if status == FAILED and not run.final else status
            objective = "" if run.objective is None else f"{run.objective:.6g}"
            rows.append([printable(run.run), words, str(run.step or ""), objective, printable(run.reason)[:80]])
        if len(alike) > _ROWS:
            rows.append([f"... and {len(alike) - _ROWS} more", status, "", "", ""])
    from tabulate import tabulate  # takes 40 ms, which a start without a table saves

    table = tabulate(rows, headers=["run", "status", "step", "objective", "reason"], disable_numparse=True)
    return f"{', '.join(f'{counts[status]} {status}' for status in reversed(order) if counts[status])}\n\n{table}"


def _status(job: tuple[Overrides, RunSpec | RunnerError]) -> RunStatus:
    """The status of one run, if an ``unclear`` attempt is dead. A finished run takes one read and one listing."""
    overrides, spec = job
    if isinstance(spec, RunnerError):
        return RunStatus(" ".join(overrides), NEW).failed(spec, failures=0)
    name = spec.directory.name
    try:
        result = spec.directory.complete_result(spec.identity) or open_run(spec).result
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
    status = RunStatus(name, RESUMABLE, facts.committed, attempts=last.number, reason=reason)
    if alive:
        return replace(status, status=RUNNING, reason=last.owner())
    if outcome == "diverged":
        return replace(status, status=DIVERGED)
    failures = _failures(facts.attempts, facts.commits)
    if last.end is None and failures:
        reason = f"killed before a new checkpoint{f', {failures} times in a row' if failures > 1 else ''}"
    end = FAILED if outcome == "failed" else RESUMABLE
    return replace(status, status=end, failures=failures, reason=reason, unclear=last if alive is None else None)


def _failures(attempts: Sequence[AttemptRecord], commits: Sequence[CommitId]) -> int:
    """The number of last attempts in a row that failed, or were killed without a new checkpoint; not counting attempts
    that a cluster ended to queue their job again.
    """
    with_commit = {commit.attempt for commit in commits}
    failures, later = 0, cluster_job()
    for record in reversed(attempts):
        job = record.claim.get("cluster")
        killed = record.end is None and not record.beat.get("committed") and record.number not in with_commit
        if not killed and record.ending("outcome") != "failed":
            break
        failures += not (killed and requeued(job, later))
        later = job
    return failures


def _first_line(text: Any) -> str:
    return printable(str(text).partition("\n")[0])

"""A launcher around the configured one, which gets only the jobs that are left to do.

Hydra creates launchers in one function, which is replaced here; sweepers and launchers themselves are unchanged. Before
anything starts, all runs are looked up in the storage. A finished run gives its stored objective; a run that another
process works on is waited for; a run that fails is tried again, and never ends the sweep.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from runner import signals
from runner.config.checks import refuse_secrets
from runner.distributed.environment import World, world
from runner.errors import ConfigError, Interrupted, JobDied, RunInUse, RunnerError
from runner.job import Job, absolute_root, storage_options
from runner.stop_request import VARIABLE, StopRequest
from runner.sweep.jobs import Jobs, Names, SignalLoader, isolated
from runner.sweep.survey import CUT, DIVERGED, DONE, FAILED, NEW, RUNNING, Found, Overrides, failed, survey, table

log = logging.getLogger("runner")

_instantiate = Plugins.instantiate_launcher
_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_POLL_SECONDS = 2.0
_WORST_LAST = (0, 75, 4, 3, 2, 5, 1)


class Outcome:
    """How the jobs of a command ended, over all calls of the launcher."""

    def __init__(self) -> None:
        self.last: dict[Overrides, Found] = {}
        self.launched = 0

    @property
    def status(self) -> int:
        """The exit status: the worst of the jobs'."""
        statuses = [one.exit_status for one in self.last.values() if one.status == FAILED]
        return max(statuses, key=_WORST_LAST.index, default=0)

    def summary(self) -> str | None:
        """The final table; None if nothing was launched, because then the first table says it all."""
        return table([*self.last.values()]) if self.launched and self.last else None


def install() -> Outcome:
    """Put this launcher around every launcher that Hydra creates from now on."""
    outcome = Outcome()

    def instantiate(
        plugins: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        _require_one(world())
        refuse_secrets(config)  # a sweeper makes names and studies of them
        loader: Any = SignalLoader(hydra_context.config_loader)
        inner_context = HydraContext(config_loader=loader, callbacks=hydra_context.callbacks)
        inner = _instantiate(plugins, inner_context, isolated(task_function, config), config)
        jobs = Jobs(hydra_context.config_loader, config)
        hydra_context.config_loader = jobs  # type: ignore[assignment]  # the sweeper's own
        return SweepLauncher(inner, jobs, config, outcome)

    Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign,assignment]
    return outcome


def _require_one(here: World) -> None:
    if here.size > 1:
        raise ConfigError(
            f"a sweep (-m) was started in {here.size} processes, each of which would run all jobs. Start it in one, "
            "with a launcher whose jobs have many (hydra/launcher=slurm_many), or its runs one after the other"
        )


class SweepLauncher(Launcher):
    """Launches the jobs that are not done, with ``inner``, until all are done or have failed for good."""

    def __init__(self, inner: Launcher, jobs: Jobs, config: DictConfig, outcome: Outcome) -> None:
        self._inner = inner
        # Launched one by one in this process, so that failures are reported at once and signals stop the sweep.
        self._serial = config.hydra.launcher._target_ == _BASIC
        self._jobs = jobs
        self._names = Names()
        self._sweep = config.sweep
        self._steal = config.run.on_conflict.name == "steal"
        self._stop = None if self._serial else StopRequest.new(absolute_root(config), storage_options(config))
        self._left_behind = False
        self._outcome = outcome

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing: the inner one was set up when it was made."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One return value per job, in order. Raises Interrupted after a stop signal.

        A job without an objective returns NaN instead of raising, because a sweeper must not end for one job.
        """
        if not job_overrides:
            raise ConfigError("the sweep has no jobs: one of its glob() or choice() stands for nothing")
        setup_globals()
        overrides = [tuple(one) for one in job_overrides]
        composed = {each: self._jobs.job(each) for each in dict.fromkeys(overrides)}
        run_of = self._names.distinct(overrides, composed)
        jobs = {each: composed[each] for each in run_of.values()}
        found = self._look(jobs)
        print(f"{table([*found.values()])}\n", flush=True)
        for one in {type(one.error): one for one in found.values() if one.error}.values():  # not a hundred alike
            log.error("failed   %s: %s", one.run, one.why)
        while True:
            startable = [each for each in jobs if self._startable(found[each])]
            startable.sort(key=lambda each: found[each].failures)  # what may end this process is last
            running = [each for each in jobs if found[each].status == RUNNING]
            signals.raise_if_received(self._progress(found))
            if startable:
                found |= self._launch(startable, jobs, found, initial_job_idx)
            elif running:
                with self._stop.forward_signals() if self._stop else nullcontext():  # some may have been started by us
                    time.sleep(_POLL_SECONDS)
            else:
                break
            found |= self._look({each: jobs[each] for each in running})
        self._outcome.last |= found
        return [_returned(each, found[run_of[each]]) for each in overrides]

    def _look(self, jobs: dict[Overrides, Job | RunnerError]) -> dict[Overrides, Found]:
        return {each: self._settled(found) for each, found in survey(jobs).items()}

    def _startable(self, found: Found) -> bool:
        if found.status == FAILED:
            return not found.final
        return found.status in (NEW, CUT) or (found.status == RUNNING and self._steal)

    def _settled(self, found: Found) -> Found:
        """``found``, marked as ``final`` if the run has failed, or was killed without a new checkpoint, too often."""
        often = found.failures > self._sweep.max_retries
        if found.status == CUT and often:
            error = JobDied(f"{found.reason}. Run it alone to see why, or try it again with a higher sweep.max_retries")
            return replace(found, status=FAILED, final=True, error=error)
        return (
            replace(found, final=True) if found.status == FAILED and (often or not self._sweep.retry_failed) else found
        )

    def _launch(
        self,
        startable: list[Overrides],
        jobs: dict[Overrides, Job | RunnerError],
        before: dict[Overrides, Found],
        index: int,
    ) -> dict[Overrides, Found]:
        after: dict[Overrides, Found] = {}
        for batch in [[each] for each in startable] if self._serial else [startable]:
            signals.raise_if_received(self._progress(before | after))
            self._outcome.launched += len(batch)
            errors = self._run(batch, jobs, index + len(after))
            looked = survey({each: jobs[each] for each in batch})
            moved = {each for each in batch if _moved(before[each], looked[each])}
            for each in batch:
                queued = bool(moved) and each not in moved
                concluded = _concluded(before[each], looked[each], errors[each], queued=queued)
                after[each] = self._settled(concluded)
            for each in batch:
                if after[each].status == FAILED:
                    log.error("failed   %s: %s", after[each].run, after[each].why)
                elif isinstance(errors[each], JobDied):
                    log.warning("killed   %s, at step %d or later: %s", after[each].run, after[each].step, errors[each])
        return after

    def _run(
        self, batch: list[Overrides], jobs: dict[Overrides, Job | RunnerError], index: int
    ) -> dict[Overrides, BaseException | None]:
        """The error of each job, or None."""
        try:
            returns = self._launch_stoppable(batch, index) if self._stop else self._inner.launch(batch, index)
        except Exception as error:  # a worker died, or the cluster refused: the storage shows how far each job got
            self._left_behind = True
            log.error("the launcher ended early: %s: %s", type(error).__name__, error)
            return dict.fromkeys(batch, LauncherError(f"{type(error).__name__}: {error}"))
        return {
            # Without the frames: they hold what the job held.
            each: one._return_value.with_traceback(None) if one.status is JobStatus.FAILED else None
            for each, one in zip(batch, returns, strict=True)
        }

    def _launch_stoppable(self, batch: list[Overrides], index: int) -> Sequence[JobReturn]:
        """Launch jobs in other processes, and pass stop signals of this process on to them."""
        assert self._stop
        mark = f"+hydra.job.env_set.{VARIABLE}={self._stop.name}"
        with self._stop.forward_signals():
            returns = self._inner.launch([[*each, mark] for each in batch], index)
        if signals.received() and not self._left_behind:
            self._stop.withdraw()
        return returns

    def _progress(self, found: dict[Overrides, Found]) -> str:
        done = sum(one.status in (DONE, DIVERGED) for one in found.values())
        return f"in a sweep: {done} of {len(found)} runs are done, what was running is committed"


class LauncherError(Exception):
    """The launcher itself failed, so that it is not known how its jobs ended."""


def _moved(before: Found, after: Found) -> bool:
    """Whether a process has started or finished the run since ``before``."""
    return after.status == DONE or after.attempts > before.attempts


def _concluded(before: Found, after: Found, error: BaseException | None, *, queued: bool) -> Found:
    """The status of a run whose job ended with ``error``, if the storage shows it as ``after``.

    An error of the launcher says nothing about a single job. The job has failed only if it started and made no
    progress, and then for a reason of its own. If others of its batch started and it did not, it may still be
    ``queued`` in the cluster; it is launched again, and whichever job starts first does the work.
    """
    if after.status in (DONE, DIVERGED) or isinstance(error, RunInUse | Interrupted):
        return after
    if error is None:
        error = LauncherError("the job ended and has no result")
    if isinstance(error, LauncherError) and (queued or after.status == RUNNING):
        return after
    unheard = isinstance(error, LauncherError | JobDied)
    if unheard and after.step > before.step and after.status != FAILED:
        return after
    if unheard and _moved(before, after) and (after.status == FAILED or not isinstance(error, JobDied)):
        return replace(after, failures=max(before.failures + 1, after.failures))
    return failed(replace(after, failures=max(before.failures, after.failures - 1)), error)


def _returned(overrides: Overrides, found: Found) -> JobReturn:
    if found.status == FAILED:
        error = found.error or RunnerError(found.reason)  # which an earlier command met
        return _Failed(overrides=overrides, status=JobStatus.FAILED, _return_value=error)
    value = found.objective if found.status == DONE else math.nan
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)


class _Failed(JobReturn):
    """A failed job that does not raise when its value is read, because that would end the sweep."""

    return_value = math.nan

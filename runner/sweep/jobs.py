"""The jobs of a sweep: composed once, checked for two that name one run, and run in a process each.

A job is killed without the sweep, and all that a failed job held ends with its process. The process is forked after
torch has been imported once for all jobs. It has the output, the log and the environment of the sweep; a stop signal is
passed on to it, and it stops by itself if the sweep's process is gone.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction
from omegaconf import DictConfig

from runner import errors, signals
from runner.errors import ConfigError, Interrupted, JobDied, RunnerError
from runner.run.opening import compare
from runner.run_spec import RunSpec
from runner.stop_request import VARIABLE, orphaned
from runner.sweep.survey import Overrides, Specs

log = logging.getLogger("runner")

_LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
)
_IMPORTED_BEFORE = ("runner.experiment", "torch._dynamo")  # every job needs them; their import takes seconds
_POLL_SECONDS = 0.1
_EXIT_SECONDS = 60.0  # for what a user's code does at the exit of a process
_STOP_SECONDS = 10.0  # the same, once a stop is asked for
_HINTS = {
    "SIGKILL": ": the system does so when memory runs out (see dmesg)",
    "SIGSEGV": ": a fault in compiled code; python -X faulthandler shows where",
}


def isolate(task: TaskFunction, config: DictConfig) -> TaskFunction:
    """``task``, to be called in a process for each job if this launcher's jobs would share one."""
    shared = config.hydra.launcher._target_ in _LAUNCHERS
    return ProcessPerJob(task) if shared and config.sweep.isolate and sys.platform == "linux" else task


_Ending = tuple[Any, BaseException | None, str | None]  # the job's value, its error, the stop signal it received


class ProcessPerJob:
    """A task function that runs every call in a process of its own."""

    def __init__(self, task: TaskFunction) -> None:
        self._task = task

    def __call__(self, config: DictConfig) -> Any:
        """The job's objective. Raises what the job raised, or JobDied."""
        signals.install()
        if not {*HydraConfig.get().job.env_set} - {VARIABLE}:  # libraries read such variables at their import
            for module in _IMPORTED_BEFORE:
                importlib.import_module(module)
        parent_end, child_end = multiprocessing.Pipe()
        arguments = (self._task, config, parent_end, child_end)
        process = multiprocessing.get_context("fork").Process(target=_run_job, args=arguments)
        process.start()
        child_end.close()
        with parent_end:
            ending = _wait(process, parent_end)
        if ending is None:
            raise JobDied(_death(process.exitcode or 0))
        value, error, stop = ending
        if stop and isinstance(error, Interrupted):
            signals.request(stop)  # somebody stopped the job alone; the sweep stops with it
        if error:
            raise error
        return value


def _wait(process: BaseProcess, pipe: Connection) -> _Ending | None:
    """Wait for the end of the process, and pass a stop signal on to it; None if it was killed."""
    asked, ending = False, None
    # The pipe may outlive the job in processes that the job began.
    while not pipe.poll(_POLL_SECONDS) and process.is_alive():
        stop = signals.received() or ("SIGTERM" if VARIABLE in os.environ and orphaned() else None)
        if stop and not asked:
            asked = _send(pipe, stop)
    with contextlib.suppress(EOFError, OSError):
        ending = pipe.recv() if pipe.poll() else None
    began = time.monotonic()
    while process.is_alive():
        process.join(_POLL_SECONDS)
        if time.monotonic() - began > (_STOP_SECONDS if signals.received() else _EXIT_SECONDS):
            log.warning("the process of a job that has ended (pid %d) stays, and is killed", process.pid)
            process.kill()
            process.join()
    return ending


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with status {code} before the job did: something called os._exit, or ended it from C"
    name = signal.Signals(-code).name
    return f"its process was killed by {name}{_HINTS.get(name, '')}"


def _send(pipe: Connection, message: Any) -> bool:
    try:
        pipe.send(message)
    except OSError:  # the other side is gone
        return False
    return True


def _run_job(task: TaskFunction, config: DictConfig, parent_end: Connection, pipe: Connection) -> None:
    """The main function of the job's process."""
    parent_end.close()
    signals.install()
    ended = threading.Event()
    threading.Thread(target=_listen, args=(pipe, ended), name="stop", daemon=True).start()
    value: Any = None
    error: BaseException | None = None
    try:
        value = task(config)
    except BaseException as raised:
        # An error of a user's class may not be possible to send.
        own = type(raised).__module__ == errors.__name__
        error = raised if own else RunnerError(f"{type(raised).__name__}: {raised}")
    ended.set()
    _send(pipe, (value, error, signals.received()))


def _listen(pipe: Connection, ended: threading.Event) -> None:
    """Obey the request to stop, and leave once nobody waits any more for a job that has ended or was asked to stop."""
    try:
        while True:
            signals.request(pipe.recv())
    except (EOFError, OSError):
        if ended.is_set() or signals.received():
            os._exit(1)
        signals.request("SIGTERM")


class SpecLoader:
    """Hydra's config loader, which remembers the run that each composed configuration asks for.

    A sweeper composes all configurations to validate them. To compose takes longer than to read a finished run's
    result, so it is not done twice.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._specs: dict[Overrides, RunSpec | RunnerError] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """See ``ConfigLoader``."""
        config = self._loader.load_sweep_config(master_config, sweep_overrides)
        with _hydra_config(config):
            try:
                self._specs[tuple(sweep_overrides)] = RunSpec.of(config)
            except RunnerError as error:
                self._specs[tuple(sweep_overrides)] = error
        return config

    def spec(self, overrides: Overrides) -> RunSpec | RunnerError:
        """The run that these overrides ask for, or the error that they cause."""
        if overrides not in self._specs:
            self.load_sweep_config(self._master, [*overrides])
        return self._specs.pop(overrides)


class SignalLoader:
    """Hydra's config loader for the inner launcher; installs our signal handlers again, which starting Ray replaces."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """See ``ConfigLoader``."""
        signals.install()
        return self._loader.load_sweep_config(master_config, sweep_overrides)


class RunNames:
    """The runs that the jobs of a command name, over all calls of the launcher."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[Overrides, RunSpec]] = {}  # by the URL of the run

    def deduplicate(self, jobs: Sequence[Overrides], specs: Specs) -> dict[Overrides, Overrides]:
        """For each job the first one of the same run: it stands for both.

        Raises ConfigError if they compute different things: one of them would get the other's result.
        """
        first: dict[str, Overrides] = {}
        representatives: dict[Overrides, Overrides] = {}
        for job in jobs:
            spec = specs[job]
            if isinstance(spec, RunnerError):
                representatives[job] = job
                continue
            url = spec.directory.location.url
            _require_same(*self._first.setdefault(url, (job, spec)), job, spec)
            if url in first:
                alike = "\n".join(f"  {' '.join(words)}" for words in (first[url], job))
                log.warning("hint     two jobs are one run, %s, which is done once:\n%s", spec.directory.name, alike)
            representatives[job] = first.setdefault(url, job)
        return representatives


def _require_same(first: Overrides, first_spec: RunSpec, job: Overrides, spec: RunSpec) -> None:
    differing = [change.key for change in compare(first_spec.identity, spec.identity)]
    if first_spec.parent != spec.parent:
        differing.append("run.parent")
    if differing:
        raise ConfigError(
            f"two jobs of the sweep name one run, {spec.directory.name}, and differ in {', '.join(differing)}:\n"
            f"  {' '.join(first)}\n  {' '.join(job)}\n"
            "Nothing was started. Leave run.name out, so that the name is made from the overrides, or put into it "
            f"what differs: 'run.name=NAME-${{{differing[0]}}}'"
        )


@contextmanager
def _hydra_config(config: DictConfig) -> Iterator[None]:
    """Within the block, ``HydraConfig`` is that of this job."""
    holder = HydraConfig.instance()
    before, holder.cfg = holder.cfg, None
    holder.set_config(config)
    try:
        yield
    finally:
        holder.cfg = before

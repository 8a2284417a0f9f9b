"""Jobs of this machine, each in a process of its own: one that is killed does not take the sweep with it, and what a
failed one held ends with it.

The process is forked after torch has been imported once for all of them. It has the output, the log and the
environment of this one; a stop signal is passed on to it, and it stops by itself if this process is gone.

The jobs of a sweep: composed once, and two that name one run told apart.
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
from collections.abc import Iterator, Mapping, Sequence
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
from runner.run import drift
from runner.run_spec import RunSpec
from runner.stop_request import VARIABLE, orphaned
from runner.sweep.survey import Overrides

log = logging.getLogger("runner")

_LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
)
_SHARED = ("runner.experiment", "torch._dynamo")  # what every job needs and takes seconds to import
_POLL_SECONDS = 0.1
_EXIT_SECONDS = 60.0  # for what a user's code does at the exit of a process; 10 once a stop is asked for
_HINTS = {
    "SIGKILL": ": the system does so when memory runs out (see dmesg)",
    "SIGSEGV": ": a fault in compiled code; python -X faulthandler shows where",
}


def isolated(task: TaskFunction, config: DictConfig) -> TaskFunction:
    """``task``, to be called in a process for each job if this launcher's jobs would share one."""
    shared = config.hydra.launcher._target_ in _LAUNCHERS
    return Isolated(task) if shared and config.sweep.isolate and sys.platform == "linux" else task


class Isolated:
    """A task function whose every call is a process."""

    def __init__(self, task: TaskFunction) -> None:
        self._task = task

    def __call__(self, config: DictConfig) -> Any:
        """The job's objective. Raises what the job raised, or JobDied."""
        signals.install()
        if not {*HydraConfig.get().job.env_set} - {VARIABLE}:  # libraries read such variables at their import
            for module in _SHARED:
                importlib.import_module(module)
        ours, theirs = multiprocessing.Pipe()
        job = multiprocessing.get_context("fork").Process(target=_work, args=(self._task, config, ours, theirs))
        job.start()
        theirs.close()
        with ours:
            return _returned(job, _end(job, ours))


def _end(job: BaseProcess, ours: Connection) -> tuple[Any, BaseException | None, str | None] | None:
    """What the job sent when it ended: its value, its error, the signal that it received. None if it was killed."""
    asked, end = False, None
    # The pipe may outlive the job in processes that the job began.
    while not ours.poll(_POLL_SECONDS) and job.is_alive():
        stop = signals.received() or ("SIGTERM" if VARIABLE in os.environ and orphaned() else None)
        if stop and not asked:
            asked = _sent(ours, stop)
    with contextlib.suppress(EOFError, OSError):
        end = ours.recv() if ours.poll() else None
    began = time.monotonic()
    while job.is_alive():
        job.join(_POLL_SECONDS)
        if time.monotonic() - began > (10 if signals.received() else _EXIT_SECONDS):
            log.warning("the process of a job that has ended (pid %d) stays, and is killed", job.pid)
            job.kill()
            job.join()
    return end


def _returned(job: BaseProcess, end: tuple[Any, BaseException | None, str | None] | None) -> Any:
    code = job.exitcode or 0
    if end is None:
        how = signal.Signals(-code).name if code < 0 else ""
        raise JobDied(f"its process was killed by {how}{_HINTS.get(how, '')}" if how else _exited(code))
    value, error, stop = end
    if stop and isinstance(error, Interrupted):
        signals.request(stop)  # somebody asked the job alone
    if error:
        raise error
    return value


def _exited(code: int) -> str:
    return f"its process ended with status {code} before the job did: something called os._exit, or ended it from C"


def _sent(end: Connection, what: Any) -> bool:
    try:
        end.send(what)
    except OSError:  # the other side is gone
        return False
    return True


def _work(task: TaskFunction, config: DictConfig, ours: Connection, theirs: Connection) -> None:
    """The job's process."""
    ours.close()
    signals.install()
    ended = threading.Event()
    threading.Thread(target=_listen, args=(theirs, ended), name="stop", daemon=True).start()
    value: Any = None
    error: BaseException | None = None
    try:
        value = task(config)
    except BaseException as raised:
        # One of a user's class may not be possible to send.
        own = type(raised).__module__ == errors.__name__
        error = raised if own else RunnerError(f"{type(raised).__name__}: {raised}")
    ended.set()
    _sent(theirs, (value, error, signals.received()))


def _listen(theirs: Connection, ended: threading.Event) -> None:
    """Obey the request to stop, and leave once nobody waits any more for a job that has ended or was asked to stop."""
    try:
        while True:
            signals.request(theirs.recv())
    except (EOFError, OSError):
        if ended.is_set() or signals.received():
            os._exit(1)
        signals.request("SIGTERM")


class Jobs:
    """Hydra's config loader, which remembers the job of every configuration that it composes.

    A sweeper composes all configurations to validate them. To compose takes longer than to read a finished run's
    result, so it is not done twice.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._known: dict[Overrides, RunSpec | RunnerError] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """See ``ConfigLoader``."""
        config = self._loader.load_sweep_config(master_config, sweep_overrides)
        with _hydra_config(config):
            try:
                self._known[tuple(sweep_overrides)] = RunSpec.of(config)
            except RunnerError as error:
                self._known[tuple(sweep_overrides)] = error
        return config

    def job(self, overrides: Overrides) -> RunSpec | RunnerError:
        """The job for these overrides, or the error that they cause."""
        if overrides not in self._known:
            self.load_sweep_config(self._master, [*overrides])
        return self._known.pop(overrides)


class SignalLoader:
    """Hydra's config loader for the inner launcher; installs our signal handlers again, which starting Ray replaces."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """See ``ConfigLoader``."""
        signals.install()
        return self._loader.load_sweep_config(master_config, sweep_overrides)


class Names:
    """The runs that the jobs of a command name, over all calls of the launcher."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[Overrides, RunSpec]] = {}

    def distinct(
        self, given: Sequence[Overrides], jobs: Mapping[Overrides, RunSpec | RunnerError]
    ) -> dict[Overrides, Overrides]:
        """For each given job the first one that names the same run: it stands for both.

        Raises ConfigError if they compute different things: one of them would get the other's result.
        """
        first: dict[str, Overrides] = {}
        chosen: dict[Overrides, Overrides] = {}
        for each in given:
            job = jobs[each]
            if isinstance(job, RunnerError):
                chosen[each] = each
                continue
            url = job.directory.location.url
            self._require_same(*self._first.setdefault(url, (each, job)), each, job)
            if url in first:
                alike = "\n".join(f"  {' '.join(words)}" for words in (first[url], each))
                log.warning("hint     two jobs are one run, %s, which is done once:\n%s", job.directory.name, alike)
            chosen[each] = first.setdefault(url, each)
        return chosen

    @staticmethod
    def _require_same(first: Overrides, known: RunSpec, each: Overrides, job: RunSpec) -> None:
        differing = [difference.key for difference in drift.compare(known.identity, job.identity)]
        if known.parent != job.parent:
            differing.append("run.parent")
        if differing:
            raise ConfigError(
                f"two jobs of the sweep name one run, {job.directory.name}, and differ in {', '.join(differing)}:\n"
                f"  {' '.join(first)}\n  {' '.join(each)}\n"
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

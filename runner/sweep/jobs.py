"""The jobs of a sweep: each composed once, and run in a process of its own.

A job that is killed does not end the sweep, and its memory and workers end with its process, which is forked after
torch has been imported once for all jobs. A stop signal is passed on to the job, and it stops by itself if the sweep's
process is gone.
"""

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction
from omegaconf import DictConfig

from runner import errors, signals
from runner.app import run_spec
from runner.errors import Interrupted, JobDied, RunnerError
from runner.run.opening import RunSpec
from runner.signals import SWEEP_VARIABLE, orphaned

log = logging.getLogger("runner")

Overrides = tuple[str, ...]  # they identify a job

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_SHARED_PROCESS = (BASIC_LAUNCHER, "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher")
_IMPORTS = ("runner.experiment", "torch._dynamo")  # every job needs them; their import takes seconds
_POLL_SECONDS = 0.1
_EXIT_SECONDS = 60.0  # for code of the user that runs at the exit of a process
_STOP_SECONDS = 10.0  # for this code after a stop signal
_HINTS = {"SIGKILL": ": the system does so when memory runs out (see dmesg)"}
_HINTS |= {"SIGSEGV": ": a fault in compiled code; python -X faulthandler shows where"}


def isolate(task: TaskFunction, config: DictConfig) -> TaskFunction:
    """``task``, to be called in a process for each job if this launcher's jobs would share one."""
    shared = config.hydra.launcher._target_ in _SHARED_PROCESS
    return partial(_run_isolated, task) if shared and config.sweep.isolate and sys.platform == "linux" else task


def _run_isolated(task: TaskFunction, config: DictConfig) -> Any:
    """The job's objective. Raises the error of the job, or JobDied."""
    signals.install()
    if not {*HydraConfig.get().job.env_set} - {SWEEP_VARIABLE}:  # libraries read such variables at their import
        for module in _IMPORTS:
            importlib.import_module(module)
    parent_end, child_end = multiprocessing.Pipe()
    arguments = (task, config, parent_end, child_end)
    process = multiprocessing.get_context("fork").Process(target=_run_job, args=arguments)
    process.start()
    child_end.close()
    with parent_end:
        value, error, stop = _wait(process, parent_end)
    if stop and isinstance(error, Interrupted):
        signals.request(stop)  # somebody stopped the job alone; the sweep stops with it
    if error:
        raise error
    return value


def _wait(process: BaseProcess, pipe: Connection) -> tuple[Any, BaseException | None, str | None]:
    """The job's value, its error and the stop signal that it received. Passes a stop signal on to the process."""
    ending, passed_on = None, False
    # The pipe may outlive the job in processes that the job began.
    while not pipe.poll(_POLL_SECONDS) and process.is_alive():
        stop = signals.received() or ("SIGTERM" if SWEEP_VARIABLE in os.environ and orphaned() else None)
        if stop and not passed_on:
            passed_on = True
            with suppress(OSError):  # the process has ended
                pipe.send(stop)
    with suppress(EOFError, OSError):
        ending = pipe.recv() if pipe.poll() else None
    process.join(_STOP_SECONDS if signals.received() else _EXIT_SECONDS)
    if process.is_alive():
        log.warning("the process of a job that has ended (pid %d) stays, and is killed", process.pid)
        process.kill()
        process.join()
    return ending or (None, _death(process.exitcode or 0), None)


def _death(code: int) -> JobDied:
    """The error of a job whose process ended with this exit status and without a result."""
    if code >= 0:
        cause = "before the job did: something called os._exit, or ended it from C"
        return JobDied(f"its process ended with status {code} {cause}")
    name = signal.Signals(-code).name
    return JobDied(f"its process was killed by {name}{_HINTS.get(name, '')}")


def _run_job(task: TaskFunction, config: DictConfig, parent_end: Connection, pipe: Connection) -> None:
    parent_end.close()
    signals.install()
    ended = threading.Event()
    threading.Thread(target=_listen, args=(pipe, ended), name="stop", daemon=True).start()
    value: Any = None
    error: BaseException | None = None
    try:
        value = task(config)
    except BaseException as raised:
        # An instance of a user's class may be impossible to send.
        own = type(raised).__module__ == errors.__name__
        error = raised if own else RunnerError(f"{type(raised).__name__}: {raised}")
    ended.set()
    with suppress(OSError):  # the sweep is gone
        pipe.send((value, error, signals.received()))


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
    """Hydra's config loader, which remembers the run that each composed configuration asks for: a sweeper composes all
    to validate them, and to compose one twice takes longer than to read a finished run's result.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._specs: dict[Overrides, RunSpec | RunnerError] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        config = self._loader.load_sweep_config(master_config, sweep_overrides)
        holder = HydraConfig.instance()
        before, holder.cfg = holder.cfg, None
        holder.set_config(config)
        try:
            self._specs[tuple(sweep_overrides)] = run_spec(config)
        except RunnerError as error:
            self._specs[tuple(sweep_overrides)] = error
        finally:
            holder.cfg = before
        return config

    def spec(self, overrides: Overrides) -> RunSpec | RunnerError:
        if overrides not in self._specs:
            self.load_sweep_config(self._master, [*overrides])
        return self._specs.pop(overrides)


class SignalLoader:
    """Hydra's config loader for the inner launcher; installs our signal handlers again, which starting Ray replaces."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        signals.install()
        return self._loader.load_sweep_config(master_config, sweep_overrides)

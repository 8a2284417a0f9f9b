"""The Hydra application: one composed configuration in, the objective out.

torch is imported only for a run that has something left to train.
"""

import copy
import logging
import os
import re
import shlex
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from runner import signals
from runner.callbacks.base import notify, observers
from runner.config import schema
from runner.config.checks import refuse_secrets
from runner.distributed.communicator import Communicator, on_rank_zero
from runner.distributed.environment import world
from runner.distributed.joining import joined
from runner.distributed.team import Team
from runner.errors import FinishedMeanwhile, Interrupted, RunnerError, printable, redacted
from runner.job import Job, run_name
from runner.run.links import refuse_links
from runner.run.opening import OpenedRun, is_free
from runner.stop_request import VARIABLE, StopRequest
from runner.storage.location import is_remote, local_root

log = logging.getLogger("runner")

_PACKAGE = Path(__file__).parent
# In a wheel the configurations lie inside the package, in a clone beside it.
CONFIGS = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())
_POLL_SECONDS = 0.5
_LOCAL_FILES = "outputs/remote"
_USER = re.compile(r"(?<=://)[^/]*@")
_UNSAFE = re.compile(r"[^A-Za-z0-9._/=,+~-]|(?<=/)/|\.\.")


class Formatter(logging.Formatter):
    """Lines of the log and tracebacks without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """As the base class."""
        return redacted(super().format(record))


def register() -> None:
    """Register schema and resolvers with Hydra; done on import: workers of a launcher import no more than this."""
    schema.register()
    log.addFilter(_escaped)
    # Hydra's own files go into the run directory, for a single run as for a job of a sweep.
    OmegaConf.register_new_resolver("runner.directory", _directory, replace=True)
    OmegaConf.register_new_resolver("runner.variant", _variant, replace=True)
    OmegaConf.register_new_resolver("runner.hydra_files", _hydra_files, replace=True)
    OmegaConf.register_new_resolver("runner.rank", lambda: world().rank, replace=True)
    OmegaConf.register_new_resolver("runner.log_handlers", _log_handlers, replace=True)


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def main(config: DictConfig) -> float | None:
    """Run one job and return its objective to the sweeper.

    On an error a single run exits with the error's status. A job of a sweep raises it instead: an exit would end the
    whole sweep. There any other error is logged and becomes a RunnerError, which a worker process can send back.
    """
    logging.raiseExceptions = False  # a closed terminal or a full disk under the log is no reason to stop training
    try:
        return _job(config)
    except RunnerError as error:
        if HydraConfig.get().mode is RunMode.RUN:
            if str(error):  # empty if another process of the run prints it
                with suppress(OSError):  # the terminal was closed
                    print(error, file=sys.stderr)
            sys.exit(error.status)
        if isinstance(error, Interrupted) and VARIABLE in os.environ:
            _hand_over()
        failure = error
    except Exception as error:
        if HydraConfig.get().mode is RunMode.RUN:
            raise
        log.error("%s", "failed\n" + traceback.format_exc().rstrip())
        failure = RunnerError(f"{type(error).__name__}: {error}")
    # Without frames, also those of other errors: they hold the model and all else, and a sweep keeps the error.
    failure.__traceback__ = failure.__context__ = failure.__cause__ = None
    raise failure


def _escaped(record: logging.LogRecord) -> bool:
    """Our own lines may quote what is in a run directory; a user's may have colours."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


def _hand_over() -> None:
    try:
        signals.hand_over()
    except Exception as error:  # not queued again by the cluster; the sweep starts the job again
        log.warning("not queued again: %s: %s", type(error).__name__, error)


def _job(config: DictConfig) -> float | None:
    signals.install()  # again, because a launcher may have started this process without ``__main__``
    with joined(world(), timeout=config.runtime.timeout, patience=config.checkpoint.max_unsaved) as team:
        job = Job.of(config)
        request = StopRequest.named(job.directory.root, job.directory.options)
        notify(observers, "on_command", job.directory)
        with request.obeyed() if request else nullcontext():
            signals.raise_if_received("during start-up, nothing to commit")
            return _finished(job, config, team)


def _finished(job: Job, config: DictConfig, team: Team) -> float | None:
    opening = _opened(job, config, team.ranks)
    result = opening.result
    if result is None:
        from runner import experiment

        try:
            # A copy: to instantiate resolves nodes in place, and Hydra hands the configuration back to the launcher.
            result = experiment.run(opening, copy.deepcopy(config), team, overrides=job.overrides)  # type: ignore[arg-type]
        except FinishedMeanwhile:
            return _finished(job, config, team)
    _conclude(opening, result)
    goal: float | None = (result.get("objective") or {}).get("value")
    return goal


def _opened(job: Job, config: DictConfig, ranks: Communicator) -> OpenedRun:
    """The run as rank 0 finds it. Other ranks take over what it found, because the storage may change between reads."""
    found: list[OpenedRun] = []

    def open_run() -> dict[str, Any]:
        found.append(job.open())
        return {"variant": found[0].directory.variant, "result": found[0].result}

    if config.run.on_conflict is schema.OnConflict.wait:
        _wait_until_free(job, ranks)
    seen = on_rank_zero(ranks, open_run)
    return found[0] if found else job.following(**seen)


def _wait_until_free(job: Job, ranks: Communicator) -> None:
    """Return once no living process holds the run. Rank 0 looks; all take part, so that none runs into a timeout."""

    def free() -> bool:
        found = is_free(job.directory)
        if not found:
            signals.raise_if_received("while waiting for the run")
        return found

    while not on_rank_zero(ranks, free):
        time.sleep(_POLL_SECONDS)


def _conclude(opening: OpenedRun, result: dict[str, Any]) -> None:
    metrics = {name: value for name, value in result["metrics"].items() if value is not None}
    log.info(
        "finished step %d (%s)%s",
        result["step"],
        result.get("reason"),  # what follows may be of anyone
        "".join(f", {n} {v:.4g}" for n, v in metrics.items()),
    )
    goal = result.get("objective")
    if goal and goal.get("value") is not None:
        log.info("best     %s %.4g at step %s", goal.get("metric"), goal["value"], goal.get("step"))
    url = opening.directory.location.url
    if not is_remote(url):
        url = os.path.relpath(url, to_absolute_path("."))  # hydra.job.chdir may have changed the working directory
    log.info("curves   tensorboard --logdir %s", shlex.quote(url))
    notify(observers, "on_finish", opening.directory, result)


def _directory(*, _root_: DictConfig) -> str:
    """Where Hydra puts its own files: the run directory, or, for a remote one, a local folder named after it."""
    return _safe(_root_, *_place(_root_))


def _place(config: DictConfig) -> tuple[str, str]:
    """The local root, and the folder below it: that of the experiment, or, for a sweep over experiments, none."""
    refuse_secrets(config)  # Hydra asks before it writes anything
    root = config.run.root
    if is_remote(root):
        root = f"{_LOCAL_FILES}/{_UNSAFE.sub('_', _USER.sub('', root).replace('://', '/'))}"
    return local_root(root), OmegaConf.select(config, "hydra.runtime.choices.experiment") or ""


def _safe(config: DictConfig, root: str, below: str) -> str:
    """That folder, in which Hydra is about to write; it would follow any link. Raises ConfigError for one."""
    refuse_links(root, below, log=f"{OmegaConf.select(config, 'hydra.job.name') or 'runner'}.log")
    return f"{root}/{below}" if below else root


def _hydra_files(*, _root_: DictConfig) -> str | None:
    """The name of Hydra's folder for the configuration; None on ranks above 0."""
    if output := OmegaConf.select(_root_, "hydra.runtime.output_dir", throw_on_missing=False):
        _safe(_root_, output, "")  # also where a command gives a folder of its own: hydra.run.dir=...
    return None if world().rank else ".hydra"


def _log_handlers() -> list[str]:
    """Rank 0 prints and writes the log; other ranks print only warnings and errors."""
    return ["others"] if world().rank else ["console", "file"]


def _variant(*, _root_: DictConfig) -> str:
    name, (root, experiment) = run_name(_root_, _root_.hydra), _place(_root_)
    _safe(_root_, root, f"{experiment}/{name}")
    return name


register()

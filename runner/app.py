"""The Hydra application: one composed configuration in, the objective out.

torch is imported only for a run that has something left to train.

**From a SIGTERM to the exit**

1. The handler, installed by ``signals.install``, stores the signal's name and starts a deadline of 10 s. A single
   process that waits for data between two steps stops waiting at once.
2. ``Trainer.fit`` finishes its step. If the data of the step does not come before the deadline, the step is abandoned
   in all processes and no further step is committed: the next attempt repeats the steps since the last checkpoint. An
   evaluation is abandoned, and repeated by the next attempt.
3. All processes end the loop after the same step: ``Team.exchange`` sends the signal to the others with each step.
4. ``SaveCheckpoint.on_end`` commits the state of that step. If the storage fails, it tries again for up to
   10 seconds (``_STOP_SECONDS``), and ``Interrupted`` says from which checkpoint the run goes on.
5. ``experiment._train`` raises ``Interrupted``. The data workers end, ``Callback.on_error`` closes the metric writers
   (at most 10 s for a service), and ``Attempt.end`` records the outcome ``interrupted`` and releases the run.
6. ``main`` below prints the error and exits with 75. A job of a sweep raises it instead, after
   ``signals.call_previous_handlers`` let the cluster queue the job again. ``__main__`` does not wait for threads of the
   user's code.

Before training, and wherever nothing has to be committed first, ``signals.raise_if_received`` raises the same error. A
second SIGTERM, 0.5 s after the first or later (5 s under torchrun), ends the process by that signal.
"""

import atexit
import gc
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from runner import signals
from runner.callbacks.base import notify, observed_by, observers
from runner.config import composition, schema
from runner.config.identity import identity, is_name, variant
from runner.config.schema import refuse_secrets
from runner.distributed import join_team
from runner.distributed.communicator import Communicator, Team, on_all_ranks, on_rank_zero
from runner.distributed.world import world
from runner.errors import ChangedMeanwhile, ConfigError, Interrupted, RunnerError, printable, redacted
from runner.plain import numbers_text
from runner.run.directory import RunDirectory
from runner.run.opening import RunSpec, must_wait, open_run, refuse_links
from runner.run.parent import CheckpointRef, Parent
from runner.storage import open_location
from runner.storage.location import is_remote, local_folder, local_root, protocol

log = logging.getLogger("runner")

_PACKAGE = Path(__file__).parent
# In a wheel the configurations lie inside the package, in a clone beside it.
CONFIGS = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())
_POLL_SECONDS = 0.5


class Formatter(logging.Formatter):
    """Formats lines of the log and tracebacks without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """As the base class."""
        return redacted(super().format(record))


class LogFile(logging.FileHandler):
    """The log in the run directory. A file that cannot be opened is no reason to stop, as for any other error."""

    def emit(self, record: logging.LogRecord) -> None:
        """As the base class."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


def register() -> None:
    """Register schema and resolvers with Hydra; done on import: workers of a launcher import no more than this."""
    schema.register()
    composition.install()
    log.addFilter(_escaped)
    resolvers: dict[str, Callable[..., Any]] = {
        "directory": _directory,  # for Hydra's own files, in a single run as in a job of a sweep
        "variant": _variant,
        "hydra_files": _hydra_files,
        "total_steps": _total_steps,
        "rank": lambda: world().rank,
        # Rank 0 prints and writes the log; other ranks print only warnings and errors.
        "log_handlers": lambda: ["others"] if world().rank else ["console", "file"],
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"runner.{name}", resolver, replace=True)


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def main(config: DictConfig) -> float | None:
    """Run one job and return its objective to the sweeper.

    On an error a single run exits with the error's status. A job of a sweep raises it instead: an exit would end the
    whole sweep. There any other error is logged and becomes a RunnerError, which a worker process can send back.
    """
    logging.raiseExceptions = False  # a closed terminal or a full disk under the log is no reason to stop training
    try:
        return _run(config)
    except RunnerError as error:
        if HydraConfig.get().mode is RunMode.RUN:
            if str(error):  # empty if another process of the run prints it
                with suppress(OSError):  # the terminal was closed
                    print(error, file=sys.stderr)
            sys.exit(error.status)
        if isinstance(error, Interrupted) and signals.SWEEP_VARIABLE in os.environ:
            try:
                signals.call_previous_handlers()
            except Exception as cause:  # not queued again by the cluster; the sweep starts the job again
                log.warning("not queued again: %s: %s", type(cause).__name__, cause)
        failure = error
    except Exception as error:
        if HydraConfig.get().mode is RunMode.RUN:
            raise
        log.error("%s", "failed\n" + traceback.format_exc().rstrip())
        failure = RunnerError(f"{type(error).__name__}: {error}")
    # Without the frames of this and of other errors: they keep the model, and a sweep keeps the error.
    failure.__traceback__ = failure.__context__ = failure.__cause__ = None
    raise failure


def _escaped(record: logging.LogRecord) -> bool:
    """Escape our own lines, which may quote a run directory; lines of a user's code may have colours."""
    with suppress(TypeError, ValueError):  # a user's arguments do not fit the message, which logging reports
        record.msg, record.args = printable(record.getMessage()), None
    return True


def _run(config: DictConfig) -> float | None:
    signals.install()  # again, because a launcher may have started this process without ``__main__``
    with join_team(world(), timeout=config.runtime.timeout, patience=config.checkpoint.max_unsaved) as team:
        if config.run.dry:
            _dry_run(config, team)
            return None
        spec = run_spec(config)
        name, root = os.environ.get(signals.SWEEP_VARIABLE), open_location(spec.directory.root, spec.directory.options)
        notify(observers, "on_command", spec.directory)
        with signals.StopRequest(root, name).obey() if name else nullcontext():
            signals.raise_if_received("during start-up, nothing to commit")
            return _run_to_completion(spec, config, team)


def _dry_run(config: DictConfig, team: Team) -> None:
    """Run two attempts in a temporary folder, and log a summary of both."""
    experiment = _import_experiment()
    from runner.callbacks.dry import STEPS, DryRun

    schema.check(config)
    folder = Path(on_rank_zero(team.comm, _temporary))
    on_all_ranks(team.comm, lambda: _require_folder(folder))
    changes = {"root": str(folder), "storage_options": {}, "name": "dry", "on_drift": "refuse", "on_conflict": "fail"}
    config = OmegaConf.merge(config, {"run": changes})  # type: ignore[assignment]
    config.observers = {}
    dry = DryRun()
    try:
        with observed_by(dry):
            for _ in ("to be resumed", "resumed"):
                spec = _open_on_rank_zero(run_spec(config), team.comm)
                try:
                    experiment.run(spec, config, team)
                except Interrupted:
                    if team.stop:
                        raise
        lines = [
            *dry.summary(folder),
            f"dry      {STEPS} steps, a save, a resume and an evaluation worked; nothing is kept",
        ]
    finally:
        on_rank_zero(team.comm, lambda: shutil.rmtree(folder, ignore_errors=True))
    for line in lines:
        log.info("%s", line)


@cache
def _import_experiment() -> Any:
    """``runner.experiment``, with torch. To look for garbage among all that modules define, again and again while more
    are imported, would take a sixth of the time to the first step.
    """
    enabled = gc.isenabled()
    gc.disable()
    from runner import experiment

    gc.freeze()
    if enabled:  # ``verify`` may have disabled it
        gc.enable()
    return experiment


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError("run.dry=true works in a temporary folder: start all its processes on one machine")


@cache
def _temporary() -> str:
    """A folder of this process, removed at its end, for a run that is not kept and for Hydra's own files."""
    folder = tempfile.mkdtemp(prefix="runner-dry-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run_to_completion(spec: RunSpec, config: DictConfig, team: Team, /) -> float | None:
    """Train until the run is finished, unless it is already; returns its objective."""
    run = _open_on_rank_zero(spec, team.comm)
    result = run.result
    if result is None:
        try:
            result = _import_experiment().run(run, config, team)
        except ChangedMeanwhile:
            return _run_to_completion(spec, config, team)
    _log_result(run, result, curves=config.metrics.writers.get("tensorboard") is not None)
    objective: float | None = (result.get("objective") or {}).get("value")
    return objective


def _open_on_rank_zero(spec: RunSpec, comm: Communicator) -> RunSpec:
    """The run as rank 0 opens it. Other ranks take over its state, because the storage may change between two reads.

    While the command must wait for another process, all ranks look again together, so that none runs into a timeout.
    """
    runs: list[RunSpec] = []  # on rank 0

    def open_unless_in_use() -> dict[str, Any] | None:
        if must_wait(spec.directory, spec.on_conflict):
            signals.raise_if_received("while waiting for the run")
            return None
        runs.append(open_run(spec))
        return {"variant": runs[0].directory.variant, "result": runs[0].result}

    while (state := on_rank_zero(comm, open_unless_in_use)) is None:
        time.sleep(_POLL_SECONDS)
    if runs:
        return runs[0]
    own = spec.directory
    directory = RunDirectory.under(own.root, own.experiment, state["variant"], own.options)
    parent = spec.parent if directory.variant == own.variant else Parent.forked(own)
    return replace(spec, directory=directory, parent=parent, result=state["result"])


def _log_result(spec: RunSpec, result: dict[str, Any], *, curves: bool) -> None:
    metrics = numbers_text(result["metrics"])
    log.info("finished step %d (%s)%s", result["step"], result.get("reason"), metrics and f", {metrics}")
    objective = result.get("objective")
    if objective and objective.get("value") is not None:
        log.info("best     %s %.4g at step %s", objective.get("metric"), objective["value"], objective.get("step"))
    url = spec.directory.location.url
    if not is_remote(url):
        url = os.path.relpath(url, to_absolute_path("."))  # hydra.job.chdir may have changed the working directory
    if curves:
        log.info("curves   tensorboard --logdir %s", shlex.quote(url))
    notify(observers, "on_finish", spec.directory, result)


def run_spec(config: DictConfig) -> RunSpec:
    """The run of ``config``, which must be the configuration that HydraConfig holds. Reads no run directory.

    Raises ConfigError for values that cannot work.
    """
    schema.check(config)
    hydra, run = HydraConfig.get(), config.run
    _check_choices(hydra)
    overrides = _unresolved(hydra.overrides.task)
    experiment, name = hydra.runtime.choices["experiment"], _run_name(config, hydra)
    directory = RunDirectory.under(absolute_root(config), experiment, name, storage_options(config))
    parent, command = _parent(config), _command(hydra, overrides)
    return RunSpec(directory, identity(config), command, overrides, parent, run.on_drift, run.on_conflict)


def _check_choices(hydra: HydraConf) -> None:
    """Raise ConfigError if an option of the package was chosen, and the user has a file of the same name, which Hydra
    passes over without a word; and for several experiments in one run.
    """
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    if "experiment" not in hydra.runtime.choices:
        raise ConfigError("experiment is the name of one experiment; a sweep over several is -m experiment=a,b")
    options = {f"{group.partition('@')[0]}/{name}": f"{group}={name}" for group, name in hydra.runtime.choices.items()}
    for path, option in {**options, str(hydra.job.config_name): "config.yaml"}.items():
        files = [*dict.fromkeys(file.resolve() for folder in folders if (file := folder / f"{path}.yaml").is_file())]
        if len(files) > 1 and files[0].is_relative_to(CONFIGS.resolve()):
            raise ConfigError(f"{option} is an option of the package, {files[0]}; rename your own, {files[1]}")


def absolute_root(config: DictConfig) -> str:
    """The folder or URL under which the runs are."""
    root: str = config.run.root
    # hydra.job.chdir may have moved this process.
    return root if is_remote(root) else to_absolute_path(local_root(root))


def storage_options(config: DictConfig) -> dict[str, Any]:
    """The options of fsspec for the root."""
    return OmegaConf.to_container(config.run.storage_options, resolve=True)  # type: ignore[return-value]


def _run_name(config: DictConfig, hydra: HydraConf) -> str:
    """The name of the run's directory: ``run.name``, or one made from the overrides as given. Raises ConfigError."""
    if config.run.name is not None:
        if not is_name(config.run.name):
            message = "use letters, digits and . _ = , + ~ - only; it becomes a directory"
            raise ConfigError(f"run.name={config.run.name}: {message}")
        return str(config.run.name)
    return variant(_unresolved(hydra.overrides.task))


def _command(hydra: HydraConf, overrides: list[str]) -> str:
    """A command that starts this run alone, to be pasted into a shell."""
    sources = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    here = to_absolute_path(".")
    folders = [f"--config-dir={os.path.relpath(path.removeprefix('file://'), here)}" for path in sources]
    search = [word for word in _unresolved(hydra.overrides.hydra) if word.startswith("hydra.searchpath=")]
    name, console = Path(sys.executable).name, Path(sys.argv[0])
    python = name if shutil.which(name) == sys.executable else sys.executable
    program = [python, "-m", "runner"]
    if console.name == "hydra-runner":
        program = [console.name if shutil.which(console.name) == str(console) else str(console)]
    return shlex.join([*program, *folders, *search, *overrides])


def _unresolved(overrides: Any) -> list[str]:
    """The overrides with ``${oc.env:NAME}`` as typed: they are stored and shown, and the variable may be a secret."""
    return OmegaConf.to_container(overrides, resolve=False)  # type: ignore[return-value]


def _parent(config: DictConfig) -> Parent | None:
    run = config.run
    if run.parent is None:
        return None
    source = CheckpointRef.parse(run.parent if is_remote(run.parent) else to_absolute_path(local_root(run.parent)))
    same_store = protocol(run.root) in ("file", protocol(run.parent))
    options = storage_options(config) if same_store else None
    return Parent(source, run.inherit.name, str(source.under(absolute_root(config))), run.load.name, options)


def _directory(*, _root_: DictConfig) -> str:
    """The folder of Hydra's own files: the run directory, or, for a remote one, a local folder named after it."""
    return _without_links(_root_, *_local_folder(_root_))


def _variant(*, _root_: DictConfig) -> str:
    name, (root, experiment) = _run_name(_root_, _root_.hydra), _local_folder(_root_)
    _without_links(_root_, root, f"{experiment}/{name}")
    return name


def warm_up() -> None:
    """Compose a configuration, so that commands in processes forked from this one do it in half of the time: Hydra
    keeps the plugins that it found, and what its parser has learnt.
    """
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra.compose("config", overrides=["experiment=smoke", "~task", "+task={_target_:a.B,c:[1,d]}"])


def _local_folder(config: DictConfig) -> tuple[str, str]:
    """The local root, and the folder of the experiment below it, which is empty for a sweep over experiments."""
    refuse_secrets(config)  # Hydra asks for the folder before it writes anything
    root = _temporary() if config.run.dry else config.run.root
    return local_folder(root), OmegaConf.select(config, "hydra.runtime.choices.experiment") or ""


def _without_links(config: DictConfig, root: str, below: str) -> str:
    """The folder, in which Hydra is about to write; raises ConfigError for a link, because Hydra would follow it."""
    refuse_links(root, below, log_file=f"{OmegaConf.select(config, 'hydra.job.name') or 'runner'}.log")
    return f"{root}/{below}" if below else root


def _total_steps(*, _root_: DictConfig) -> int | None:
    """``trainer.max_steps``; None if ``trainer.max_epochs`` may end the run earlier, which depends on the data."""
    return None if _root_.trainer.max_epochs is not None else _root_.trainer.max_steps


def _hydra_files(*, _root_: DictConfig) -> str | None:
    """The name of Hydra's folder for the configuration; None on ranks above 0, and for a run that is read-only, of
    which the result is to be printed.
    """
    output = OmegaConf.select(_root_, "hydra.runtime.output_dir", throw_on_missing=False)
    if output:
        _without_links(_root_, output, "")  # also where a command gives a folder of its own: hydra.run.dir=...
    read_only = output and os.path.isdir(output) and not os.access(output, os.W_OK)
    return None if world().rank or read_only else ".hydra"


register()

"""The Hydra application: one composed configuration in, the objective out.

torch is imported only for a run that has something left to train.
"""

import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from runner import signals
from runner.config import schema
from runner.config.checks import check, literal_secret
from runner.config.identity import identity, is_name, variant
from runner.distributed import world
from runner.errors import ConfigError, RunnerError
from runner.run.directory import RunDirectory
from runner.run.opening import Opening, open_run, wait_until_free
from runner.run.parent import Parent, Which
from runner.storage.location import is_remote, local_root
from runner.sweep import optuna

log = logging.getLogger("runner")

_PACKAGE = Path(__file__).parent
# In a wheel the configurations lie inside the package, in a clone beside it.
CONFIGS = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())
_LOCAL_FILES = "outputs/remote"
_USER = re.compile(r"(?<=://)[^/]*@")
_UNSAFE = re.compile(r"[^A-Za-z0-9._/=,+~-]|(?<=/)/|\.\.")


def register() -> None:
    """Make schema, resolvers and studies known to Hydra; comes before composing."""
    schema.register()
    optuna.register()
    # One directory for one command, alone or as a job of a sweep: Hydra's own files go where the run is.
    OmegaConf.register_new_resolver("runner.directory", _directory, replace=True)
    OmegaConf.register_new_resolver("runner.variant", _variant, replace=True)
    OmegaConf.register_new_resolver("runner.hydra_files", _hydra_files, replace=True)


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def main(config: DictConfig) -> float | None:
    """Run one job; returns its objective, which is what a sweeper gets.

    An error ends a single run with its exit status; in a sweep it is raised, because leaving the process would end
    the sweep.
    """
    logging.raiseExceptions = False  # a closed terminal or a full disk under the log is no reason to stop training
    try:
        return _job(config)
    except RunnerError as error:
        if HydraConfig.get().mode is not RunMode.RUN:
            raise
        print(error, file=sys.stderr)
        sys.exit(error.status)


def _job(config: DictConfig) -> float | None:
    signals.raise_if_received("during start-up, nothing to commit")
    world()
    check(config)
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    root = config.run.root
    if not is_remote(root):
        root = to_absolute_path(local_root(root))  # hydra.job.chdir may have moved this process
    directory = RunDirectory.under(
        root,
        hydra_config.runtime.choices["experiment"],
        _name(config, overrides),
        options=OmegaConf.to_container(config.run.storage_options, resolve=True),  # type: ignore[arg-type]
    )
    if config.run.on_conflict is schema.OnConflict.wait:
        wait_until_free(directory, lambda: signals.raise_if_received("while waiting for the run"))
    command = shlex.join([Path(sys.executable).name, "-m", "runner", *overrides])
    opening = open_run(
        directory, identity(config), on_drift=config.run.on_drift.name, command=command, parent=_parent(config.run)
    )
    result = opening.result
    if result is None:
        from runner import experiment  # imports torch

        result = experiment.run(opening, config, overrides=overrides)  # type: ignore[arg-type]
    _conclude(opening, result)
    goal: float | None = (result.get("objective") or {}).get("value")
    return goal


def _parent(run: DictConfig) -> Parent | None:
    if run.parent is None:
        return None
    which = Which.parse(run.parent if is_remote(run.parent) else to_absolute_path(local_root(run.parent)))
    return Parent(which, run.inherit.name, asked=str(which))


def _conclude(opening: Opening, result: dict[str, Any]) -> None:
    metrics = {name: value for name, value in result["metrics"].items() if value is not None}
    log.info(
        "finished step %d (%s)%s",
        result["step"],
        result["reason"],
        "".join(f", {n} {v:.4g}" for n, v in metrics.items()),
    )
    goal = result.get("objective")
    if goal and goal["value"] is not None:
        log.info("best     %s %.4g at step %d", goal["metric"], goal["value"], goal["step"])
    url = opening.directory.location.url
    if not is_remote(url):
        url = os.path.relpath(url)
    log.info("curves   tensorboard --logdir %s", shlex.quote(url))


def _directory(*, _root_: DictConfig) -> str:
    """Where Hydra puts its own files: into the run directory, or beside other runs when that is remote."""
    root = _root_.run.root
    if is_remote(root):
        root = f"{_LOCAL_FILES}/{_UNSAFE.sub('_', _USER.sub('', root).replace('://', '/'))}"
    return f"{local_root(root)}/{_root_.hydra.runtime.choices.experiment}"


def _hydra_files(*, _root_: DictConfig) -> str | None:
    """Hydra's folder for the configuration; none where that would write a secret."""
    has_secret = literal_secret(_root_.run.storage_options) is not None or re.search("://[^/]*:[^/]*@", _root_.run.root)
    return None if has_secret else ".hydra"


def _variant(*, _root_: DictConfig) -> str:
    return _name(_root_, list(_root_.hydra.overrides.task))


def _name(config: DictConfig, overrides: list[str]) -> str:
    name = config.run.name
    if name is None:
        return variant(overrides)
    if not is_name(name):
        raise ConfigError(f"run.name={name}: use letters, digits and . _ = , + ~ - only; it becomes a directory")
    return str(name)

"""From a composed configuration to the run that it names."""

import os
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.checks import check
from runner.config.identity import identity, is_name, variant
from runner.config.schema import OnConflict
from runner.errors import ConfigError
from runner.run.directory import RunDirectory
from runner.run.opening import OpenedRun, must_wait, open_run
from runner.run.parent import CheckpointRef, Parent
from runner.storage.location import is_remote, local_root, protocol


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The run that a command asks for: its directory, what it computes, and the parent that it starts from."""

    directory: RunDirectory
    identity: dict[str, Any]
    overrides: list[str]
    parent: Parent | None
    on_drift: str
    command: str  # that starts this run alone, for messages
    on_conflict: OnConflict = OnConflict.fail

    @classmethod
    def of(cls, config: DictConfig) -> "RunSpec":
        """The job of ``config``, which must be the configuration that HydraConfig holds. Reads no run directory.

        Raises ConfigError for values that cannot work.
        """
        check(config)
        about = HydraConfig.get()
        overrides = _as_given(about.overrides.task)
        experiment, name = about.runtime.choices["experiment"], run_name(config, about)
        directory = RunDirectory.under(absolute_root(config), experiment, name, storage_options(config))
        return cls(
            directory,
            identity(config),
            overrides,
            _parent(config),
            config.run.on_drift.name,
            _command(about, overrides),
            config.run.on_conflict,
        )

    def must_wait(self) -> bool:
        """Whether another process works on the run, and this command is to wait for it."""
        return must_wait(self.directory, self.on_conflict)

    def open(self) -> OpenedRun:
        """Look at the run directory; see ``open_run``."""
        return open_run(
            self.directory,
            self.identity,
            on_drift=self.on_drift,
            command=self.command,
            parent=self.parent,
            on_conflict=self.on_conflict,
        )

    def follow(self, variant: str, result: dict[str, Any] | None) -> OpenedRun:
        """The opened run on ranks above 0, as rank 0 opened it; rank 0 alone writes the run's records."""
        own = self.directory
        directory = RunDirectory.under(own.root, own.experiment, variant, own.options)
        parent = self.parent if variant == own.variant else Parent.forked(own)
        return OpenedRun(directory, self.identity, "", self.on_conflict, parent=parent, result=result)


def absolute_root(config: DictConfig) -> str:
    """The folder or URL under which the runs are."""
    root: str = config.run.root
    # hydra.job.chdir may have moved this process.
    return root if is_remote(root) else to_absolute_path(local_root(root))


def storage_options(config: DictConfig) -> dict[str, Any]:
    """What fsspec needs for the root."""
    return OmegaConf.to_container(config.run.storage_options, resolve=True)  # type: ignore[return-value]


def run_name(config: DictConfig, about: HydraConf) -> str:
    """The name of the run's directory: ``run.name``, or one made from the overrides as given. Raises ConfigError."""
    name = config.run.name
    if name is None:
        return _older_name(config, about) or variant(_as_given(about.overrides.task))
    if not is_name(name):
        raise ConfigError(f"run.name={name}: use letters, digits and . _ = , + ~ - only; it becomes a directory")
    return str(name)


def _older_name(config: DictConfig, about: HydraConf) -> str | None:
    """The name with the values of ``${oc.env:NAME}`` in it, if an older version made a run of that name."""
    names = [variant(_as_given(about.overrides.task))]
    with suppress(OmegaConfBaseException):  # a variable is not there; who uses it says so
        names.append(variant([*about.overrides.task]))
    root, experiment, options = absolute_root(config), about.runtime.choices["experiment"], storage_options(config)
    if len({*names}) == 2:
        for name in names:
            if RunDirectory.under(root, experiment, name, options).record() is not None:
                return name
    return None


def _command(about: HydraConf, overrides: list[str]) -> str:
    given = [source.path for source in about.runtime.config_sources if source.provider == "command-line"]
    folders = [f"--config-dir={os.path.relpath(path.removeprefix('file://'), to_absolute_path('.'))}" for path in given]
    searched = [given for given in _as_given(about.overrides.hydra) if given.startswith("hydra.searchpath=")]
    name = Path(sys.executable).name
    python = name if shutil.which(name) == sys.executable else sys.executable
    return shlex.join([python, "-m", "runner", *folders, *searched, *overrides])


def _as_given(overrides: Any) -> list[str]:
    """With ``${oc.env:NAME}`` as that: they are stored and shown, and what it stands for may be a secret."""
    return OmegaConf.to_container(overrides, resolve=False)  # type: ignore[return-value]


def _parent(config: DictConfig) -> Parent | None:
    run = config.run
    if run.parent is None:
        return None
    which = CheckpointRef.parse(run.parent if is_remote(run.parent) else to_absolute_path(local_root(run.parent)))
    fits = protocol(run.root) in ("file", protocol(run.parent))  # the options of another kind of store do not
    return Parent(
        which, run.inherit.name, str(which.under(absolute_root(config))), storage_options(config) if fits else None
    )

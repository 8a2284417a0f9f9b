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

from runner.config.identity import identity, is_name, variant
from runner.config.schema import OnConflict, check
from runner.errors import ConfigError
from runner.run.directory import RunDirectory
from runner.run.opening import OpenedRun, open_run
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
        """The run of ``config``, which must be the configuration that HydraConfig holds. Reads no run directory.

        Raises ConfigError for values that cannot work.
        """
        check(config)
        hydra = HydraConfig.get()
        overrides = _unresolved(hydra.overrides.task)
        experiment, name, run = hydra.runtime.choices["experiment"], run_name(config, hydra), config.run
        directory = RunDirectory.under(absolute_root(config), experiment, name, storage_options(config))
        parent, command = _parent(config), _command(hydra, overrides)
        return cls(directory, identity(config), overrides, parent, run.on_drift.name, command, run.on_conflict)

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
    """The options of fsspec for the root."""
    return OmegaConf.to_container(config.run.storage_options, resolve=True)  # type: ignore[return-value]


def run_name(config: DictConfig, hydra: HydraConf) -> str:
    """The name of the run's directory: ``run.name``, or one made from the overrides as given. Raises ConfigError."""
    if config.run.name is not None:
        if not is_name(config.run.name):
            message = "use letters, digits and . _ = , + ~ - only; it becomes a directory"
            raise ConfigError(f"run.name={config.run.name}: {message}")
        return str(config.run.name)
    names = [variant(_unresolved(hydra.overrides.task))]
    with suppress(OmegaConfBaseException):  # a variable is not set; the code that uses it says so
        names.append(variant([*hydra.overrides.task]))
    if len({*names}) == 2:  # an older version named runs with the values of ${oc.env:NAME}
        root, experiment, options = absolute_root(config), hydra.runtime.choices["experiment"], storage_options(config)
        for name in names:
            if RunDirectory.under(root, experiment, name, options).record() is not None:
                return name
    return names[0]


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

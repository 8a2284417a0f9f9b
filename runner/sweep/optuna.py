"""Optuna studies that can be killed and run again, on top of Hydra's plugin ``hydra-optuna-sweeper``.

The plugin draws, launches and records trials, and takes every invocation for the first. Here the study continues:

* ``n_trials`` is the total. A trial that was running when the process died is run again, with the parameters that the
  database has for it; these name the run directory, which resumes, or answers at once if it was finished.
* Every draw is seeded by the sampler's seed, the trial's number and the parameter, so a study that was killed is bit
  for bit the study that nobody killed; with ``n_jobs`` above 1 unless the kill came while a batch was recorded.
* A trial that fails, or whose objective is not a finite number, is recorded as FAIL, counts, and is not tried again. An
  error that does not come from the parameters ends the sweep and leaves its trials to the next invocation.

One process of a machine at a time works on a study. Pruning is not possible: the plugin gives a job its parameters and
no trial to report to. optuna itself is imported only for a sweep that uses it.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf

from runner import errors
from runner.config.identity import value_digest, variant
from runner.errors import ConfigError, NonFiniteError, RunInUse, SweepFailed
from runner.hashing import derive
from runner.storage import open_location
from runner.storage.location import is_remote

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

log = logging.getLogger("runner")

_PLUGIN = "hydra_plugins.hydra_optuna_sweeper"
_TARGET = f"{_PLUGIN}.optuna_sweeper.OptunaSweeper"
# Errors that do not come from a trial's parameters.
_NO_FAILED_TRIAL = errors.Interrupted, RunInUse, errors.StorageError, errors.DriftRefused, errors.NoLoadableCheckpoint


@dataclass
class StudyConfig:
    """``hydra.sweeper`` of ``hydra/sweeper=optuna``: the plugin's keys, with defaults for a study that continues."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"optional sampler": "tpe"}])
    _target_: str = _TARGET
    sampler: Any = None  # hydra/sweeper/sampler: tpe, random, cmaes, nsgaii, motpe; default seed: the experiment's
    direction: Any = None  # default: the direction of objective.mode
    storage: str | None = None  # an SQL database as SQLAlchemy's URL; default: optuna.sqlite3 beside the runs
    study_name: str | None = None  # default: made from the experiment, its overrides and the search space
    n_trials: int = 20  # the trials of the study, over all invocations
    n_jobs: int = 1  # trials that are drawn and launched together, knowing nothing of each other
    max_failure_rate: float = 1.0  # the sweep ends if more than this share of the trials launched together fails
    params: dict[str, Any] | None = None  # a search space besides the command line
    search_space: dict[str, Any] | None = None
    custom_search_space: str | None = None


def register() -> None:
    """Let Hydra create studies that continue; call it before Hydra composes a configuration."""
    Plugins.instance().instantiate_sweeper = _instantiate_sweeper  # type: ignore[method-assign]
    # After the plugins have been loaded, in place of the plugin's own configuration.
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=StudyConfig)


def _instantiate_sweeper(*, config: DictConfig, **context: Any) -> Sweeper:
    is_optuna = config.hydra.sweeper is not None and config.hydra.sweeper._target_ == _TARGET
    if is_optuna and not all(map(find_spec, ("hydra_plugins", _PLUGIN))):
        raise ConfigError("hydra/sweeper=optuna needs more packages: pip install 'hydra-runner[optuna]'")
    sweeper = Plugins.instantiate_sweeper(Plugins.instance(), config=config, **context)
    return Study(sweeper, config) if is_optuna else sweeper


class Study(Sweeper):
    """The plugin's sweeper, made to continue with its study."""

    def __init__(self, sweeper: Any, config: DictConfig) -> None:
        self._plugin = sweeper.sweeper
        self._config = config

    def setup(self, **context: Any) -> None:
        """Does nothing: Hydra has set up the plugin's sweeper."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are left. Raises ConfigError, RunInUse, SweepFailed, or an error that ends the sweep."""
        import optuna

        # This class logs the same, without the password that a database's URL may hold.
        optuna.logging.set_verbosity(logging.WARNING)
        logging.getLogger(_PLUGIN).setLevel(logging.WARNING)

        settings, plugin = self._config.hydra.sweeper, self._plugin
        for key in ("n_trials", "n_jobs"):
            if settings[key] < 1:
                raise ConfigError(f"hydra.sweeper.{key}={settings[key]} is too small: at least 1")
        space = [f"{key}={value}" for key, value in (settings.params or {}).items()] + arguments
        plugin.direction, plugin.sampler = _direction(self._config), _Sampler(self._config)
        name = settings.study_name or f"{self._config.hydra.runtime.choices.experiment}/{variant(space)}"
        plugin.study_name, plugin.storage = name, _database(self._config)
        lock = open_location(to_absolute_path(self._config.hydra.sweep.dir)).lock(f"optuna-{value_digest(name)}.lock")
        if lock is None:  # two would record each other's trials
            raise RunInUse(f"study {name}: another process works on it. Run this command again when that has ended")
        try:
            finished = _reopen(plugin, space, self._config)
            log.info("study    %s, %d of %d trials done", name, finished, settings.n_trials)
            plugin.job_idx = finished
            plugin.n_trials = max(0, settings.n_trials - finished)
            self._launcher, plugin.launcher = plugin.launcher, self
            try:
                plugin.sweep(arguments)
            except ValueError:  # the plugin asks for the best trial, and optuna raises if no trial has an objective
                if _trials(plugin, "COMPLETE"):
                    raise
                trials = f"none of the {len(_trials(plugin, 'FAIL'))} trials of study {name} has an objective"
                remedy = "all failed, for the reasons above. Fix these and choose another hydra.sweeper.study_name"
                raise SweepFailed(f"{trials}: {remedy}") from None
        finally:
            lock.release()
        best = optuna.load_study(study_name=name, storage=plugin.storage).best_trial
        parameters = " ".join(f"{key}={value}" for key, value in best.params.items())
        log.info("best     %s %s, trial %d: %s", self._config.objective.metric, best.value, best.number, parameters)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Launch jobs for the plugin. Raises errors that end the sweep, which it would take for failed trials."""
        jobs = [tuple(overrides) for overrides in job_overrides]
        distinct = list(dict.fromkeys(jobs))  # in a small space two trials can be the same run
        returns = dict(zip(distinct, self._launcher.launch(distinct, initial_job_idx=initial_job_idx), strict=True))
        for key, job in returns.items():
            value = job._return_value
            if isinstance(value, _NO_FAILED_TRIAL):
                raise value
            if isinstance(value, BaseException) or not (value is None or math.isfinite(value)):
                # A return that raises, unlike that of ``SweepLauncher``, is a failed trial to the plugin.
                error = value if isinstance(value, BaseException) else NonFiniteError("the run diverged")
                returns[key] = JobReturn(overrides=job.overrides, status=JobStatus.FAILED, _return_value=error)
        return [returns[job] for job in jobs]


class _Sampler:
    """The configured sampler, created again for every trial and every draw with a seed of its own."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config.hydra.sweeper.get("sampler")
        if self._config is None or "seed" not in self._config:
            remedy = "there are tpe, random, cmaes, nsgaii, motpe. A grid is no study: leave hydra/sweeper=optuna out"
            raise ConfigError(f"hydra/sweeper/sampler: no such sampler, or one that cannot be seeded; {remedy}")
        self._seed = config.seed if self._config.seed is None else self._config.seed

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        self._joint = self._seeded(trial.number, "")  # keeps the joint space for sample_relative
        return self._joint.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        return self._joint.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._seeded(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self._joint.after_trial(study, trial, state, values)

    def _seeded(self, number: int, name: str) -> Any:
        return instantiate(self._config, seed=derive("study", self._seed, number, name) % 2**32)


def _direction(config: DictConfig) -> str:
    objective, configured = config.objective, config.hydra.sweeper.direction
    if objective.metric is None:
        raise ConfigError("a study needs one experiment with an objective: set objective.metric, for example val/loss")
    if configured is not None and not isinstance(configured, str):
        raise ConfigError(f"hydra.sweeper.direction={configured}: a run has one objective. Leave the direction out")
    direction = {"min": "minimize", "max": "maximize"}[objective.mode.name]
    if configured not in (None, direction):
        goal = f"objective.mode={objective.mode.name} of {objective.metric}"
        remedy = f"leave the direction out, it is then {direction}"
        raise ConfigError(f"hydra.sweeper.direction={configured} contradicts {goal}: {remedy}")
    return direction


def _database(config: DictConfig) -> "RDBStorage":
    """The database of the study: as configured, or a file beside the runs. Raises ConfigError if it cannot be used."""
    from optuna.storages import RDBStorage

    url, folder = config.hydra.sweeper.storage, Path(config.hydra.sweep.dir)
    if url is None and is_remote(config.run.root):
        remedy = "set hydra.sweeper.storage to, for example, sqlite:////home/me/study.sqlite3 or postgresql://host/name"
        raise ConfigError(f"run.root is remote, and a study needs a database that stays, too: {remedy}")
    folder.mkdir(parents=True, exist_ok=True)  # the plugin writes optimization_results.yaml there, too
    try:
        return RDBStorage(url or f"sqlite:///{folder.resolve()}/optuna.sqlite3")
    except Exception as error:  # drivers, SQLAlchemy and optuna have their own
        where = "" if url is None else f"={errors.redacted(url)}"
        raise ConfigError(f"hydra.sweeper.storage{where} cannot be used: {errors.printable(error)}") from error


def _reopen(plugin: Any, space: list[str], config: DictConfig) -> int:
    """Create the study, or queue the trials that a dead process left unfinished; returns the number of finished trials.
    Raises ConfigError for an unusable search space, and for a study of another direction, other keys or distributions.
    """
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
    from optuna import create_study
    from optuna.distributions import check_distribution_compatibility
    from optuna.trial import TrialState

    name, storage, another = plugin.study_name, plugin.storage, "Choose another hydra.sweeper.study_name"
    try:
        parameters, _ = create_params_from_overrides(space)
    except (ValueError, AssertionError, NotImplementedError) as error:
        reason = str(error) or "choice(), range() and interval() can be searched, glob() cannot"
        raise ConfigError(f"not a search space of a study: {' '.join(space)}\n{reason}") from error
    if config.run.name and not OmegaConf.is_interpolation(config.run, "name") and "run.name" not in parameters:
        raise ConfigError(f"all trials would be the run run.name={config.run.name}: leave run.name out")
    try:
        create_study(study_name=name, storage=storage, direction=plugin.direction, load_if_exists=True)
    except ValueError as error:
        raise ConfigError(f"study {name}: {error}. {another}") from error
    for trial in _trials(plugin):
        differing = trial.params.keys() ^ parameters.keys()
        if trial.state is TrialState.COMPLETE and differing and not plugin.custom_search_space_extender:
            keys = f"{', '.join(trial.params)}, this command does {', '.join(parameters)}"
            raise ConfigError(f"study {name} has searched {keys}. {another}")
        for key in trial.distributions.keys() & parameters.keys():
            before, now = trial.distributions[key], parameters[key]
            try:
                check_distribution_compatibility(before, now)
            except ValueError as error:
                spaces = f"{before}, this command does in {now}, and no study can have both"
                raise ConfigError(f"study {name} has searched {key} in {spaces}. {another}") from error
    for trial in _trials(plugin, "RUNNING"):
        # A trial of another search space, as after a misspelt key, would be launched with its wrong keys forever.
        fits = plugin.custom_search_space_extender or trial.params.keys() <= parameters.keys()
        storage.set_trial_state(trial._trial_id, TrialState.WAITING if fits else TrialState.FAIL)
    return len(_trials(plugin, "COMPLETE", "FAIL", "PRUNED"))


def _trials(plugin: Any, *states: str) -> list[Any]:
    from optuna.trial import TrialState

    study = plugin.storage.get_study_id_from_name(plugin.study_name)
    wanted = tuple(TrialState[state] for state in states) or None
    return plugin.storage.get_all_trials(study, states=wanted)  # type: ignore[no-any-return]

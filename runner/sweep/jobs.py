"""The jobs of a sweep: composed once, and two that name one run told apart."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from runner import signals
from runner.errors import ConfigError, RunnerError
from runner.job import Job
from runner.run import drift
from runner.sweep.survey import Overrides

log = logging.getLogger("runner")


class Jobs:
    """Hydra's config loader, which remembers the job of every configuration that it composes.

    A sweeper composes all configurations to validate them. To compose takes longer than to read a finished run's
    result, so it is not done twice.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._known: dict[Overrides, Job | RunnerError] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """See ``ConfigLoader``."""
        config = self._loader.load_sweep_config(master_config, sweep_overrides)
        with _hydra_config(config):
            try:
                self._known[tuple(sweep_overrides)] = Job.of(config)
            except RunnerError as error:
                self._known[tuple(sweep_overrides)] = error
        return config

    def job(self, overrides: Overrides) -> Job | RunnerError:
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
        self._first: dict[str, tuple[Overrides, Job]] = {}

    def distinct(
        self, given: Sequence[Overrides], jobs: Mapping[Overrides, Job | RunnerError]
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
    def _require_same(first: Overrides, known: Job, each: Overrides, job: Job) -> None:
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

"""The command that sends the metrics of a run to a service outside later. A service of ``conf/metrics`` needs no more
than its name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from runner.app import CONFIGS
from runner.errors import ConfigError, RunnerError
from runner.metrics import service
from runner.metrics.writer import WriterContext
from runner.restore import read
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts
from runner.runs.listing import setting

_STATUS = {"complete": "finished", "diverged": "failed", "superseded": "running", "unknown": "running"}


def push(
    run: str, name: str, settings: Sequence[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Send the committed metrics that the service of the writer ``name`` does not have yet. ``settings``: values
    for ``metrics.writers.NAME`` of a configuration, as ``KEY=VALUE``.

    Raises ConfigError, RunInUse while a process of this machine sends them, and RunnerError for an unreachable service.
    """
    options = {path.stem: path for path in CONFIGS.glob("metrics/*.yaml")}
    defaults: Any = OmegaConf.to_container(OmegaConf.load(options[name])) if name in options else {}
    arguments = {**defaults.get("writers", {}).get(name, {}), **dict(map(setting, settings))}
    target = arguments.pop("_target_", None)
    if not isinstance(target, str):
        raise ConfigError(f"give _target_=... for {name}; known by name alone: {', '.join(sorted(options))}")
    directory = RunDirectory.at(run, storage_options)
    facts = RunFacts(directory)
    checkpoint, _ = read(directory, None, lambda _: None)
    own, number = str(facts.record.get("id")), facts.newest.number if facts.newest else 0
    names = (directory.experiment, directory.name)
    context = WriterContext(directory.location, *names, facts.identity, number, checkpoint.step, id=own)
    state = facts.summary().state
    try:
        writer = service.make(target, context, arguments)
        count = service.push(name, writer, checkpoint.facts.get("metrics") or {}, _STATUS.get(state, state))
    except RunnerError:
        raise
    except Exception as error:
        raise RunnerError(f"{name}: {type(error).__name__}: {error}. The same command sends what is missing") from error
    return {"run": directory.location.url, "writer": name, "step": checkpoint.step, "sent": count}

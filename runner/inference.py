"""The model and the task of a run with the weights of a checkpoint, outside of training: on the CPU, in evaluation
mode, with the random generators as they were.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from omegaconf import OmegaConf
from torch import nn

from runner.build import build_part
from runner.checkpoint.checkpoint import Checkpoint
from runner.checkpoint.structure import Structure
from runner.errors import ConfigError, StateError
from runner.names import saved_name
from runner.restore import evaluated_weights, read
from runner.rng import temporary_seed
from runner.run_facts import RunFacts
from runner.task import Task

T = TypeVar("T")


def load_model(facts: RunFacts, which: int | str | None) -> nn.Module:
    """The model with its evaluated weights, which are the averaged ones if there are any.

    ``which``: a step, ``"best"`` by the objective, or ``"last"``; None: the best, or the last without an objective.
    Raises ConfigError for a step that is not kept, NoLoadableCheckpoint, and StateError for a model that the code
    builds differently now.
    """
    checkpoint, weights = _read(facts, which, evaluated_weights)
    model: nn.Module = rebuild(facts, "model").cpu()
    resized = checkpoint.facts.get("structure", {}).get("buffers", {})
    buffers = {name.removeprefix("module.") for names in resized.values() for name in names}
    Structure({"model": model}, None, partial(rebuild, facts, "model")).resize("model", buffers, weights)
    live = {saved_name(name): name for name in model.state_dict()}
    try:
        model.load_state_dict({live.get(name, name): value for name, value in weights.items()})
    except Exception as error:  # a user's code may load it
        url = facts.directory.location.url
        raise StateError(
            f"the weights of step {checkpoint.step} of {url} do not fit the model as it is built now: {error}\n"
            f"python -m runner.runs show --code says what code the run was made with"
        ) from error
    return model.eval()


def load_task(facts: RunFacts, which: int | str | None) -> Task:
    """The task with the state that it had at a checkpoint; ``which`` as for ``load_model``."""
    task: Task = rebuild(facts, "task")
    if hasattr(task, "load_state_dict"):
        _, state = _read(facts, which, lambda each: each.load("task") if "task" in each.parts else None)
        if state is not None:
            task.load_state_dict(state)
    return task


def rebuild(facts: RunFacts, key: str) -> Any:
    """The object under a key of the configuration, newly built. Raises ConfigError if that is not possible."""
    with temporary_seed(0):
        return build_part(OmegaConf.create(facts.identity), key)


def _read(facts: RunFacts, which: int | str | None, take: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    if which is None and (facts.identity.get("objective") or {}).get("metric"):
        with suppress(ConfigError):  # nothing was evaluated yet
            return read(facts.directory, "best", take)
    return read(facts.directory, None if which == "last" else which, take)

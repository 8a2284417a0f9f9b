"""One pass over held-out data: exact means, and no trace in the training state."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from runner import signals
from runner.data.held_out import EvaluationData
from runner.rng import isolated
from runner.task import Task


class EvaluationInterrupted(Exception):
    """A stop signal arrived; the evaluation will be made after the resume."""


def evaluate(
    task: Task, model: nn.Module, data: EvaluationData, *, key: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> Mapping[str, float | str]:
    """The task's report over all of ``data``: means weighted by batch size, summed in double precision.

    Runs without gradients, in evaluation mode and under the random seed ``key``. Raises EvaluationInterrupted.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with isolated(key), torch.no_grad(), autocast():
            return task.evaluation_end(model, _means(task, model, data))
    finally:
        for module, mode in modes.items():  # one by one: a part that the user froze stays frozen
            module.training = mode


def _means(task: Task, model: nn.Module, data: EvaluationData) -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    samples = 0
    for count, batch in data:
        if signals.received():
            raise EvaluationInterrupted
        found = task.evaluation_step(model, batch)
        for name, value in found.items() if count else ():
            weighted = value.detach().double() * count
            sums[name] = sums[name] + weighted if name in sums else weighted
        samples += count
    return {name: value.item() / samples for name, value in sums.items()}

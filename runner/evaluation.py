"""One pass over held-out data: exact means, and no trace in the training state."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from runner import signals
from runner.data.held_out import EvaluationData
from runner.distributed.team import Team
from runner.errors import TaskError
from runner.rng import isolated
from runner.task import Task, checked

_SAMPLES = ""  # no metric has this name


class EvaluationInterrupted(Exception):
    """A stop signal arrived during the evaluation; the resumed run repeats it."""


def evaluate(
    task: Task,
    model: nn.Module,
    data: EvaluationData,
    *,
    key: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    team: Team,
) -> Mapping[str, float | str]:
    """The task's report over all of ``data``: means weighted by batch size, summed in double precision. The batches are
    divided among the processes of the team.

    Runs without gradients, in evaluation mode and under the random seed ``key``. Raises EvaluationInterrupted.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with isolated(key), torch.no_grad(), autocast(), signals.at_once(team.world.size == 1):
            told = _checked(task.evaluation_end(model, _means(task, model, data, team)), type(task).__name__)
            report: Mapping[str, float | str] = team.ranks.broadcast(told)
            return report
    except signals.Stopped:
        if team.world.size > 1:
            raise
        raise EvaluationInterrupted from None
    finally:
        for module, mode in modes.items():  # one by one: a part that the user froze stays frozen
            module.training = mode


def _means(task: Task, model: nn.Module, data: EvaluationData, team: Team) -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    samples = 0
    for count, batch in data:
        if team.poll():
            raise EvaluationInterrupted
        found = checked(task.evaluation_step(model, batch), f"{type(task).__name__}.evaluation_step", loss=False)
        for name, value in found.items():
            weighted = value.detach().double() * count if count else torch.zeros_like(value, dtype=torch.double)
            sums[name] = sums[name] + weighted if name in sums else weighted
        samples += count
    nothing = torch.zeros((), dtype=torch.double, device=data.device)
    shares = {name: sums.get(name, nothing) for name in team.union([*sums])}
    totals = team.added({**shares, _SAMPLES: nothing + samples})
    return {name: value.item() / totals[_SAMPLES].item() for name, value in totals.items() if name != _SAMPLES}


def _checked(report: Any, task: str) -> Mapping[str, float | str]:
    values = report.values() if isinstance(report, Mapping) else [report]
    wrong = [value for value in values if not isinstance(value, int | float | str)]
    if wrong:
        raise TaskError(
            f"{task}.evaluation_end returned a {type(wrong[0]).__name__}; expected a dict of numbers and texts, as in "
            "{**metrics, 'perplexity': math.exp(metrics['loss'])}"
        )
    found: Mapping[str, float | str] = report
    return found

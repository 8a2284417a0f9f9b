"""One pass over held-out data: exact means, and no trace in the training state."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from runner import signals
from runner.activity import doing
from runner.checkpoint.encoding import decode, encode
from runner.checkpoint.sharding import is_distributed, local
from runner.data.evaluation_data import EvaluationData
from runner.distributed.team import Team
from runner.errors import TaskError
from runner.modes import evaluation_mode
from runner.rng import seed_all, temporary_seed
from runner.task import Task, check_metrics

_SAMPLES = ""  # no metric has this name
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes
_APART = (
    "What a task adds up by itself is of the batches of its own process. Return from evaluation_step what can be "
    "averaged over samples (shares of hits and misses, say), and make the rest of the means in evaluation_end"
)


class EvaluationInterrupted(Exception):
    """A stop signal arrived during the evaluation; the resumed run repeats it."""


@doing("ends evaluation")
def evaluate(
    task: Task,
    model: nn.Module,
    data: EvaluationData,
    *,
    key: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    team: Team,
    trained: nn.Module | None = None,
) -> Mapping[str, float | str]:
    """The task's report over all of ``data``: means weighted by batch size, summed in double precision. The batches are
    divided among the processes of the team.

    Runs without gradients, in evaluation mode and under the random seed ``key``. Raises EvaluationInterrupted, and then
    buffers, also those of the model that is ``trained``, and the task's memory are as they were before: the resumed
    run repeats it.
    """
    before = _Before([*dict.fromkeys([model, trained or model])], task)
    try:
        with evaluation_mode(model), temporary_seed(key), torch.no_grad(), autocast():
            means = _means(task, model, data, team, before)
            if team.world.size > 1:  # those who had another batch may have drawn other numbers
                seed_all(key)
            report = _checked(task.evaluation_end(model, means), type(task).__name__)
    except signals.Stopped:
        if team.world.size > 1 or not before.restored(team):
            raise
        raise EvaluationInterrupted from None
    return same_for_all(report, team, f"{type(task).__name__}.evaluation_end", _APART)


def same_for_all(report: Mapping[str, float | str], team: Team, whose: str, why: str) -> Mapping[str, float | str]:
    """The report, which is the same in all processes. Raises TaskError in all of them where it is not."""
    first = team.comm.broadcast(dict(report))
    differs = json.dumps(first, sort_keys=True) != json.dumps(report, sort_keys=True)
    if not team.sum_tensors({"": torch.tensor(float(differs))})[""]:
        return report
    every = team.comm.broadcast(team.comm.gather(dict(report)))
    texts = [{name: json.dumps(value) for name, value in one.items()} for one in every]
    name = min(name for one in texts for name in one if any(other.get(name) != one[name] for other in texts))
    values = ", ".join(f"{one.get(name, 'nothing')} on rank {rank}" for rank, one in enumerate(every))
    error = TaskError(f"{whose} reports {name!r} as {values}. {why}")
    error.agreed = True
    raise error


@doing("evaluates")
def _means(task: Task, model: nn.Module, data: EvaluationData, team: Team, before: "_Before") -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    samples = 0
    batches = iter(data)
    while True:
        if team.poll() and before.restored(team):
            raise EvaluationInterrupted
        # A process alone may break off the wait for a batch at once, unless only the end of the evaluation helps.
        with signals.at_once(team.world.size == 1 and not before.lost):
            if (item := next(batches, None)) is None:
                break
        count, batch = item
        found = check_metrics(task.evaluation_step(model, batch), f"{type(task).__name__}.evaluation_step", loss=False)
        for name, value in found.items():
            weighted = value.detach().double() * count if count else torch.zeros_like(value, dtype=torch.double)
            sums[name] = sums[name] + weighted if name in sums else weighted
        samples += count
    nothing = torch.zeros((), dtype=torch.double, device=data.device)
    shares = {name: sums.get(name, nothing) for name in team.union([*sums])}
    totals = team.sum_tensors({**shares, _SAMPLES: nothing + samples})
    return {name: value.item() / totals[_SAMPLES].item() for name, value in totals.items() if name != _SAMPLES}


class _Before:
    """What an evaluation may change in passing, as it was before: the buffers and extra states of models, and what the
    task remembers. Weights are not copied, but looked at: an evaluation that changes these (it may swap in others)
    cannot be taken back, and goes on to its end.
    """

    def __init__(self, models: Sequence[nn.Module], task: Task) -> None:
        self._task: Any = task if hasattr(task, "state_dict") and hasattr(task, "load_state_dict") else None
        modules = [module for model in models for module in model.modules()]
        self._buffers = [(one, {n: (b, _copy(one, n)) for n, b in one._buffers.items()}) for one in modules]
        own = [one for one in modules if type(one).get_extra_state is not nn.Module.get_extra_state]
        self._extra = [(module, deepcopy(module.get_extra_state())) for module in own]
        self._memory, tensors = encode(None if self._task is None else self._task.state_dict(), "task")
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._models = models
        self._weights = self._now()
        self._sums = _sums(self._weights)
        self.lost = False

    def restored(self, team: Team) -> bool:
        """Put all back; False, in all processes, if the weights of one have changed."""
        if not self.lost:
            changed = torch.tensor(float(self._changed()))
            self.lost = bool(team.sum_tensors({"": changed})[""])
        if self.lost:
            return False
        for module, saved in self._buffers:
            module._buffers.clear()
            for name, (buffer, copy) in saved.items():
                if buffer is not None and copy is not None:
                    buffer = buffer.copy_(copy) if buffer.shape == copy.shape else copy
                module._buffers[name] = buffer
        for module, extra in self._extra:
            module.set_extra_state(extra)
        if self._task is not None:
            self._task.load_state_dict(decode(self._memory, lambda name: self._tensors[name].cpu()))
        return True

    def _changed(self) -> bool:
        """Whether a weight has another value, or another one is in its place. (Of one in slices, FSDP puts there the
        whole one for a while.)
        """
        now = zip_longest(self._weights, self._now())
        others = any(new is not old and not (old is not None and is_distributed(old)) for old, new in now)
        return others or _sums(self._weights) != self._sums

    def _now(self) -> list[Tensor]:
        return [weight for model in self._models for weight in model.parameters()]


def _copy(module: nn.Module, name: str) -> Tensor | None:
    """A copy of a buffer that a checkpoint holds."""
    buffer = module._buffers[name]
    return None if buffer is None or name in module._non_persistent_buffers_set else buffer.detach().clone()


def _sums(weights: Sequence[Tensor]) -> list[Tensor]:
    """For each weight the sum of its bits, taken as whole numbers."""
    real = (torch.view_as_real(one) if one.is_complex() else one for one in (local(w.detach()) for w in weights))
    return [one.view(_WHOLE[one.element_size()]).sum() for one in real]


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

"""GRPO with the faults that others reported of their trainers (``docs/explanation/elsewhere.md``), one a class."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from runner.rl.generation import token_logprobs
from runner.rl.grpo import GRPO
from runner.task import Update


class Leaves(GRPO):
    """A state without some of its values."""

    missing: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name not in self.missing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**super().state_dict(), **state})


class ForgetsCoefficient(Leaves):
    """The adaptive KL coefficient begins again."""

    missing = ("kl",)


class DropsSurplus(Leaves):
    """Groups that wait are gone."""

    missing = ("waiting",)


class RestartsCounter(Leaves):
    """The count of updates, by which groups become too old, begins again."""

    missing = ("version",)


class SeedsOnce(GRPO):
    """A generator for each process, instead of a seed for each sample."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.generator = torch.Generator().manual_seed(self.seed)

    def key(self, position: int, number: int) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))


class ReadsAhead(GRPO):
    """The cursor stands where prompts were read: those of the next step are in flight, and in no state."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.in_flight: list[list[tuple[float, Any]]] = []

    def optimization_step(
        self, model: nn.Module, micro_batches: Iterable[tuple[float, Any]], update: Update
    ) -> dict[str, Tensor]:
        self.in_flight.append([*micro_batches])
        return super().optimization_step(
            model, self.in_flight.pop(0) if len(self.in_flight) > 1 else [*self.in_flight[0]], update
        )


class Drifts(GRPO):
    """The reference is what the process began with: after a resume, the resumed weights."""

    begun = False

    def optimization_step(
        self, model: nn.Module, micro_batches: Iterable[tuple[float, Any]], update: Update
    ) -> dict[str, Tensor]:
        if not self.begun:
            self.begun, self.reference = True, copy.deepcopy(model).requires_grad_(False).eval()
        return super().optimization_step(model, micro_batches, update)


class Recomputes(GRPO):
    """Log-probabilities of waiting samples are computed again after a resume, by other weights than drew them."""

    loaded = False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.loaded = True

    def optimization_step(
        self, model: nn.Module, micro_batches: Iterable[tuple[float, Any]], update: Update
    ) -> dict[str, Tensor]:
        if self.loaded:
            self.loaded = False
            self.waiting.extend(
                [replace(group, logprobs=_logprobs(model, group)) for group in self.waiting.take(len(self.waiting))]
            )
        return super().optimization_step(model, micro_batches, update)


@torch.no_grad()
def _logprobs(model: nn.Module, group: Any) -> Tensor:
    rows = torch.cat([group.prompt.expand(len(group.tokens), -1), group.tokens], 1)
    return token_logprobs(model, rows)[0][:, len(group.prompt) - 1 :].contiguous()

"""GRPO, broken in the ways in which trainers were reported to be broken."""

import copy
from typing import Any

from runner.hashing import derive
from runner.rl.grpo import GRPO


class ForgetsCoefficient(GRPO):
    """The adaptive coefficient of the divergence starts over."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "kl": self.kl})


class DropsWaiting(GRPO):
    """Surplus groups, and with staleness those that are drawn and not trained, are not saved: the cursor is ahead."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "waiting": {}})


class SeedsPerProcess(GRPO):
    """One generator for all samples, seeded at the start of the process."""

    drawn = 0

    def key(self, position: int, number: int) -> int:
        self.drawn += 1
        return derive("rollout", self.seed, self.drawn)


class DriftingReference(GRPO):
    """The reference is the policy as the attempt found it."""

    fresh = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reference": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "reference": self._reference_digest()})

    def optimization_step(self, model: Any, micro_batches: Any, update: Any) -> Any:
        if self.fresh:
            self.reference, self.fresh = copy.deepcopy(model).requires_grad_(False).eval(), False
        return super().optimization_step(model, micro_batches, update)


class CountsAnew(GRPO):
    """The counters of the buffer start over, so that what waits seems to be younger, or not due."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "step": 0, "version": 0})


class StaleProbabilities(GRPO):
    """The probabilities when samples were drawn are not kept: after a resume they count as certain."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for group in self.waiting:
            group.logprobs.zero_()

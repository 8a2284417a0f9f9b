"""Weights that are frozen first, and trained from a step on."""

from collections.abc import Mapping

from torch import nn

from runner.callbacks.base import Callback, Loop, TrainingSetup
from runner.errors import ConfigError
from runner.optimizers import Patterns, by_name, matching, weights_of
from runner.state import TrainState


class Unfreeze(Callback):
    """Gradual unfreezing (Howard and Ruder 2018). ``schedule``: after how many steps weights are trained -> patterns
    of their names; until then they are frozen. Weights that no pattern matches stay as they are. It all follows from
    the step, so that a resume needs no memory.
    """

    def __init__(self, schedule: Mapping[int, Patterns]) -> None:
        if wrong := [step for step in schedule if not isinstance(step, int) or step < 0]:
            raise ConfigError(
                f"Unfreeze: the schedule has {wrong[0]!r}, which is not a number of steps; as in {{500: backbone}}"
            )
        self.schedule = dict(sorted(schedule.items()))
        self._due: dict[int, list[nn.Parameter]] = {}

    def on_build(self, setup: TrainingSetup) -> None:
        """Find the weights, and freeze them."""
        weights = dict(setup.state.model.named_parameters())
        trained = {id(weight) for weight in weights_of(by_name(setup.state.optimizer).values())}
        rest = {*weights}  # a weight belongs to the first step that names it
        for step, patterns in self.schedule.items():
            names = rest.intersection(matching(weights, patterns, f"Unfreeze, step {step}"))
            if untrained := [name for name in names if id(weights[name]) not in trained]:
                raise ConfigError(
                    f"Unfreeze: {min(untrained)} is in no optimizer, and would not be trained after step {step}"
                )
            rest -= names
            self._due[step] = [weight for name, weight in weights.items() if name in names]
        self._set(-1)

    def on_resume(self, state: TrainState) -> None:
        """Thaw what earlier attempts have thawed; ``on_step_start`` thaws what is due now."""
        self._set(state.progress.step - 1)

    def on_step_start(self, loop: Loop) -> None:
        """Thaw what is due."""
        if loop.step in self._due:
            self._set(loop.step)

    def _set(self, step: int) -> None:
        for due, weights in self._due.items():
            for weight in weights:
                weight.requires_grad_(step >= due)

"""Stops a run whose loss is NaN or infinite, before a checkpoint or a curve contains it."""

import math
from typing import Any

import torch
from torch import Tensor

from runner.callbacks.base import Callback, Loop
from runner.errors import NonFiniteError

_WINDOW = 32  # steps between two checks: each check waits for the device


class FiniteLoss(Callback):
    """Checks the losses of many steps at once, and names the first step whose loss was not finite."""

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, int, int, Tensor]] = []  # step, first and last position, loss

    def on_step(self, loop: Loop) -> None:
        self._unchecked.append((loop.step, loop.position, loop.consumed - 1, loop.metrics["loss"]))
        if len(self._unchecked) >= _WINDOW:
            self.check()

    def on_end(self, loop: Loop) -> None:
        self.check()

    def check(self) -> None:
        """Raise NonFiniteError if a loss since the last check was not finite."""
        unchecked, self._unchecked = self._unchecked, []
        losses: list[Any] = torch.stack([loss for *_, loss in unchecked]).tolist() if unchecked else []
        for (step, first, last, _), loss in zip(unchecked, losses, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of step {step} is {loss}; its samples are at positions {first} to {last}. "
                    "The last checkpoint is older. Lower the learning rate, set trainer.clip_norm, or skip "
                    "such steps with trainer.on_nonfinite=skip."
                )

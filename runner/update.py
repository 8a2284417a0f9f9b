"""One optimizer step: precision, loss scaling, clipping, what to do without a finite loss, weight averaging."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from runner.distributed.layout import Layout, Single
from runner.errors import NonFiniteError, TaskError

MEASURED = frozenset({"grad_norm"})  # metrics that the update measures, over all processes

_MOST_SKIPPED = 32  # steps in a row; while the scale of an fp16 loss is looked for, fewer are

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class WeightUpdate:
    """Implements ``task.Update`` over one optimizer.

    ``skipped`` counts the steps whose loss or gradients were not finite and that therefore moved nothing; ``in_a_row``
    are the last ones without any other.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        device: torch.device,
        precision: str = "fp32",
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        average: AveragedModel | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.skipped = 0
        self.in_a_row = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device_type = device.type
        self._dtype = _AUTOCAST.get(precision)
        self._scaler = scaler
        self._clip_norm = clip_norm
        self._skip_nonfinite = skip_nonfinite
        self._average = average
        self._layout = layout or Single()

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else torch.autocast(self._device_type, self._dtype)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise TaskError(
                "the loss depends on no parameter that is trained: it was detached or computed without gradients, or "
                "every parameter of the model has requires_grad=False"
            )
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        self._layout.gather_gradients()
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        measured = {}
        if self._clip_norm is not None:
            measured["grad_norm"] = self._clip(self._clip_norm)
        scale = self._scaler.get_scale() if self._scaler is not None else 0.0
        skipped = self._skip_nonfinite and not self._finite(loss)
        if skipped:
            self.skipped += 1
        else:
            self._move()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters:  # also those that are not the optimizer's: no state has a gradient
            parameter.grad = None
        self._layout.settle()
        if self._scaler is not None:
            self._scaler.update()
            skipped = skipped or self._scaler.get_scale() < scale
        self._count(skipped)
        return measured

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "scaler": self._scaler.state_dict() if self._scaler else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state.get("in_a_row", 0)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def _count(self, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= _MOST_SKIPPED:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row were skipped, because their loss or gradients were NaN or infinite: "
                "nothing is learned any more. Look at their samples and at the loss, or lower the learning rate"
            )

    def _move(self) -> None:
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
        if self._average is not None:
            self._average.update_parameters(self.model)

    def _clip(self, most: float) -> Tensor:
        """``nn.utils.clip_grad_norm_`` for a norm that may be distributed over processes."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = self._layout.whole(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(self._parameters, most, norm)
        return norm

    def _finite(self, loss: Tensor) -> bool:
        """Whether loss and gradients are finite. Synchronises with the device, once per step."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norms = map(self._layout.whole, torch._foreach_norm(gradients))
        return bool(self._layout.all(torch.isfinite(torch.stack([loss, *norms])).all()))

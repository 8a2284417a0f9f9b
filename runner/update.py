"""One optimizer step: precision, loss scaling, clipping, what to do without a finite loss, weight averaging."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.distributed.team import Parallelism
from runner.errors import ConfigError, NonFiniteError, TaskError

MEASURED = frozenset({"grad_norm"})  # metrics that the update measures, over all processes

_MOST_SKIPPED = 32  # steps in a row; while the scale of an fp16 loss is looked for, fewer are

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class WeightUpdate:
    """Implements ``task.Update`` over one optimizer.

    ``skipped`` counts the steps whose loss or gradients were not finite and that therefore moved nothing; ``in_a_row``
    are the last ones without any other.
    """

    model: nn.Module
    optimizer: Optimizer
    _: KW_ONLY
    device: torch.device
    precision: str = "fp32"
    scaler: torch.amp.GradScaler | None = None
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    average: AveragedModel | None = None
    parallelism: Parallelism = field(default_factory=Parallelism)
    skipped: int = 0
    in_a_row: int = 0
    gradient_listeners: Sequence[Callable[[], None]] = ()  # called when all gradients are there, unscaled
    positions: Callable[[], range] = lambda: range(0)

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise TaskError(
                "the loss depends on no parameter that is trained: it was detached or computed without gradients, or "
                "every parameter of the model has requires_grad=False"
            )
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def gather(self, value: Any) -> list[Any]:
        return self.parallelism.gather(value)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        self.parallelism.reduce_gradients()
        weights = self._weights()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            self._unscale(weights)
        for listener in self.gradient_listeners:
            listener()
        gradients = [one.grad._values() if one.grad.is_sparse else one.grad for one in weights if one.grad is not None]
        measured = {}
        if self.clip_norm is not None:
            measured["grad_norm"] = self._clip(gradients, self.clip_norm)
        scale = self.scaler.get_scale() if self.scaler is not None else 0.0
        skipped = self.skip_nonfinite and not self._finite(loss, gradients)
        if skipped:
            self.skipped += 1
        else:
            self._move()
        self._clear(weights)
        self.parallelism.sync_buffers()
        if self.scaler is not None:
            self.scaler.update()
            skipped = skipped or self.scaler.get_scale() < scale
        self._count(skipped)
        return measured

    def state_dict(self) -> dict[str, Any]:
        scaler = self.scaler.state_dict() if self.scaler else None
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state.get("in_a_row", 0)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _weights(self) -> list[Tensor]:
        """The weights that have a gradient; a sparse one has each of its elements once.

        Collected anew for each step, and whether they are trained now or not: a task may freeze, thaw, add and replace
        weights, and an optimizer moves whatever has a gradient.
        """
        every = dict.fromkeys(chain(self.model.parameters(), self._own()))
        weights = [one for one in every if one.grad is not None]
        for weight in weights:
            if weight.grad is not None and weight.grad.is_sparse:
                weight.grad = weight.grad.coalesce()
        return weights

    def _own(self) -> Iterable[Tensor]:
        """The optimizer's weights."""
        return chain.from_iterable(group["params"] for group in getattr(self.optimizer, "param_groups", ()))

    def _clear(self, weights: list[Tensor]) -> None:
        """No state has a gradient: clear also those of weights that are not the optimizer's."""
        zero_grad = self.optimizer.zero_grad
        if getattr(zero_grad, "__func__", None) is not Optimizer.zero_grad:  # torch's takes as long as a small kernel
            zero_grad(set_to_none=True)
        for weight in chain(weights, self._own()):
            weight.grad = None

    def _unscale(self, weights: list[Tensor]) -> None:
        """Unscale gradients of what is not the optimizer's, too: they are part of the norm."""
        assert self.scaler is not None
        own = {id(weight) for weight in self._own()}
        for weight in weights:
            if id(weight) not in own and weight.grad is not None:
                weight.grad.div_(self.scaler.get_scale())

    def _count(self, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= _MOST_SKIPPED:
            why = "because their loss or gradients were NaN or infinite: nothing is learned any more"
            remedy = "Look at their samples and at the loss, or lower the learning rate"
            raise NonFiniteError(f"{self.in_a_row} steps in a row were skipped, {why}. {remedy}")

    def _move(self) -> None:
        infinite: Collection[Tensor] = ()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            infinite = self.scaler._found_inf_per_device(self.optimizer).values()
        # Where the loss was scaled too far, the optimizer did not step.
        if self.average is not None and not any(found.item() for found in infinite):
            update_average(self.average, self.model)

    def _clip(self, gradients: list[Tensor], most: float) -> Tensor:
        """``nn.utils.clip_grad_norm_`` for gradients that may be sparse, and distributed over processes."""
        norm = self.parallelism.full_tensor(nn.utils.get_total_norm(gradients))
        if gradients:
            torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _finite(self, loss: Tensor, gradients: list[Tensor]) -> bool:
        """Whether loss and gradients are finite. Synchronises with the device, once per step."""
        norms = map(self.parallelism.full_tensor, torch._foreach_norm(gradients) if gradients else ())
        return bool(self.parallelism.all_true(torch.isfinite(torch.stack([loss, *norms])).all()))


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model for its moving average. Raises ConfigError for a model that cannot be copied."""
    try:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    except Exception as error:
        names = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        reason, remedy = f"{type(error).__name__}: {error}", ""
        if names:
            reason = f"{', '.join(names)} is computed from other weights"
            remedy = "; use torch.nn.utils.parametrizations in place of the old weight_norm and its like"
        raise ConfigError(
            f"trainer.ema_decay needs a copy of the model, and copy.deepcopy cannot make it: {reason}{remedy}, or set "
            "trainer.ema_decay=null"
        ) from error


def update_average(average: AveragedModel, model: nn.Module) -> None:
    """Move the average towards the model. Buffers are copied, also new ones. Raises TaskError if the set or the shapes
    of the weights have changed.
    """
    if _outline(average.module) != _outline(model):
        _require_same_weights(average.module, model)
        for old, new in zip(average.module.modules(), model.modules(), strict=True):
            old._buffers.clear()
            old._buffers.update({n: b if b is None else b.detach().clone() for n, b in new._buffers.items()})
            old._non_persistent_buffers_set = {*new._non_persistent_buffers_set}
    average.update_parameters(model)


def _outline(model: nn.Module) -> list[object]:
    """Modules, weights and buffers in order, for a comparison at each step: equal outlines can be averaged."""
    first: dict[int, int] = {}  # weight -> number of its first use: tied weights must be tied alike
    outline: list[object] = []
    for module in model.modules():
        outline += module._modules
        for name, weight in module._parameters.items():
            outline += [name, None if weight is None else (weight.shape, first.setdefault(id(weight), len(first)))]
        outline += [(name, b if b is None else (b.shape, b.dtype)) for name, b in module._buffers.items()]
    return outline


def _require_same_weights(copy: nn.Module, model: nn.Module) -> None:
    before, now = (
        {**{name: None for name, _ in each.named_modules() if name}, **{n: w.shape for n, w in each.named_parameters()}}
        for each in (copy, model)
    )
    changed = [name for name in {**before, **now} if before.get(name, 0) != now.get(name, 0)]
    if changed := changed or [name for name, other in zip(before, now, strict=True) if name != other]:
        raise TaskError(
            f"trainer.ema_decay averages the weights that the model had at the start, and {', '.join(changed)} came, "
            "went or changed its shape since. Give it to the model in its constructor, or set trainer.ema_decay=null"
        )

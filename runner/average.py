"""The exponential moving average (EMA) of the weights: a copy of the model that follows it."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.errors import ConfigError, TaskError


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model for its moving average. Raises ConfigError for a model that cannot be copied."""
    try:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    except Exception as error:
        derived = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor) and not value.is_leaf
        ]
        reason = (
            f"{', '.join(derived)} is computed from other weights" if derived else f"{type(error).__name__}: {error}"
        )
        remedy = "; use torch.nn.utils.parametrizations in place of the old weight_norm and its like" if derived else ""
        raise ConfigError(
            f"trainer.ema_decay needs a copy of the model, and copy.deepcopy cannot make it: {reason}{remedy}, or set "
            "trainer.ema_decay=null"
        ) from error


def update_average(average: AveragedModel, model: nn.Module) -> None:
    """Move the average towards the model. Buffers are copied, also new ones. Raises TaskError if the set or the shapes
    of the weights have changed.
    """
    copy: nn.Module = average.module
    if _outline(copy) == _outline(model):
        average.update_parameters(model)
        return
    before, now = _shapes(copy), _shapes(model)
    changed = [name for name in {**before, **now} if before.get(name, 0) != now.get(name, 0)]
    if changed := changed or [name for name, other in zip(before, now, strict=True) if name != other]:
        raise TaskError(
            f"trainer.ema_decay averages the weights that the model had at the start, and {', '.join(changed)} came, "
            "went or changed its shape since. Give it to the model in its constructor, or set trainer.ema_decay=null"
        )
    old_buffers, new_buffers = ([(n, b.shape, b.dtype) for n, b in m.named_buffers()] for m in (copy, model))
    if old_buffers != new_buffers:
        for old, new in zip(copy.modules(), model.modules(), strict=True):
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


def _shapes(model: nn.Module) -> dict[str, torch.Size | None]:
    modules: dict[str, torch.Size | None] = {name: None for name, _ in model.named_modules() if name}
    return {**modules, **{name: weight.shape for name, weight in model.named_parameters()}}

"""The moving average of the weights: a copy of the model, which follows it."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.errors import ConfigError, TaskError


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy that becomes an exponential moving average. Raises ConfigError for a model that cannot be copied."""
    try:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    except Exception as error:
        derived = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor) and not value.is_leaf
        ]
        why = f"{', '.join(derived)} is computed from other weights" if derived else f"{type(error).__name__}: {error}"
        remedy = "; use torch.nn.utils.parametrizations in place of the old weight_norm and its like" if derived else ""
        raise ConfigError(
            f"trainer.ema_decay needs a copy of the model, and copy.deepcopy cannot make it: {why}{remedy}, or set "
            "trainer.ema_decay=null"
        ) from error


def update_average(average: AveragedModel, model: nn.Module) -> None:
    """Move the average. Buffers are copied, whatever became of them; raises TaskError for other weights than before."""
    copy: nn.Module = average.module
    if _outline(copy) == _outline(model):
        average.update_parameters(model)
        return
    then, now = _shapes(copy), _shapes(model)
    changed = [name for name in {**then, **now} if then.get(name, 0) != now.get(name, 0)]
    if changed := changed or [name for name, other in zip(then, now, strict=True) if name != other]:
        raise TaskError(
            f"trainer.ema_decay averages the weights that the model had at the start, and {', '.join(changed)} came, "
            "went or changed its shape since. Give it to the model in its constructor, or set trainer.ema_decay=null"
        )
    theirs, ours = ([(n, b.shape, b.dtype) for n, b in one.named_buffers()] for one in (copy, model))
    if theirs != ours:
        for old, new in zip(copy.modules(), model.modules(), strict=True):
            old._buffers.clear()
            old._buffers.update({n: b if b is None else b.detach().clone() for n, b in new._buffers.items()})
            old._non_persistent_buffers_set = {*new._non_persistent_buffers_set}
    average.update_parameters(model)


def _outline(model: nn.Module) -> list[object]:
    """What has to be equal for the average to follow, by one walk, as it is asked for at each step."""
    first: dict[int, int] = {}  # weights by the order in which they come, since parts may share them
    found: list[object] = []
    for module in model.modules():
        found += module._modules
        for name, weight in module._parameters.items():
            found += [name, None if weight is None else (weight.shape, first.setdefault(id(weight), len(first)))]
        found += [(name, b if b is None else (b.shape, b.dtype)) for name, b in module._buffers.items()]
    return found


def _shapes(model: nn.Module) -> dict[str, torch.Size | None]:
    modules: dict[str, torch.Size | None] = {name: None for name, _ in model.named_modules() if name}
    return {**modules, **{name: weight.shape for name, weight in model.named_parameters()}}

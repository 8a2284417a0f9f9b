"""Training and evaluation mode of the parts of a model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

log = logging.getLogger("runner")


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode that came in the mode of evaluation, as ``from_pretrained`` leaves it, or that has
    such a part. ``train()`` decides; and of a model that came in training mode, a frozen part stays as it is, and a
    single layer, which somebody must have put there.
    """
    still: set[nn.Module] = set()
    for part in model.modules() if model.training else ():
        for child in part.children():
            alone = part.training and not any(True for _ in child.children())
            frozen = [weight.requires_grad for weight in child.parameters()]
            if not child.training and (alone or (frozen and not any(frozen))):
                still |= {inner for inner in child.modules() if not inner.training}
    came = {name for name, part in model.named_modules() if not part.training and part not in still}
    model.train()
    for part in still:
        part.training = False
    outer = [name for name in came if name.rpartition(".")[0] not in came - {name}]
    if came:
        log.info("model    %s came in evaluation mode, and trains now", ", ".join(sorted(outer)) or "it")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; afterwards each part is as it was, also one that is frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

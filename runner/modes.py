"""Training mode and evaluation mode of the modules of a model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

log = logging.getLogger("runner")


def train_mode(model: nn.Module) -> None:
    """Call ``model.train()``, because ``from_pretrained`` returns models in evaluation mode; and log what this changed.

    In a model that is in training mode, two kinds of children keep their evaluation mode, since somebody meant it:
    frozen ones (weights, none of which is trained), and single layers such as a batch norm.
    """
    evaluating: set[nn.Module] = set()
    for part in model.modules() if model.training else ():
        for child in part.children():
            single = part.training and not any(True for _ in child.children())
            frozen = [weight.requires_grad for weight in child.parameters()]
            if not child.training and (single or (frozen and not any(frozen))):
                evaluating |= {inner for inner in child.modules() if not inner.training}
    switched = {name for name, part in model.named_modules() if not part.training and part not in evaluating}
    model.train()
    for part in evaluating:
        part.training = False
    outer = [name for name in switched if name.rpartition(".")[0] not in switched - {name}]
    if switched:
        log.info("model    %s came in evaluation mode, and trains now", ", ".join(sorted(outer)) or "it")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; afterwards each module has its earlier mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

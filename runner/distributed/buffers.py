"""Buffers that must be equal in all processes, such as running means: rank 0's values are copied to the others."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Buffers:
    """The buffers of models, by their places: a model may put another tensor there in every step. Those that came after
    the start are looked for at each step; but not those that no checkpoint has, which may be caches of any size.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._models = [*models]
        self._first = {(module, name) for module in self._modules() for name in module._buffers}

    def settle(self) -> None:
        """Give them the values that they have in rank 0."""
        found = {
            id(buffer): buffer
            for module in self._modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and (name not in module._non_persistent_buffers_set or (module, name) in self._first)
        }
        take_over([*found.values()])

    def _modules(self) -> Iterable[nn.Module]:
        return (module for model in self._models for module in model.modules())


def take_over(tensors: Sequence[Tensor]) -> None:
    """Set these tensors to their values on rank 0, with one broadcast."""
    if not tensors:
        return
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())  # each begins at a multiple of its size
    pieces = [tensor.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8) for tensor in ordered]
    message = torch.cat(pieces)
    dist.broadcast(message, 0)
    for tensor, piece in zip(ordered, torch.split(message, [len(piece) for piece in pieces]), strict=True):
        tensor.detach().copy_(piece.view(tensor.dtype).view(tensor.shape))

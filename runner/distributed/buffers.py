"""Buffers that must be equal in all processes, such as running means: rank 0's values are copied to the others."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Buffers:
    """The buffers of models, by their places: a model may put another tensor there in every step."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        modules = [module for model in models for module in model.modules()]
        self._places = [(module._buffers, name) for module in modules for name in module._buffers]

    def settle(self) -> None:
        """Give them the values that they have in rank 0."""
        found = (place[name] for place, name in self._places)
        take_over([*{id(buffer): buffer for buffer in found if buffer is not None}.values()])


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

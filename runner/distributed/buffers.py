"""Buffers that must be equal in all processes, such as running means: rank 0's values are copied to the others."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def take_over(tensors: Sequence[Tensor]) -> None:
    """Set these tensors to their values on rank 0, with one broadcast."""
    if not tensors:
        return
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())  # each begins at a multiple of its size
    pieces = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in ordered]
    message = torch.cat(pieces)
    dist.broadcast(message, 0)
    for tensor, piece in zip(ordered, torch.split(message, [len(piece) for piece in pieces]), strict=True):
        tensor.detach().copy_(piece.view(tensor.dtype).view(tensor.shape))

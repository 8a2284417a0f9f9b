"""A state in digests, so that two of them are compared leaf by leaf without being kept."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from runner.checkpoint.layout import is_distributed
from runner.checkpoint.sealing import digest
from runner.checkpoint.tensors import bytes_of
from runner.checkpoint.tree import encode

_FEW_KEYS = 64
_SHORT = 48  # characters of a value that is told as it is


def fingerprint(state: Mapping[str, Any]) -> dict[str, str]:
    """``path -> digest`` of every tensor, and of every value, or it itself where it is short."""
    found: dict[str, str] = {}
    for part, inner in state.items():
        value, tensors = encode(inner, part)
        found |= {name: of_value(tensor) for name, tensor in tensors.items()}
        found |= dict(_values(part, value))
    return found


def of_value(value: Any) -> str:
    """A tensor, an array or a plain value in a few characters, which are equal only if it is, bit for bit. Of anything
    else its kind: its text may hold an address. One tensor of several processes is put together: all of them must ask.
    """
    if isinstance(value, np.ndarray | np.generic) and not np.asarray(value).dtype.hasobject:
        array = np.ascontiguousarray(value)
        return f"{array.dtype}{[*array.shape]} {digest(array.tobytes())}"
    if isinstance(value, torch.Tensor):
        tensor = _whole(value).detach().cpu()
        tensor = (tensor if tensor.layout is torch.strided else tensor.to_dense()).resolve_conj().resolve_neg()
        return f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]} {digest(bytes_of(tensor.contiguous()))}"
    if not isinstance(value, str | bytes | int | float | bool | None):
        return type(value).__qualname__
    text = repr(value)
    return text if len(text) <= _SHORT else digest(text.encode())


def _whole(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if is_distributed(tensor) else tensor
    return found


def _values(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value.get("$") == "ordered":
        value = value["items"]
    if isinstance(value, dict) and "$" not in value and 0 < len(value) <= _FEW_KEYS:
        for key, inner in value.items():
            yield from _values(f"{path}/{key}", inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for place, inner in enumerate(value):
            yield from _values(f"{path}/{place}", inner)
    elif not (isinstance(value, dict) and value.get("$") == "tensor"):
        text = json.dumps(value, sort_keys=True)
        yield path, text if len(text) <= _SHORT else digest(text.encode())

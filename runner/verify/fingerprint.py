"""A state in digests, so that two of them are compared leaf by leaf without being kept."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

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
    """A tensor or any other value in a few characters, which are equal only if the value is, bit for bit."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        return f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]} {digest(bytes_of(tensor))}"
    text = repr(value)
    return text if len(text) <= _SHORT else digest(text.encode())


def _values(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and "$" not in value and 0 < len(value) <= _FEW_KEYS:
        for key, inner in value.items():
            yield from _values(f"{path}/{key}", inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for place, inner in enumerate(value):
            yield from _values(f"{path}/{place}", inner)
    elif not (isinstance(value, dict) and value.get("$") == "tensor"):
        text = json.dumps(value, sort_keys=True)
        yield path, text if len(text) <= _SHORT else digest(text.encode())

"""State as strict JSON beside named tensors, and back, without loss and without pickle.

Tensors leave the tree and are named by their path (``model/head.weight``). Tuples, mappings whose keys are not strings,
and non-finite floats are tagged, because JSON has none of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from runner.errors import StateError

_TAG = "$"
_ALLOWED = "tensors, str, int, float, bool, None, and dicts, lists and tuples of them"


def encode(state: Any, path: str) -> tuple[Any, dict[str, Tensor]]:
    """``state`` as (JSON value, tensors by name), every name beginning with ``path``.

    Tensors are those of the state itself, not copies. Raises StateError, naming the path, for anything but the plain
    values that can be restored exactly.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(state, path, tensors), tensors


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The state that ``encode`` was given; ``tensor`` supplies tensors by name."""
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get(_TAG):
        case None:
            return {key: decode(item, tensor) for key, item in value.items()}
        case "tensor":
            return tensor(value["name"])
        case "tuple":
            return tuple(decode(item, tensor) for item in value["items"])
        case "float":
            return float(value["value"])
        case "dict":
            return {decode(key, tensor): decode(item, tensor) for key, item in value["items"]}
        case unknown:
            raise StateError(f"a stored state holds the unknown tag {unknown!r}")


def names_in(value: Any) -> list[str]:
    """The names of all tensors that ``decode`` will ask for."""
    names: list[str] = []
    decode(value, names.append)  # type: ignore[arg-type]  # what stands for a tensor does not matter
    return names


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return {_TAG: "tensor", "name": _add(value, path, tensors)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_TAG: "float", "value": repr(float(value))}
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):  # a named one would come back without its names
        return {_TAG: "tuple", "items": _encode(list(value), path, tensors)}
    if isinstance(value, list):
        return [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and _TAG not in value:
            return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
        items = [[_encode(key, path, tensors), _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {_TAG: "dict", "items": items}
    raise StateError(
        f"cannot save {path}: it is a {type(value).__module__}.{type(value).__qualname__}. "
        f"A state_dict may hold {_ALLOWED}."
    )


def _add(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise StateError(f"cannot save {path}: a {tensor.layout} tensor; only dense tensors can be saved")
    if path in tensors:
        raise StateError(f"cannot save {path}: two tensors of the state have this path; rename one")
    tensors[path] = tensor.detach()
    return path

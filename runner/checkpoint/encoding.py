"""State as strict JSON beside named tensors, and back, without loss and without pickle.

A tensor is replaced by its name, which is its path (``model/head.weight``). Tuples, OrderedDict, Counter, dicts with
keys that are not strings, and non-finite floats are tagged, because JSON has none of them. A value of
a subclass (a member of an enumeration, a defaultdict) would be restored as its base class, and is refused.

A tensor's entry has the order of its dimensions in memory where the tensor is not contiguous (channels last): fused
optimizers pair the bytes of a weight with those of its moments in the order of memory. It also says whether the tensor
requires gradients.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.sharding import is_distributed
from runner.distributed.communicator import PerRank
from runner.errors import StateError

_TAG = "$"


def encode(state: Any, path: str) -> tuple[Any, dict[str, Tensor]]:
    """``state`` as (JSON value, tensors by name), every name beginning with ``path``.

    Tensors are those of the state itself, not copies. Raises StateError, naming the path, for anything but the plain
    values that can be restored exactly.
    """
    tensors: dict[str, Tensor] = {}
    try:
        return _encode(state, path, tensors), tensors
    except RecursionError:
        raise StateError(f"cannot save {path}: it holds itself, or is nested too deeply") from None


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of ``encode``; ``tensor`` returns the tensor of a name, in memory as ``orders`` says."""
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(item, tensor) for key, item in value.items()}
    match value[_TAG]:
        case "tensor":
            return _with_gradients(tensor(value["name"])) if value.get("trained") else tensor(value["name"])
        case "tuple":
            return tuple(decode(item, tensor) for item in value["items"])
        case "float":
            return float(value["value"])
        case "dict":
            return {decode(key, tensor): decode(item, tensor) for key, item in value["items"]}
        case "counter":
            return Counter(decode(value["items"], tensor))
        case "ordered":
            return _ordered(decode(value["items"], tensor), decode(value["versions"], tensor))
        case unknown:
            raise StateError(f"a stored state holds the unknown tag {unknown!r}", kind="structure")


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share their bytes, so that the tensor cannot be written in place."""
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, strides, strict=bool(strides)))


def orders(value: Any) -> list[tuple[str, Any]]:
    """The names of all tensors in an encoded value, each with the order of its dimensions in memory."""
    if isinstance(value, dict) and value.get(_TAG) == "tensor":
        return [(value["name"], value.get("order"))]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [entry for item in inner for entry in orders(item)]


def in_memory_order(tensor: Tensor, order: Any) -> Tensor:
    """The tensor with its dimensions in this order in memory. Raises ValueError for an impossible order."""
    if order is None:
        return tensor
    if sorted(order) != [*range(tensor.ndim)]:
        raise ValueError(f"dimensions in the order {order!r}")
    return torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype).copy_(tensor)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        _add_tensor(value, path, tensors)
        trained, order = {"trained": True} if value.requires_grad and value.is_leaf else {}, _order(value)
        return {_TAG: "tensor", "name": path, **trained, **({} if order is None else {"order": order})}
    if isinstance(value, float) and not isinstance(value, Enum):
        return float(value) if math.isfinite(value) else {_TAG: "float", "value": repr(float(value))}
    if value is None or (isinstance(value, str | int) and not isinstance(value, Enum)):
        return value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):  # a named tuple would lose its names
        return {_TAG: "tuple", "items": _encode(list(value), path, tensors)}
    if isinstance(value, list):
        return [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if type(value) in (dict, PerRank):
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
        items = [[_encode(key, path, tensors), _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {_TAG: "dict", "items": items}
    if type(value) is Counter:
        return {_TAG: "counter", "items": _encode(dict(value), path, tensors)}
    if type(value) is OrderedDict:
        versions = getattr(value, "_metadata", None)  # of a module's classes, by which they load what older ones saved
        encoded = None if versions is None else _encode(dict(versions), path, tensors)
        return {_TAG: "ordered", "items": _encode(dict(value), path, tensors), "versions": encoded}
    raise StateError(
        f"cannot save {path}: it is a {type(value).__module__}.{type(value).__qualname__}. A state_dict may hold "
        "tensors, str, int, float, bool, None, and dicts, lists and tuples of them."
        + (" Of numpy, save value.item() or torch.from_numpy(array)." if type(value).__module__ == "numpy" else "")
    )


def _ordered(items: dict[Any, Any], versions: Any) -> OrderedDict[Any, Any]:
    state = OrderedDict(items)
    if versions is not None:
        state._metadata = versions  # type: ignore[attr-defined]
    return state


def _with_gradients(tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"a {tensor.dtype} tensor that requires gradients")
    return tensor.detach().requires_grad_()  # the same tensor may be part of the state as it is, too


def _add_tensor(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> None:
    """Add a tensor. Raises StateError unless each element has bytes of its own: a subclass that wraps other tensors
    (quantised ones, say) would come back as a plain tensor, and no module can load into an expanded tensor.
    """
    wraps = hasattr(type(tensor), "__tensor_flatten__") and not is_distributed(tensor)
    dense = tensor.layout == torch.strided and not (wraps or tensor.is_quantized or tensor.is_meta)
    if not dense or is_expanded(tensor):
        kind = f"{type(tensor).__qualname__}, {tensor.layout}, on {tensor.device}"
        raise StateError(
            f"cannot save {path}: {kind}; only dense tensors can be saved, with bytes of their own for each element"
        )
    if path in tensors:
        raise StateError(f"cannot save {path}: two tensors of the state have this path; rename one")
    tensors[path] = tensor.detach()


def _order(tensor: Tensor) -> list[int] | None:
    """The dimensions, outermost in memory first; None for a contiguous tensor, or one with gaps."""
    if tensor.is_contiguous() or is_distributed(tensor):
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dimension: -strides[dimension])
    return order if tensor.permute(order).is_contiguous() else None

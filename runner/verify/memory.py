"""What live objects remember: every attribute in words, so that memory outside a ``state_dict`` has a name.

Looks and never changes. Data that is large is told by its size alone.
"""

import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

_DEPTH = 4
_FEW = 16  # items of a container that are looked at one by one
_MANY = 1000  # items of a container whose values are looked at
_LARGE = 1 << 20  # bytes of an array
_WIDE = 40  # characters of a value that is told as it is
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)
_LIBRARIES = ("torch", "numpy", "builtins", "collections", "runner.data", "runner.models", "runner.tasks")
# Of torch's own: in every state_dict, or of no consequence.
_SKIPPED = {
    "state",
    "param_groups",
    "defaults",
    "optimizer",
    "training",
    "step",
    "_opt_called",
    "_get_lr_called_within_step",
}


def memory(objects: Mapping[str, Any]) -> dict[str, str]:
    """``path -> value in words`` for all that the objects, their classes and the modules of these hold."""
    found: dict[str, str] = {}
    seen: dict[int, Any] = {}  # holds what it has seen, so that no other object gets the same id
    for name, thing in objects.items():
        for path, value in _around(name, thing):
            found |= dict(_walk(path, value, 0, seen))
    return found


def _around(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The object, and what its class and its module keep for all objects."""
    if isinstance(thing, nn.Module):
        for path, module in thing.named_modules():
            yield f"{name}.{path}" if path else name, _OfModule(module)
    else:
        yield name, thing
    kind = thing.func if hasattr(thing, "func") else type(thing)
    where = getattr(kind, "__module__", "builtins")
    if isinstance(kind, _CODE) and not where.startswith(_LIBRARIES):
        for holder, attributes in ((where, vars(sys.modules[where])), (f"{where}.{kind.__name__}", vars(kind))):
            for key, value in [*attributes.items()]:
                if not key.startswith("__") and not isinstance(value, (*_CODE, property, staticmethod, classmethod)):
                    yield f"{name} ({holder}.{key})", value


class _OfModule:
    """What a module of torch has beside parameters, buffers of its state and modules."""

    def __init__(self, module: nn.Module) -> None:
        own = {key: value for key, value in vars(module).items() if key not in _INTERNAL}
        loose = {f"{key} (a buffer, persistent=False)": module._buffers[key] for key in _loose(module)}
        vars(self).update(own | loose)


def _loose(module: nn.Module) -> list[str]:
    return sorted(module._non_persistent_buffers_set)


def _walk(path: str, value: Any, depth: int, seen: dict[int, Any]) -> Iterator[tuple[str, str]]:
    told = _told(value)
    if told is not None:
        yield path, told
    elif depth < _DEPTH and id(value) not in seen and not isinstance(value, _CODE):
        seen[id(value)] = value
        for key, inner in _inside(value):
            yield from _walk(f"{path}{key}", inner, depth + 1, seen)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", inner) for key, inner in [*value.items()])
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{place}]", inner) for place, inner in enumerate(value))
    else:
        attributes = getattr(value, "__dict__", {})
        yield from ((f".{key}", inner) for key, inner in [*attributes.items()] if key not in _SKIPPED)


def _told(value: Any) -> str | None:
    """A value in words; None for what has to be looked into."""
    if isinstance(value, _PLAIN):
        return _short(repr(value))
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _array(value)
    if isinstance(value, torch.Generator):
        return f"torch.Generator in state {_digest(bytes(value.get_state().tolist()))}"
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return f"numpy.random.{type(value).__name__} in state {_digest(repr(bits.state).encode())}"
    if isinstance(value, np.random.RandomState):
        return f"numpy.random.RandomState in state {_digest(repr(value.get_state()).encode())}"
    if isinstance(value, random.Random):
        return f"random.Random in state {_digest(repr(value.getstate()).encode())}"
    if type(value).__module__ == "itertools":
        return _short(repr(value))
    if isinstance(value, set | frozenset) or (isinstance(value, dict | list | tuple | deque) and len(value) > _FEW):
        return _many(value)
    return None


def _array(value: Any) -> str:
    shape = [*value.shape]
    if value.nbytes > _LARGE:
        return f"{value.dtype}{shape}"
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return _short(repr(array.item())) if array.size == 1 else f"{value.dtype}{shape} {_digest(array.tobytes())}"


def _many(value: Any) -> str:
    """A container in words; one of anything but plain values is told by its length alone."""
    told = f"a {type(value).__name__} of {len(value)}"
    items = [*value.items()] if isinstance(value, dict) else [*value]
    if len(items) > _MANY or not all(map(_is_plain, items)):
        return told
    return f"{told} {_digest(repr(sorted(map(repr, items)) if isinstance(value, set | frozenset) else items).encode())}"


def _is_plain(item: Any) -> bool:
    return all(map(_is_plain, item)) if isinstance(item, tuple) else isinstance(item, _PLAIN)


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]}... {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=4).hexdigest()

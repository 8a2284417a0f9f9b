"""What live objects remember: every attribute in words, so that memory outside a ``state_dict`` has a name.

Looks and never changes. Of data that is large a sample of the values is looked at.
"""

import os
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from inspect import getgeneratorlocals
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from runner.checkpoint.layout import is_distributed
from runner.verify.fingerprint import of_value

# What is told of a model beside its attributes.
FROZEN = " (parameters with requires_grad=False)"
RESTING = " (modules in eval mode)"
GRADIENTS = " (gradients kept after the step)"
LEFT_OUT = " (a parameter, not in its state_dict)"
LOOSE = " (a buffer, persistent=False)"
PROCESS = "process: "

_DEPTH = 4
_FEW = 16  # items of a container that are looked at one by one
_MANY = 1000  # items of a container whose values are looked at
_LARGE = 1 << 20  # bytes of an array, of which more is not looked at than a sample of values
_SAMPLE = 4096  # of these
_WIDE = 40  # characters of a value that is told as it is
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)
_LIBRARIES = ("torch", "numpy", "builtins", "collections", "runner.data", "runner.models", "runner.tasks")
# Of torch's optimizers and schedulers: in every state_dict, or of no consequence.
_OPTIM = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_SKIPPED = {"state", "param_groups", "defaults", "optimizer", "step", "_opt_called", "_get_lr_called_within_step"}


def memory(objects: Mapping[str, Any]) -> dict[str, str]:
    """``path -> value in words`` for all that the objects, their classes and the user's modules hold."""
    found: dict[str, str] = {}
    model = objects.get("model")
    # Holds what it has seen, so that no other object gets the same id. A task may hold the model.
    seen: dict[int, Any] = {id(part): part for part in model.modules()} if isinstance(model, nn.Module) else {}
    for name, thing in objects.items():
        for path, value in _around(name, thing):
            found |= dict(_walk(path, value, 0, seen))
    return found


def settings() -> dict[str, str]:
    """What holds for the whole process, and may be changed while training; of its environment digests alone."""
    found = {
        "torch.backends.mkldnn.enabled": torch.backends.mkldnn.enabled,
        "torch.backends.cudnn.enabled": torch.backends.cudnn.enabled,
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "torch.backends.cudnn.deterministic": torch.backends.cudnn.deterministic,
        "torch.backends.cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
    }
    environment = {f"os.environ[{key!r}]": _digest(value.encode()) for key, value in [*os.environ.items()]}
    return {f"{PROCESS}{name}": str(value) for name, value in (found | environment).items()}


def _around(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The object, and what its classes and their modules keep for all objects."""
    if isinstance(thing, nn.Module):
        yield from ((f"{name}.{path}" if path else name, _OfModule(module)) for path, module in thing.named_modules())
        yield from ((f"{name}{what}", value) for what, value in _beside(thing))
    else:
        yield name, thing
    kind = thing.func if isinstance(thing, partial) else type(thing)
    for each in getattr(kind, "__mro__", (kind,)):
        where = getattr(each, "__module__", None) or "builtins"
        if isinstance(each, type | FunctionType) and not where.startswith(_LIBRARIES):
            yield from ((f"{name} ({where}.{each.__name__}.{key})", value) for key, value in _kept(vars(each)))
            for module in _modules(where):
                yield from ((f"{name} ({module.__name__}.{key})", value) for key, value in _kept(vars(module)))


def _kept(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a class or a module keeps: values, and functions that have some."""
    for key, value in [*attributes.items()]:
        if isinstance(value, FunctionType):
            if value.__closure__ or value.__defaults__ or value.__kwdefaults__:
                yield key, value
        elif not key.startswith("__") and not isinstance(value, (*_CODE, property, staticmethod, classmethod)):
            yield key, value


def _modules(name: str) -> list[ModuleType]:
    """A module, and those of the user's that it uses."""
    found = {name: sys.modules[name]}
    waiting = [name]
    while waiting:
        for value in [*vars(found[waiting.pop()]).values()]:
            if isinstance(value, ModuleType) and value.__name__ not in found and _is_users(value, name):
                found[value.__name__] = value
                waiting.append(value.__name__)
    return [*found.values()]


def _is_users(module: ModuleType, beside: str) -> bool:
    top, _, _ = module.__name__.partition(".")
    if top == beside.partition(".")[0]:
        return True
    library = top in sys.stdlib_module_names or top == "runner"
    return not library and "site-packages" not in (getattr(module, "__file__", None) or "site-packages")


class _OfModule:
    """What a module of torch has beside parameters, buffers of its state and modules."""

    def __init__(self, module: nn.Module) -> None:
        own = {key: value for key, value in vars(module).items() if key not in _INTERNAL}
        hooks = {key: value for key, value in vars(module).items() if key.endswith("_hooks") and value}
        loose = {f"{key}{LOOSE}": module._buffers[key] for key in _loose(module)}
        vars(self).update(own | hooks | loose)


def _loose(module: nn.Module) -> list[str]:
    return sorted(module._non_persistent_buffers_set)


def _beside(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What matters of a model and is in no ``state_dict``."""
    named = [*model.named_parameters()]
    state = model.state_dict()
    lacking = {name: parameter for name, parameter in named if name not in state}
    places = {value.data_ptr() for value in state.values()} if lacking else set()
    for name, parameter in lacking.items():
        if parameter.data_ptr() not in places:  # else it is there by another name
            yield f".{name}{LEFT_OUT}", of_value(parameter)
    yield FROZEN, _names(name for name, parameter in named if not parameter.requires_grad)
    yield RESTING, _names(name for name, module in model.named_modules() if not module.training)
    yield GRADIENTS, _names(f"{name} {_array(p.grad)}" for name, p in named if p.grad is not None)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _walk(path: str, value: Any, depth: int, seen: dict[int, Any]) -> Iterator[tuple[str, str]]:
    told = _told(value)
    if told is not None:
        yield path, told
    elif depth < _DEPTH and id(value) not in seen and _may_hold(value):
        seen[id(value)] = value
        for key, inner in _inside(value):
            yield from _walk(f"{path}{key}", inner, depth + 1, seen)


def _may_hold(value: Any) -> bool:
    users = isinstance(value, FunctionType) and not (value.__module__ or "").startswith(_LIBRARIES)
    return users or not isinstance(value, _CODE)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", inner) for key, inner in [*value.items()])
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{place}]", inner) for place, inner in enumerate(value))
    elif isinstance(value, nn.Module):  # one that the task has beside the model, say
        yield from ((f".{name}", tensor) for name, tensor in (*value.named_parameters(), *value.named_buffers()))
    elif isinstance(value, partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, FunctionType | GeneratorType):
        yield from ((f" (its {key})", inner) for key, inner in _variables(value).items())
    else:
        skipped = _SKIPPED if isinstance(value, _OPTIM) else ()
        attributes = getattr(value, "__dict__", {})
        yield from ((f".{key}", inner) for key, inner in [*attributes.items()] if key not in skipped)


def _variables(code: Any) -> dict[str, Any]:
    """What a function keeps from call to call: of the function around it, and as defaults; what a generator does."""
    if isinstance(code, GeneratorType):
        return getgeneratorlocals(code)
    of, defaults = code.__code__, code.__defaults__ or ()
    found = dict(zip(of.co_varnames[of.co_argcount - len(defaults) : of.co_argcount], defaults, strict=True))
    for name, cell in zip(of.co_freevars, code.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty one
            found[name] = cell.cell_contents
    return found | (code.__kwdefaults__ or {})


def _told(value: Any) -> str | None:
    """A value in words; None for what has to be looked into."""
    if isinstance(value, _PLAIN):
        return _short(repr(value))
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _array(value)
    if isinstance(value, torch.Generator):
        return f"torch.Generator in state {_digest(value.get_state().numpy().tobytes())}"
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return f"numpy.random.{type(value).__name__} in state {_digest(repr(bits.state).encode())}"
    if isinstance(value, np.random.RandomState):
        return f"numpy.random.RandomState in state {_digest(repr(value.get_state()).encode())}"
    if isinstance(value, random.Random):
        return f"random.Random in state {_digest(repr(value.getstate()).encode())}"
    if type(value).__module__ == "itertools":
        return _short(repr(value))
    if hasattr(value, "cache_info") and callable(value):
        return f"a cache of {value.cache_info().currsize} results"
    if isinstance(value, set | frozenset) or (isinstance(value, dict | list | tuple | deque) and len(value) > _FEW):
        return _many(value)
    return None


def _array(value: Any) -> str:
    """A tensor or an array; of a large one a sample is looked at."""
    if isinstance(value, torch.Tensor):
        tensor: Any = value.detach()
        tensor = tensor.to_local() if is_distributed(tensor) else tensor
        large = tensor.layout is torch.strided and tensor.numel() * tensor.itemsize > _LARGE
        looked = of_value(tensor.reshape(-1)[:: tensor.numel() // _SAMPLE] if large else tensor)
        single = tensor.numel() == 1
    else:
        array = np.asarray(value)
        looked = of_value(array.reshape(-1)[:: array.size // _SAMPLE] if array.nbytes > _LARGE else array)
        single = array.size == 1
    return _short(repr(value.item())) if single else f"{value.dtype}{[*value.shape]} {_digest(looked.encode())}"


def _many(value: Any) -> str:
    """A container in words; one of anything but plain values and arrays is told by its length alone."""
    told = f"a {type(value).__name__} of {len(value)}"
    items = [*value.items()] if isinstance(value, dict) else [*value]
    if len(items) > _MANY or not all(map(_is_plain, items)):
        return told
    words = [_array(item) if isinstance(item, torch.Tensor | np.ndarray) else repr(item) for item in items]
    return f"{told} {_digest(repr(sorted(words) if isinstance(value, set | frozenset) else words).encode())}"


def _is_plain(item: Any) -> bool:
    if isinstance(item, tuple):
        return all(_is_plain(inner) and not isinstance(inner, torch.Tensor | np.ndarray) for inner in item)
    return isinstance(item, (*_PLAIN, torch.Tensor, np.ndarray))


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]}... {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=4).hexdigest()

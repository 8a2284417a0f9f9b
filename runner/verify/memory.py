"""What live objects remember: every attribute in words, so that memory outside a ``state_dict`` has a name.

Looks and never changes.
"""

import os
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from inspect import getgeneratorlocals
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from runner.verify import fingerprint
from runner.verify.fingerprint import of_value

# What is told of a model beside its attributes.
FROZEN = " (parameters with requires_grad=False)"
RESTING = " (modules in eval mode)"
GRADIENTS = " (gradients kept after the step)"
LEFT_OUT = " (a parameter, not in its state_dict)"
LOOSE = " (a buffer, persistent=False)"
HOOKS = "_hooks["
PROCESS = "process: "

_DEPTH = 6
_INTERNAL = frozenset(vars(nn.Module()))
_CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)
_LIBRARIES = (
    "torch",
    "numpy",
    "builtins",
    "collections",
    "runner.data",
    "runner.models",
    "runner.task",
    "runner.callbacks",
)
# Of torch's optimizers and schedulers: in every state_dict, or of no consequence.
_OPTIM = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_OWN = ("optimizer", "scheduler")
_SKIPPED = {"state", "param_groups", "defaults", "optimizer", "step", "_opt_called", "_get_lr_called_within_step"}


def memory(objects: Mapping[str, Any]) -> dict[str, str]:
    """``path -> value in words`` for all that the objects, their classes and the user's modules hold."""
    found: dict[str, str] = {}
    model = objects.get("model")
    # Holds what it has seen, so that no other object gets the same id. A task may hold the model.
    seen: dict[int, Any] = {id(part): part for part in model.modules()} if isinstance(model, nn.Module) else {}
    # The runner's own first: they are skipped where others hold them, and not the other way round.
    for name, thing in sorted(objects.items(), key=lambda named: named[0] not in _OWN):
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
    environment = {
        f"os.environ[{key!r}]": fingerprint.short_digest(value.encode()) for key, value in [*os.environ.items()]
    }
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
            if value.__closure__ or value.__defaults__ or value.__kwdefaults__ or vars(value):
                yield key, value
        elif not key.startswith("__") and not isinstance(value, (*_CODE, property, staticmethod, classmethod)):
            yield key, value


def _modules(name: str) -> list[ModuleType]:
    """A module, and those of the user's that it uses, or has a function or a class from."""
    found = {name: sys.modules[name]}
    waiting = [name]
    while waiting:
        for value in [*vars(found[waiting.pop()]).values()]:
            of = sys.modules.get(value.__module__ or "") if isinstance(value, FunctionType | type) else value
            if isinstance(of, ModuleType) and of.__name__ not in found and _is_users(of, name):
                found[of.__name__] = of
                waiting.append(of.__name__)
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
    yield GRADIENTS, _names(f"{name} {fingerprint.describe_array(p.grad)}" for name, p in named if p.grad is not None)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _walk(path: str, value: Any, depth: int, seen: dict[int, Any]) -> Iterator[tuple[str, str]]:
    told = fingerprint.describe(value)
    if told is not None:
        yield path, told
    elif depth < _DEPTH and id(value) not in seen and _may_hold(value):
        seen[id(value)] = value
        if isinstance(value, FunctionType | MethodType):
            yield path, f"the function {value.__qualname__}"
        for key, inner in _inside(value, own=path in _OWN):
            yield from _walk(f"{path}{key}", inner, depth + 1, seen)


def _may_hold(value: Any) -> bool:
    users = isinstance(value, FunctionType | MethodType) and not (value.__module__ or "").startswith(_LIBRARIES)
    return users or not isinstance(value, _CODE)


def _inside(value: Any, *, own: bool = False) -> Iterator[tuple[str, Any]]:
    """What is in a value; in one that is the runner's ``own``, less what is in its state."""
    if isinstance(value, dict):
        yield from ((f"[{_key(key, place)}]", inner) for place, (key, inner) in enumerate([*value.items()]))
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{place}]", inner) for place, inner in enumerate(value))
    elif isinstance(value, nn.Module):  # one that the task has beside the model, say
        yield from ((f".{name}", tensor) for name, tensor in (*value.named_parameters(), *value.named_buffers()))
        yield from ((f".{name}" if name else "", _OfModule(module)) for name, module in value.named_modules())
    elif isinstance(value, partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, FunctionType | GeneratorType):
        yield from ((f" (its {key})", inner) for key, inner in _variables(value).items())
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, ContextVar):
        yield "", value.get(None)
    elif isinstance(value, weakref.ref):
        yield "", value()
    else:
        skipped = _SKIPPED if own and isinstance(value, _OPTIM) else ()
        yield from ((f".{key}", inner) for key, inner in _attributes(value).items() if key not in skipped)


def _key(key: Any, place: int) -> str:
    """A key in words; of an object its place, since its text may hold an address."""
    return repr(key) if isinstance(key, (*fingerprint.PLAIN, tuple)) else f"{type(key).__name__} {place}"


def _attributes(value: Any) -> dict[str, Any]:
    """With those that have slots."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    found = {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}
    return found | dict(getattr(value, "__dict__", {}))


def _variables(code: Any) -> dict[str, Any]:
    """What a function keeps from call to call: of the function around it, and as defaults; what a generator does."""
    if isinstance(code, GeneratorType):
        return getgeneratorlocals(code)
    of, defaults = code.__code__, code.__defaults__ or ()
    found: dict[str, Any] = dict(
        zip(of.co_varnames[of.co_argcount - len(defaults) : of.co_argcount], defaults, strict=True)
    )
    for name, cell in zip(of.co_freevars, code.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty one
            found[name] = cell.cell_contents
    return {**found, **(code.__kwdefaults__ or {}), **vars(code)}

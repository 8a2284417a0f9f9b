"""The memory of live objects: every attribute in words, so that memory outside a ``state_dict`` has a name.

Reads objects, and never changes them.
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

# Marks in paths, by which ``causes`` tells kinds of memory apart; those of a model are no attributes of it.
FROZEN = " (parameters with requires_grad=False)"
EVALUATING = " (modules in eval mode)"
GRADIENTS = " (gradients kept after the step)"
LEFT_OUT = " (a parameter, not in its state_dict)"
NOT_PERSISTENT = " (a buffer, persistent=False)"
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
_OPTIM = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_OWN = ("optimizer", "scheduler")
# Attributes of torch's optimizers and schedulers that are in every state_dict, or have no effect.
_SKIPPED = {"state", "param_groups", "defaults", "optimizer", "step", "_opt_called", "_get_lr_called_within_step"}


def memory(objects: Mapping[str, Any]) -> dict[str, str]:
    """``path -> value in words`` for all that the objects, their classes and the user's modules hold."""
    values: dict[str, str] = {}
    model = objects.get("model")
    # Keeps the objects alive, so that no other object gets the same id. A task may hold the model.
    seen: dict[int, Any] = {id(part): part for part in model.modules()} if isinstance(model, nn.Module) else {}
    # The runner's own first: they are skipped where others hold them, and not the other way round.
    for name, thing in sorted(objects.items(), key=lambda item: item[0] not in _OWN):
        for path, value in _around(name, thing):
            values |= dict(_walk(path, value, 0, seen))
    return values


def settings() -> dict[str, str]:
    """Settings of the whole process that training may change; of environment variables their digests."""
    torch_settings = {
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
    return {f"{PROCESS}{name}": str(value) for name, value in (torch_settings | environment).items()}


def _around(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The object, and the values that its classes and their modules hold for all objects."""
    if isinstance(thing, nn.Module):
        yield from (
            (f"{name}.{path}" if path else name, _ModuleAttributes(module)) for path, module in thing.named_modules()
        )
        yield from ((f"{name}{mark}", value) for mark, value in _outside_state(thing))
    else:
        yield name, thing
    kind = thing.func if isinstance(thing, partial) else type(thing)
    for each in getattr(kind, "__mro__", (kind,)):
        home = getattr(each, "__module__", None) or "builtins"
        if isinstance(each, type | FunctionType) and not home.startswith(_LIBRARIES):
            yield from ((f"{name} ({home}.{each.__name__}.{key})", value) for key, value in _values(vars(each)))
            for module in _modules(home):
                yield from ((f"{name} ({module.__name__}.{key})", value) for key, value in _values(vars(module)))


def _values(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values that a class or a module holds, and its functions that hold values."""
    for key, value in [*attributes.items()]:
        if isinstance(value, FunctionType):
            if value.__closure__ or value.__defaults__ or value.__kwdefaults__ or vars(value):
                yield key, value
        elif not key.startswith("__") and not isinstance(value, (*_CODE, property, staticmethod, classmethod)):
            yield key, value


def _modules(name: str) -> list[ModuleType]:
    """A module, and the user's modules that it imports, or imports functions or classes from."""
    modules = {name: sys.modules[name]}
    waiting = [name]
    while waiting:
        for value in [*vars(modules[waiting.pop()]).values()]:
            home = sys.modules.get(value.__module__ or "") if isinstance(value, FunctionType | type) else value
            if isinstance(home, ModuleType) and home.__name__ not in modules and _is_users(home, name):
                modules[home.__name__] = home
                waiting.append(home.__name__)
    return [*modules.values()]


def _is_users(module: ModuleType, importer: str) -> bool:
    top, _, _ = module.__name__.partition(".")
    if top == importer.partition(".")[0]:
        return True
    library = top in sys.stdlib_module_names or top == "runner"
    return not library and "site-packages" not in (getattr(module, "__file__", None) or "site-packages")


class _ModuleAttributes:
    """The attributes of a torch module other than parameters, buffers of its state and modules."""

    def __init__(self, module: nn.Module) -> None:
        own = {key: value for key, value in vars(module).items() if key not in _INTERNAL}
        hooks = {key: value for key, value in vars(module).items() if key.endswith("_hooks") and value}
        names = sorted(module._non_persistent_buffers_set)
        vars(self).update(own | hooks | {f"{key}{NOT_PERSISTENT}": module._buffers[key] for key in names})


def _outside_state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Mark and value of what a model has in no ``state_dict`` and in no attribute."""
    named = [*model.named_parameters()]
    state = model.state_dict()
    lacking = {name: parameter for name, parameter in named if name not in state}
    pointers = {value.data_ptr() for value in state.values()} if lacking else set()
    for name, parameter in lacking.items():
        if parameter.data_ptr() not in pointers:  # else the state has it by another name
            yield f".{name}{LEFT_OUT}", of_value(parameter)
    yield FROZEN, _names(name for name, parameter in named if not parameter.requires_grad)
    yield EVALUATING, _names(name for name, module in model.named_modules() if not module.training)
    yield GRADIENTS, _names(f"{name} {fingerprint.describe_array(p.grad)}" for name, p in named if p.grad is not None)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _walk(path: str, value: Any, depth: int, seen: dict[int, Any]) -> Iterator[tuple[str, str]]:
    description = fingerprint.describe(value)
    if description is not None:
        yield path, description
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
    """The values inside a value, with their relative paths. ``own``: without those in the state of optimizer and
    scheduler.
    """
    if isinstance(value, dict):
        yield from ((f"[{_key(key, place)}]", inner) for place, (key, inner) in enumerate([*value.items()]))
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{place}]", inner) for place, inner in enumerate(value))
    elif isinstance(value, nn.Module):  # such as a second model of the task
        yield from ((f".{name}", tensor) for name, tensor in (*value.named_parameters(), *value.named_buffers()))
        yield from ((f".{name}" if name else "", _ModuleAttributes(module)) for name, module in value.named_modules())
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
    """A key in words. For an object its type and position: its text may contain an address."""
    return repr(key) if isinstance(key, (*fingerprint.PLAIN, tuple)) else f"{type(key).__name__} {place}"


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, also those in slots."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    in_slots = {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}
    return in_slots | dict(getattr(value, "__dict__", {}))


def _variables(function: Any) -> dict[str, Any]:
    """The values that a function keeps from call to call: defaults, closure, attributes. Of a generator its locals."""
    if isinstance(function, GeneratorType):
        return getgeneratorlocals(function)
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    values: dict[str, Any] = dict(zip(names, defaults, strict=True))
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            values[name] = cell.cell_contents
    return {**values, **(function.__kwdefaults__ or {}), **vars(function)}

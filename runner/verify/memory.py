"""The memory of live objects: every value in words, so that memory outside a ``state_dict`` has a name.

Looks at objects without the methods that their classes override (no ``__getattr__``, ``__iter__``, property or
``__eq__`` of a user or a library is called), and never changes them. Modules in site-packages or the standard library
are not the user's.
"""

import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from enum import EnumMeta
from functools import partial
from inspect import getgeneratorlocals
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from runner.hashing import checksum
from runner.run.code import is_installed
from runner.verify import fingerprint
from runner.verify.fingerprint import UNSEEN, describe, is_a, module_name, type_name

# Labels in paths, by which ``causes`` tells kinds of memory apart; for a model's state that is in no attribute.
FROZEN = " (parameters with requires_grad=False)"
EVALUATING = " (modules in eval mode)"
GRADIENTS = " (gradients kept after the step)"
TIED = " (parameters that are the same object)"
LABELS = (FROZEN, EVALUATING, GRADIENTS, TIED)
LEFT_OUT = " (a parameter, not in its state_dict)"
NOT_PERSISTENT = " (a buffer, persistent=False)"
HOOKS = "_hooks["
PROCESS = "process: "

_DEPTH = 8  # attributes and items from an object of the experiment; deeper values are digested together
_FEW = 16  # items of a container that is entered item by item; larger containers are digested
_BUDGET = 300_000  # values that are looked at in one moment
_MANY = 10_000  # values of one container that are looked at, from its end
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_OPTIM = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_FIRST = ("model", "optimizer", "scheduler")  # visited first, and therefore skipped where other objects hold them
# Attributes of torch's optimizers and schedulers that are in every state_dict, or have no effect.
_SKIPPED = {"state", "param_groups", "defaults", "optimizer", "step", "_opt_called", "_get_lr_called_within_step"}
_PATCHED = ("torch", "torch.nn.functional", "torch.nn.modules.module", "numpy", "numpy.random", "random", "sys", "time")


class Value(NamedTuple):
    """A value in memory. The object at the path ``holder`` has it under ``key``, in the way that ``kind`` names. It is
    described by ``words``, or by the values inside it.
    """

    path: str  # relative to its holder while that is looked at
    value: Any
    kind: str = ""
    key: Any = None
    words: str | None = None
    holder: str = ""


def memory(objects: Mapping[str, Any], state: Any = None) -> dict[str, str]:
    """``path -> value in words`` for the values of the objects, their classes and the user's modules, without the
    parameters in ``state``, which is the model's state_dict.
    """
    return {path: each.words for path, each in values(objects, state).items() if each.words is not None}


def values(objects: Mapping[str, Any], state: Any = None) -> dict[str, Value]:
    """The same as objects, also of values that are described by the values inside them."""
    return _Walk(objects.get("model"), state).all(objects)


def private(objects: Mapping[str, Any]) -> list[str]:
    """The paths of internals of libraries: attributes with an underscore of objects of their classes."""
    by_path = values(objects)
    members = [each for each in by_path.values() if each.kind == "attribute" and str(each.key).startswith("_")]
    owners = [(each.path, type(by_path[each.holder].value)) for each in members if each.holder in by_path]
    return [path for path, owner in owners if not any(is_users(module_name(base)) for base in mro(owner))]


def modules_of(model: Any) -> dict[str, nn.Module]:
    """Each module of a model once, by its path from the model."""
    modules, waiting = {"": model}, [""]
    visited = {id(model)}
    while waiting:
        path = waiting.pop()
        for name, inner in dict.items(attributes(modules[path]).get("_modules", {})):
            if inner is not None and id(inner) not in visited:
                visited.add(id(inner))
                modules[f"{path}.{name}"] = inner
                waiting.append(f"{path}.{name}")
    return modules


def parameters_of(model: Any) -> list[tuple[str, Any]]:
    """Name and parameter, also where one parameter has several names."""
    return [
        (f"{path}.{name}".removeprefix("."), parameter)
        for path, module in modules_of(model).items()
        for name, parameter in dict.items(attributes(module).get("_parameters", {}))
        if parameter is not None
    ]


def _order(key: str) -> int:
    kind = key.partition(".")[0]  # optimizer.generator
    return _FIRST.index(kind) if kind in _FIRST else len(_FIRST)


class _Walk:
    """One look at all objects. Keeps them alive meanwhile, so that no other object gets the same id."""

    def __init__(self, model: Any, state: Any) -> None:
        self._values: dict[str, Value] = {}
        self._visited: dict[int, Any] = {}
        self._kinds: dict[int, tuple[str, type]] = {}  # classes by id, each with the object whose memory it counts as
        self._budget = _BUDGET
        self._own_names: set[str] = set()
        self._model = model if is_a(model, nn.Module) else None
        modules = [] if self._model is None else [*modules_of(model).values()]
        self._of_model = {id(module) for module in modules}
        self._saved_ids = _saved_parameters(model, state) if modules else None

    def all(self, objects: Mapping[str, Any]) -> dict[str, Value]:
        self._own_names = {name for name in objects if _order(name) < len(_FIRST)}
        for name, thing in sorted(objects.items(), key=lambda item: _order(item[0])):
            if thing is self._model:
                for path, module in modules_of(thing).items():
                    self._enter(name, Value(f"{name}{path}", module, "root", name), "")
                for label, content in labels(thing).items():
                    self._add(f"{name}{label}", thing, _label_words(label, content) or "none", name, label)
            else:
                self._enter(name, Value(name, thing, "root", name), "")
        self._shared()
        if self._budget <= 0:
            self._add("memory", None, f"{UNSEEN} as a whole: it has more than {_BUDGET} values")
        return self._values

    def _add(self, path: str, value: Any, words: str | None, holder: str = "", kind: str = "", key: Any = None) -> None:
        self._values.setdefault(path, Value(path, value, kind, key, words, holder))

    def _shared(self) -> None:
        """Values in the user's classes and modules, and functions that the user exchanged in a library."""
        done: set[str] = set()
        while self._kinds:  # looking at a class meets objects of further classes
            _, (root, kind) = self._kinds.popitem()
            users = [base for base in mro(kind) if is_users(module_name(base))]
            for base in mro(kind)[:-1]:
                if base in users:
                    self._class(root, base)
                else:
                    self._exchanged(base, class_dict(base), module_name(base), type_name(base))
            for module in [module for base in users for module in _modules(module_name(base))]:
                if module.__name__ not in done:
                    done.add(module.__name__)
                    self._namespace(root, module)
        for name in [name for name in [*sys.modules] if name not in done and is_users(name)]:  # imported in functions
            self._namespace("task", sys.modules[name])
        for name in _PATCHED:
            if name in sys.modules:
                self._exchanged(sys.modules[name], vars(sys.modules[name]), name, "")

    def _namespace(self, root: str, module: types.ModuleType) -> None:
        holder = f"{root} ({module.__name__})"
        self._add(holder, module, None, "", "module", module.__name__)
        for key, value in [*vars(module).items()]:
            if type(value) is type or is_a(value, type):
                if module_name(value) == module.__name__:
                    self._class(root, value)
            elif _is_value(key, value):
                self._enter(root, Value(f"{root} ({module.__name__}.{key})", value, "global", key), holder)

    def _class(self, root: str, kind: type) -> None:
        if id(kind) in self._visited or is_a(kind, EnumMeta):
            return
        self._visited[id(kind)] = kind
        holder = f"{root} ({module_name(kind)}.{type_name(kind)})"
        self._add(holder, kind, None, "", "type", (module_name(kind), type_name(kind)))
        for key, value in [*class_dict(kind).items()]:
            if _is_value(key, value):
                self._enter(root, Value(f"{holder[:-1]}.{key})", value, "class", key), holder)

    def _exchanged(self, holder: Any, values: Mapping[str, Any], module: str, name: str) -> None:
        if id(holder) in self._visited:
            return
        self._visited[id(holder)] = holder
        for key, value in [*values.items()]:
            of_user = type(value) is types.FunctionType and is_users(value.__globals__.get("__name__"))
            if of_user or (type(value) in (int, float, torch.Tensor) and not key.startswith("_")):
                path = ".".join(filter(None, (module, name, key)))
                self._add(f"{PROCESS}{path}", value, describe(value), "", "exchanged", (module, name, key))
            elif key.endswith(HOOKS[:-1]) and is_a(value, dict):
                self._enter("task", Value(f"{PROCESS}{module}.{key}", value), "")

    def _enter(self, root: str, first: Value, holder: str) -> None:
        stack = [(first.path, first, holder, 0)]
        while stack and self._budget > 0:
            path, child, holder, depth = stack.pop()
            self._budget -= 1
            inside: list[Value] = []
            try:
                words, inside = self._look(root, path, child.value, depth)
            except Exception as error:
                words = f"{UNSEEN} ({type_name(type(error))})"
            if child.kind == "saved":  # in the state_dict; hooks and the like inside it are memory all the same
                words = None
            self._add(path, child.value, words, holder, child.kind, child.key)
            stack += [(f"{path}{each.path}", each, path, depth + 1) for each in reversed(inside)]

    def _look(self, root: str, path: str, value: Any, depth: int) -> tuple[str | None, list[Value]]:
        """The words for a value, and the values inside it."""
        if id(value) in self._visited:
            return None, []
        words = describe(value)
        if words is not None and not _has_more(value, words):
            return words, []
        if depth >= _DEPTH or (is_a(value, dict, list, tuple, deque) and fingerprint.length(value) > _FEW):
            return self._digested(root, value), []
        self._visited[id(value)] = value
        self._kinds.setdefault(id(type(value)), (root, type(value)))
        inside = self._inside(path, value)
        if is_a(value, nn.Module) or is_users(module_name(type(value))):
            inside.append(Value(" (its class)", type(value), "set", "__class__"))
        return words, inside

    def _inside(self, path: str, value: Any) -> list[Value]:
        if is_a(value, nn.Module):
            return [*self._in_module(value)]
        inside = [*_inside(value)]
        if is_a(value, nn.Parameter) and not path.startswith("model"):  # which has GRADIENTS
            inside.append(Value(".grad", value.grad, "set", "grad"))
        if path in self._own_names and is_a(value, *_OPTIM):
            return [each for each in inside if each.key not in _SKIPPED]
        return inside

    def _in_module(self, module: Any) -> Iterator[Value]:
        members, of_model = attributes(module), id(module) in self._of_model
        transient = members.get("_non_persistent_buffers_set", ())
        for name, inner in dict.items(members.get("_parameters", {})):
            if inner is not None:
                saved = of_model and (self._saved_ids is None or id(inner) in self._saved_ids)
                label = LEFT_OUT if of_model and not saved else ""
                yield Value(f".{name}{label}", inner, "saved" if saved else "_parameters", name)
        for name, inner in dict.items(members.get("_buffers", {})):
            if inner is not None:
                saved = of_model and name not in transient
                label = NOT_PERSISTENT if of_model and not saved else ""
                yield Value(f".{name}{label}", inner, "saved" if saved else "_buffers", name)
        for name, inner in dict.items(members.get("_modules", {})):
            if id(inner) not in self._of_model:  # these are entered by themselves
                yield Value(f".{name}", inner, "_modules", name)
        for name, inner in members.items():
            hooks = name.endswith("_hooks") and is_a(inner, dict) and fingerprint.length(inner)
            # The modes of the model's modules have a label of their own, EVALUATING; others begin in training mode.
            counts = name not in _INTERNAL and not (name == "training" and (of_model or inner is True))
            if hooks or counts:
                yield Value(f".{name}", inner, "attribute", name)

    def _digested(self, root: str, value: Any) -> str:
        """A value and all values inside it, in one line."""
        plain, rest = fingerprint.plain_bytes(value), ""
        if plain is None:
            pieces: list[bytes] = []
            waiting = [("", value)]
            while waiting and self._budget > 0 and len(pieces) < _MANY:
                key, inner = waiting.pop()
                self._budget -= 1
                words = describe(inner)
                pieces.append(f"{key} {words or type_name(type(inner))}".encode())
                if (words is None or _has_more(inner, words)) and id(inner) not in self._visited:
                    self._visited[id(inner)] = inner
                    self._kinds.setdefault(id(type(inner)), (root, type(inner)))
                    waiting += [(each.path, each.value) for each in self._inside("", inner)]
            plain, rest = b"\n".join(pieces), f", most of which {UNSEEN}" if waiting else ""
        size = f" of {fingerprint.length(value)}" if is_a(value, dict, list, tuple, deque) else ""
        return f"a {type_name(type(value))}{size} {fingerprint.short_digest(checksum(plain).encode())}{rest}"


def labels(model: Any) -> dict[str, Any]:
    """The state of a model that is in no ``state_dict`` and no attribute, by its label: names of parameters, or values
    by name; of parameters that are one object, the first name by each other name.
    """
    parameters, modules = parameters_of(model), modules_of(model)
    first = {id(parameter): name for name, parameter in reversed(parameters)}
    return {
        FROZEN: [name for name, parameter in parameters if not parameter.requires_grad],
        EVALUATING: [path for path, module in modules.items() if not attributes(module).get("training", True)],
        GRADIENTS: {name: parameter.grad for name, parameter in parameters if parameter.grad is not None},
        TIED: {name: first[id(parameter)] for name, parameter in parameters if first[id(parameter)] != name},
    }


def _label_words(label: str, values: Any) -> str:
    if label == GRADIENTS:
        return ", ".join(f"{name} {fingerprint.describe_array(value)}" for name, value in values.items())
    if label == TIED:
        return ", ".join(f"{first} = {name}" for name, first in values.items())
    return ", ".join(name.removeprefix(".") for name in values)


def _saved_parameters(model: Any, state: Any) -> set[int] | None:
    """The ids of the parameters that a state_dict has, by their name or by their memory; None without a state_dict."""
    if state is None:
        return None
    missing = [(name, parameter) for name, parameter in parameters_of(model) if name not in state]
    pointers = {value.data_ptr() for value in state.values() if is_a(value, torch.Tensor)} if missing else set()
    unsaved = {id(parameter) for _, parameter in missing if parameter.data_ptr() not in pointers}
    return {id(parameter) for _, parameter in parameters_of(model)} - unsaved


def _has_more(value: Any, words: str) -> bool:
    """Whether a value that has words may have attributes or variables, too."""
    if type(value) is types.FunctionType:
        return is_users(value.__globals__.get("__name__"))
    bound = type(value) is types.BuiltinFunctionType and not is_a(value.__self__, types.ModuleType, type, type(None))
    return bound or is_a(value, types.MethodType, torch.Tensor) or (words.startswith(UNSEEN) and bool(dict_of(value)))


def _inside(value: Any) -> Iterator[Value]:
    """The values inside a value, with their relative paths."""
    if is_a(value, dict):
        keys = []
        for number, (key, inner) in enumerate(fingerprint.items(value)[-_MANY:]):
            keys.append(_key(key, number))
            yield Value(f"[{keys[-1]}]", inner, "item", key)
        if len(keys) > 1:
            yield Value(" (its order)", ", ".join(keys))
    elif is_a(value, list, tuple, deque):
        content = [*fingerprint.base_of(value, list, tuple, deque).__iter__(value)][-_MANY:]
        yield from (Value(f"[{number}]", inner, "item", number) for number, inner in enumerate(content))
    elif is_a(value, np.ndarray):
        flat = np.ndarray.ravel(np.ndarray.view(value, np.ndarray))
        yield from (Value(f"[{number}]", inner, "", number) for number, inner in enumerate(flat.tolist()))
    elif is_a(value, partial):  # without kinds: its parts cannot be set
        parts = [*enumerate(value.args), *value.keywords.items()]
        yield from (Value(f"[{key!r}]", inner, "", key) for key, inner in [("function", value.func), *parts])
    elif is_a(value, torch.Tensor):
        descriptor: Any = torch._C.TensorBase._backward_hooks
        hooks = [*dict.values(descriptor.__get__(value) or {})]
        yield from (Value(f"._backward_hooks[{number}]", hook, "hook", number) for number, hook in enumerate(hooks))
    else:
        yield from _inside_code(value)
    if type(value) is not types.FunctionType and not is_a(value, partial):
        yield from (Value(f".{key}", inner, "attribute", key) for key, inner in attributes(value).items())


def _inside_code(value: Any) -> Iterator[Value]:
    """The values that functions, generators and references keep."""
    if type(value) is types.FunctionType:
        yield from variables(value)
    elif type(value) is types.GeneratorType:
        frame = value.gi_frame
        yield Value(" (its position)", frame and frame.f_lasti, "", None)
        yield from (Value(f" (its {key})", inner, "", key) for key, inner in getgeneratorlocals(value).items())
    elif is_a(value, types.MethodType, types.BuiltinFunctionType):
        yield Value(".__self__", value.__self__, "", "__self__")
    elif type(value) is ContextVar:
        yield Value(" (its value)", value.get(None), "context", None)
    elif is_a(value, weakref.ref):
        yield Value(" (its object)", weakref.ref.__call__(value), "", None)


def _key(key: Any, number: int) -> str:
    """A key in words. For an object its type and position: its text may contain an address."""
    parts = key if type(key) is tuple else (key,)
    return repr(key) if all(id(type(part)) in _PLAIN for part in parts) else f"{type_name(type(key))} {number}"


_PLAIN = frozenset(map(id, fingerprint.PLAIN))  # by id: a metaclass may override __eq__


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, also those in slots, without its properties."""
    in_slots: dict[str, Any] = {}
    for name, slot in layout(type(value))[0]:
        with suppress(AttributeError):  # an empty slot
            in_slots.setdefault(name, slot.__get__(value))
    in_dict = dict_of(value)
    return in_slots | (dict(dict.items(in_dict)) if in_dict else {})


_LAYOUTS: dict[int, tuple[type, list[tuple[str, Any]], Any]] = {}  # by id: a metaclass may override __hash__


def layout(kind: type) -> tuple[list[tuple[str, Any]], Any]:
    """The slots of a class, and the descriptor of ``__dict__``."""
    if id(kind) not in _LAYOUTS:
        members = [member for base in mro(kind) for member in class_dict(base).items()]
        slots = [(n, slot) for n, slot in members if type(slot) is _DESCRIPTORS[1] and not n.startswith("__")]
        dicts = [slot for name, slot in members if name == "__dict__" and is_a(slot, *_DESCRIPTORS)]
        _LAYOUTS[id(kind)] = kind, slots, dicts[0] if dicts else None
    return _LAYOUTS[id(kind)][1:]


def dict_of(value: Any) -> Any:
    """The ``__dict__`` of an object itself; of a ``threading.local``, for this thread. None if it has none."""
    if is_a(value, local):
        return local.__getattribute__(value, "__dict__")
    descriptor = layout(type(value))[1]
    return descriptor.__get__(value) if descriptor else None


def mro(kind: type) -> tuple[type, ...]:
    """A class and its bases in the order of lookup, whatever its metaclass does."""
    return type.__dict__["__mro__"].__get__(kind)  # type: ignore[no-any-return]


def class_dict(kind: type) -> Mapping[str, Any]:
    """The attributes of a class itself, whatever its metaclass does."""
    return type.__dict__["__dict__"].__get__(kind)  # type: ignore[no-any-return]


def variables(function: Any) -> Iterator[Value]:
    """The values that a function keeps from call to call: defaults, closure, attributes."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    entries = [(name, value, "default", n) for n, (name, value) in enumerate(zip(names, defaults, strict=True))]
    entries += [(name, value, "keyword", name) for name, value in (function.__kwdefaults__ or {}).items()]
    for number, (name, cell) in enumerate(zip(code.co_freevars, function.__closure__ or (), strict=True)):
        with suppress(ValueError):  # an empty cell
            entries.append((name, cell.cell_contents, "cell", number))
    entries += [(name, value, "attribute", name) for name, value in vars(function).items()]
    return (Value(f" (its {name})", value, kind, key) for name, value, kind, key in entries)


def _is_value(key: str, value: Any) -> bool:
    """Whether a name of a class or a module stands for a value, a stateful function or an exchanged function."""
    if is_a(value, staticmethod, classmethod):
        value = value.__func__
    elif type(value) is property:
        value = value.fget
    if type(value) is types.FunctionType:
        state = value.__closure__ or value.__defaults__ or value.__kwdefaults__ or vars(value)
        # Under a name other than its own it was assigned, perhaps by training, in place of another function.
        return value.__code__.co_name != key or (bool(state) and is_users(value.__globals__.get("__name__")))
    no_value = (types.ModuleType, type, types.BuiltinFunctionType, *_DESCRIPTORS, types.MethodDescriptorType)
    return value is not None and not key.startswith(("__", "_abc_")) and not is_a(value, *no_value)


def _modules(name: str) -> list[types.ModuleType]:
    """A module, and the user's modules that it imports, or imports functions, classes or objects from."""
    modules = {name: sys.modules[name]} if name in sys.modules else {}
    waiting = [*modules]
    while waiting:
        for value in [*vars(modules[waiting.pop()]).values()]:
            if type(value) is types.ModuleType:
                home = value.__name__
            elif type(value) is types.FunctionType:
                home = value.__globals__.get("__name__") or ""
            else:
                home = module_name(value if is_a(value, type) else type(value))
            if home in sys.modules and home not in modules and is_users(home):
                modules[home] = sys.modules[home]
                waiting.append(home)
    return [*modules.values()]


def is_users(name: Any) -> bool:
    """Whether a module is the user's own: neither installed, nor of the standard library, nor of the runner."""
    if type(name) is not str or name.partition(".")[0] in ("runner", "torch", "numpy"):
        return False
    module = sys.modules.get(name)  # anything: libraries in C put objects of their own there
    file = dict_of(module).get("__file__") if is_a(module, types.ModuleType) else None
    return type(file) is str and not is_installed(file)

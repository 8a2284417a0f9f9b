"""Memory on trial: values are taken from an undisturbed process and put into a resumed one. A value that makes both go
on alike is the cause of their difference; any other is not.

The values are pickled: into a file in the temporary folder of the proof, which belongs to this user alone, and never
into a run directory.
"""

import decimal
import functools
import io
import os
import pickle
import re
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runner.verify import fingerprint, memory
from runner.verify.fingerprint import is_a
from runner.verify.memory import EVALUATING, FROZEN, GRADIENTS, LABELS, PROCESS, Value

# A setting of the process that training may change: how it is read and set.
_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _flag(name: str) -> _Setting:
    folder, _, flag = name.rpartition(".")
    owner = attrgetter(folder)(torch.backends)
    return lambda: getattr(owner, flag), lambda value: setattr(owner, flag, value)


_TORCH = ("default_dtype", "default_device", "float32_matmul_precision", "num_threads", "deterministic_debug_mode")
_FLAGS = ("mkldnn.enabled", "cudnn.enabled", "cudnn.benchmark", "cudnn.deterministic", "cudnn.allow_tf32")
_AUTOCAST = partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")
_AUTOCAST_TYPE = partial(torch.get_autocast_dtype, "cpu"), partial(torch.set_autocast_dtype, "cpu")
_SETTINGS: dict[str, _Setting] = {
    "torch.set_flush_denormal()": (lambda: float(torch.tensor(1e-38) / 10) == 0, torch.set_flush_denormal),
    **{f"torch.get_{name}()": (getattr(torch, f"get_{name}"), getattr(torch, f"set_{name}")) for name in _TORCH},
    **{f"torch.backends.{name}": _flag(name) for name in _FLAGS},
    "torch.is_grad_enabled()": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.is_anomaly_enabled()": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.is_autocast_enabled('cpu')": _AUTOCAST,
    "torch.get_autocast_dtype('cpu')": _AUTOCAST_TYPE,
    "numpy.geterr()": (np.geterr, lambda value: np.seterr(**value)),
    "numpy.get_printoptions()": (np.get_printoptions, lambda value: np.set_printoptions(**value)),
    "decimal.getcontext().prec": (
        lambda: decimal.getcontext().prec,
        lambda value: setattr(decimal.getcontext(), "prec", value),
    ),
    "os.getcwd()": (os.getcwd, os.chdir),
    "sys.getrecursionlimit()": (sys.getrecursionlimit, sys.setrecursionlimit),
}
_VARIABLE = re.compile(r"os\.environ\['(.*)'\]", re.DOTALL)


def _setting(name: str) -> _Setting:
    match = _VARIABLE.fullmatch(name)
    return (partial(os.environ.get, match[1]), partial(_export, match[1])) if match else _SETTINGS[name]


def _export(variable: str, value: str | None) -> None:
    os.environ.pop(variable, None)
    os.environ.update({} if value is None else {variable: value})


def settings() -> dict[str, str]:
    """Settings of the whole process in words; of environment variables their digests."""
    values = {f"{PROCESS}{name}": str(read()) for name, (read, _) in _SETTINGS.items()}
    for key, value in [*os.environ.items()]:
        digest = fingerprint.short_digest(str(fingerprint.describe(value)).encode())
        values[f"{PROCESS}os.environ[{key!r}]"] = digest
    return values


def take(paths: Iterable[str], objects: Mapping[str, Any], state: Any, file: Path) -> None:
    """Write copies of the values at these paths into a file. A value that cannot be copied is left out."""
    values = memory.values(objects, state)
    copies: dict[str, Any] = {}
    for path in paths:
        each = values.get(path, Value(path, None, "setting", path.removeprefix(PROCESS)))
        stream = io.BytesIO()
        try:
            content = _setting(each.key)[0]() if each.kind == "setting" else each.value
            content = memory.labels(content)[each.kind] if each.kind in LABELS else content
            _Pickler(stream, values, path).dump(content)
        except Exception:  # a lambda, a lock, a connection
            continue
        copies[path] = each.holder, each.kind, each.key, stream.getvalue()
    file.write_bytes(pickle.dumps(copies))


def put(paths: Iterable[str], objects: Mapping[str, Any], state: Any, file: Path) -> list[str]:
    """Give the objects of this process the values that ``take`` wrote; returns the paths that were possible."""
    copies, possible = pickle.loads(file.read_bytes()), []
    values: dict[str, Value] = {}
    for path in [path for path in paths if path in copies]:
        holder, kind, key, data = copies[path]
        values = values or memory.values(objects, state)
        try:
            _assign(values[holder].value if holder else None, kind, key, _Unpickler(io.BytesIO(data), values).load())
            possible.append(path)
        except Exception as error:
            warnings.warn(f"{path} cannot be put into this process: {error}", stacklevel=2)
        if kind != "setting":
            values = {}  # the assignment may have changed them
    return possible


class _Pickler(pickle.Pickler):
    """Copies the value at a path; objects elsewhere, such as parameters of the model, are named by their paths."""

    def __init__(self, stream: io.BytesIO, values: Mapping[str, Value], path: str) -> None:
        super().__init__(stream)
        inside = tuple(f"{path}{separator}" for separator in (".", "[", " ("))  # is copied, as a part of the value
        objects = [each for each in values.values() if each.words is None or is_a(each.value, torch.Tensor)]
        first = {id(each.value): each.path for each in reversed(objects)}
        self._paths = {key: name for key, name in first.items() if name != path and not name.startswith(inside)}

    def persistent_id(self, value: Any) -> str | None:
        return self._paths.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        if is_a(value, functools._lru_cache_wrapper):  # pickle would store its name alone
            raise pickle.PicklingError
        if is_a(value, staticmethod, classmethod):
            return type(value), (value.__func__,)
        return (property, (value.fget, value.fset, value.fdel)) if is_a(value, property) else NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, values: Mapping[str, Value]) -> None:
        super().__init__(stream)
        self._values = values

    def persistent_load(self, path: Any) -> Any:
        return self._values[path].value


def _assign(holder: Any, kind: str, key: Any, value: Any) -> None:
    """Give a holder a value: if possible by a change of the object that it has, because others may hold that, too."""
    if kind == "setting":
        _setting(key)[1](value)
    elif kind in LABELS:
        _set_labels(holder, kind, value)
    elif kind == "exchanged":
        module, name, attribute = key
        owner = vars(sys.modules[module])[name] if name else sys.modules[module]
        setattr(owner, attribute, value)
    elif kind in ("context", "set"):
        setattr(holder, key, value) if kind == "set" else holder.set(value)
    elif kind == "default":
        holder.__defaults__ = (*holder.__defaults__[:key], value, *holder.__defaults__[key + 1 :])
    elif kind == "cell":
        holder.__closure__[key].cell_contents = value
    elif kind == "class":
        if not _transfer(memory.class_dict(holder).get(key), value):
            type.__setattr__(holder, key, value)
    elif kind == "attribute" and (slot := dict(memory.layout(type(holder))[0]).get(key)):
        slot.__set__(holder, value)
    else:
        _store(_table(holder, kind), key, value)


def _table(holder: Any, kind: str) -> Any:
    """The dict or list of a holder that contains a value."""
    if kind in ("item", "root"):
        return holder
    if kind == "global":
        return vars(holder)
    if kind == "keyword":
        return holder.__kwdefaults__
    attributes = memory.dict_of(holder)
    return attributes[kind] if kind.startswith("_") else attributes  # _parameters of a module


def _store(table: Any, key: Any, value: Any) -> None:
    base = fingerprint.base_of(table, OrderedDict, dict, list)  # a user's class may override these methods
    old = list.__getitem__(table, key) if base is list else dict.get(table, key)
    if not _transfer(old, value):
        base.__setitem__(table, key, value)


def _transfer(old: Any, new: Any) -> bool:
    """Make an object equal to a copy of another; False if it cannot be changed in place."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if is_a(old, torch.Generator):
        old.set_state(new.get_state())
    elif is_a(old, torch.Tensor, np.ndarray):
        if old.shape != new.shape or old.dtype != new.dtype or (is_a(old, np.ndarray) and not old.flags.writeable):
            return False
        old.data.copy_(new.data) if is_a(old, torch.Tensor) else np.copyto(old, new)
    else:
        return _transfer_items(old, new)
    return True


def _transfer_items(old: Any, new: Any) -> bool:
    if is_a(old, dict):
        content = fingerprint.items(new)
        before = {id(key): dict.get(old, key) for key, _ in content}
        kind = OrderedDict if is_a(old, OrderedDict) else dict  # an OrderedDict has its order outside of the dict
        kind.clear(old)
        for key, value in content:
            old_value = before[id(key)]
            kind.__setitem__(old, key, old_value if _transfer(old_value, value) else value)
    elif is_a(old, list, deque, bytearray, set):
        base, values = fingerprint.base_of(old, list, deque, bytearray, set), new
        if is_a(old, list) and len(old) == len(new):
            pairs = zip(list.__iter__(old), list.__iter__(new), strict=True)
            values = [mine if _transfer(mine, value) else value for mine, value in pairs]
        values = base(values)
        base.clear(old)
        (base.update if base is set else base.extend)(old, values)
    elif memory.dict_of(old) is not None and not fingerprint.describe(old) and not is_a(old, partial):
        return _transfer_items(memory.dict_of(old), memory.dict_of(new))
    else:
        return False
    return True


def _set_labels(model: Any, label: str, values: Any) -> None:
    if label == EVALUATING:
        for path, module in memory.modules_of(model).items():
            module.training = path not in values
        return
    parameters = dict(memory.parameters_of(model))
    for name, parameter in parameters.items():
        if label == FROZEN:
            parameter.requires_grad_(name not in values)
        elif label == GRADIENTS:
            parameter.grad = values.get(name)
        elif name in values:
            path, _, key = name.rpartition(".")
            memory.dict_of(model.get_submodule(path))["_parameters"][key] = parameters[values[name]]

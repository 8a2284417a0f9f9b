"""States as digests, which are compared leaf by leaf without keeping the states; and values of objects in words, to be
compared and shown.
"""

import ctypes
import functools
import io
import json
import logging
import marshal
import random
import re
import types
import warnings
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from enum import EnumMeta
from functools import partial
from mmap import mmap
from pathlib import PurePath
from threading import Condition, Event, Lock, RLock, Thread, local
from typing import Any

import numpy as np
import torch
from torch import nn

from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import keyed_digest
from runner.checkpoint.sharding import is_distributed
from runner.hashing import hex_digest

_FEW_KEYS = 64  # a larger dict is digested as a whole
_SHORT = 48  # characters of a value that stands for itself


def fingerprint(state: Mapping[str, Any]) -> dict[str, str]:
    """``path -> digest`` of every tensor and value of a state; a short value stands for itself."""
    digests: dict[str, str] = {}
    for part, inner in state.items():
        value, tensors = encode(inner, part)
        digests |= {name: of_value(tensor) for name, tensor in tensors.items()}
        digests |= dict(_values(part, value))
    return digests


def of_value(value: Any) -> str:
    """A tensor, an array or a plain value in a few characters, which are equal only if the values are, bit for bit. For
    any other object its type: its text may contain an address. A sharded tensor is gathered: all ranks must call this.
    """
    if isinstance(value, np.ndarray | np.generic) and not np.asarray(value).dtype.hasobject:
        array = np.ascontiguousarray(value)
        return f"{array.dtype}{[*array.shape]} {keyed_digest(array.reshape(-1).view(np.uint8).data)}"
    if isinstance(value, torch.Tensor):
        whole: torch.Tensor = value.full_tensor() if is_distributed(value) else value  # type: ignore[attr-defined]
        tensor = whole.detach().cpu()
        tensor = (tensor if tensor.layout is torch.strided else tensor.to_dense()).resolve_conj().resolve_neg()
        tensor = tensor.contiguous()  # kept while its memory is read
        return f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]} {keyed_digest(_memory(tensor))}"
    if not isinstance(value, str | bytes | int | float | bool | None):
        return type(value).__qualname__
    text = repr(value)
    return text if len(text) <= _SHORT else keyed_digest(text.encode())


def _values(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value.get("$") == "ordered":
        value = value["items"]
    if isinstance(value, dict) and "$" not in value and 0 < len(value) <= _FEW_KEYS:
        for key, inner in value.items():
            yield from _values(f"{path}/{key}", inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _values(f"{path}/{number}", inner)
    elif not (isinstance(value, dict) and value.get("$") == "tensor"):
        text = json.dumps(value, sort_keys=True)
        yield path, text if len(text) <= _SHORT else keyed_digest(text.encode())


PLAIN = (str, bytes, bool, int, float, complex, type(None))

_WIDE = 40  # characters up to which a value is shown whole
IN_STATE = " in state "  # stands in the description of every generator of random numbers
UNSEEN = "cannot be looked into"
names_of_runs: list[str] = []  # folders that are named after this process's run; texts in memory may have them

_NO_VALUE = (types.ModuleType, types.CodeType, types.FrameType, types.TracebackType, logging.Logger)
_CONSTANT = (torch.dtype, torch.device, torch.layout, re.Pattern, slice, range, type(...), types.GenericAlias, Thread)
_LOCKS = (type(Lock()), type(RLock()), Condition, Event)
_BYTES = (bytearray, array, mmap, ctypes._SimpleCData, ctypes.Structure, ctypes.Array)
# Objects of the runner that a callback may hold, whose memory is the state or none.
_RUNNERS = ("runner.state", "runner.callbacks.", "runner.update", "runner.storage", "runner.run.", "runner.verify")


def is_a(value: Any, *kinds: type) -> bool:
    """``isinstance``, without asking the object, which may say anything of its ``__class__``."""
    return issubclass(type(value), kinds)


def type_name(kind: type) -> str:
    """The name of a class, whatever its metaclass does."""
    return str(type.__dict__["__name__"].__get__(kind))


def module_name(kind: type) -> str:
    """The name of the module of a class."""
    name = type.__dict__["__module__"].__get__(kind)
    return name if type(name) is str else ""


def base_of(value: Any, *kinds: type) -> Any:
    """The first of these builtin classes that a value is an instance of, to call its methods; None for any other."""
    return next((kind for kind in kinds if is_a(value, kind)), None)


def length(value: Any) -> int:
    """The length of a container of a builtin kind."""
    return int(base_of(value, dict, list, tuple, deque, set, frozenset).__len__(value))


def describe(value: Any) -> str | None:
    """A value in words, without a call of a method that its class overrides; None for an object with values inside."""
    kind = type(value)
    if value is None or is_a(value, *PLAIN[:-1], PurePath):
        return _short(_text(value))
    if is_a(value, torch.Tensor, np.ndarray, np.generic):
        return None if is_a(value, np.ndarray) and value.dtype.hasobject else describe_array(value)
    if is_a(value, *_BYTES):
        return f"{type_name(kind)} {short_digest(memoryview(value).tobytes())}"
    if is_a(kind, EnumMeta):
        return f"{type_name(kind)}.{object.__getattribute__(value, '_name_')}"
    if is_a(value, *_NO_VALUE, *_CONSTANT, *_LOCKS) or module_name(kind).startswith(_RUNNERS):
        return f"a {type_name(kind)}"
    if is_a(value, set, frozenset):
        return f"a {type_name(kind)} of {length(value)} {_unordered(value)}"
    return _code(value) or _generator(value) or _opaque(value)


def _code(value: Any) -> str | None:
    """A class or a function in words."""
    if is_a(value, type):
        return f"the class {module_name(value)}.{type_name(value)}"
    if is_a(value, staticmethod, classmethod):
        return describe(value.__func__)
    if is_a(value, property):
        return describe(value.fget)
    if type(value) is types.FunctionType:
        return f"the function {value.__qualname__} of line {value.__code__.co_firstlineno}"
    if type(value) is types.BuiltinFunctionType and is_a(value.__self__, types.ModuleType, type, type(None)):
        return f"the function {value.__qualname__}"
    return None


def _text(value: Any) -> str:
    if is_a(value, PurePath):
        value = PurePath.__str__(value)
    base = base_of(value, *PLAIN)
    text = str(base.__repr__(value)) if base else ""
    for name in names_of_runs if is_a(value, str) else ():
        text = text.replace(name, "(run)")
    return text


def _opaque(value: Any) -> str | None:
    """Words for an object of a class that is written in C, which no attribute shows; None for any other."""
    kind = type(value)
    if kind is functools._lru_cache_wrapper:
        info = value.cache_info()
        return f"a cache of {info.currsize} results, {info.misses} misses"
    if is_a(value, io.BytesIO, io.StringIO):
        content = io.BytesIO.getvalue(value) if is_a(value, io.BytesIO) else io.StringIO.getvalue(value).encode()
        return f"a {type_name(kind)} at {value.tell()} {short_digest(content)}"
    if module_name(kind) in ("itertools", "builtins", "collections") and "__next__" in vars(kind):
        return None if kind is types.GeneratorType else _iterator(value)
    return f"{UNSEEN} ({module_name(kind)}.{type_name(kind)})" if is_opaque(kind) else None


def _iterator(value: Any) -> str:
    """The position of an iterator of python's own, which says how it would be copied."""
    pieces, waiting, visited = [], [value], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        while waiting:
            inner = waiting.pop()
            visited[id(inner)] = inner
            if "__next__" in vars(type(inner)) and type(inner) is not types.GeneratorType:
                kind: Any = type(inner)
                parts = kind.__reduce__(inner)
            else:
                parts = inner if type(inner) is tuple else ()
                pieces.append((parts and "(") or describe(inner) or str(plain_bytes(inner)))
            waiting += [each for each in parts if id(each) not in visited]
    return f"a {type_name(type(value))} at {short_digest(repr(pieces).encode())}"


_OPAQUE: dict[int, tuple[type, bool]] = {}
_ENTERED: tuple[type, ...] = (dict, list, tuple, deque, BaseException, partial, nn.Module, local, types.SimpleNamespace)
_ENTERED += (types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)
_ENTERED += (types.GeneratorType, ContextVar, weakref.ref)


def is_opaque(kind: type) -> bool:
    """Whether objects of a class may hold values that no attribute shows: it or a base has methods in C."""
    if id(kind) not in _OPAQUE:
        methods = (types.MethodDescriptorType, types.ClassMethodDescriptorType)
        bases = [] if issubclass(kind, _ENTERED) else type.__dict__["__mro__"].__get__(kind)[:-1]
        in_c = any(type(each) in methods for base in bases for each in type.__dict__["__dict__"].__get__(base).values())
        _OPAQUE[id(kind)] = kind, in_c
    return _OPAQUE[id(kind)][1]


def plain_bytes(value: Any) -> bytes | None:
    """A container of plain values in bytes; None if it holds any object."""
    base = base_of(value, dict, list, tuple, deque)
    if base is None:
        return None
    content = items(value) if base is dict else [*base.__iter__(value)]
    try:
        return marshal.dumps(content, 2)  # this version depends on values alone
    except ValueError:
        return None


def items(value: Any) -> list[tuple[Any, Any]]:
    """The items of a dict in their order, without a method that its class overrides."""
    pairs = [*dict.items(value)]
    if not is_a(value, OrderedDict):
        return pairs
    by_id = {id(key): (key, inner) for key, inner in pairs}
    return [by_id[id(key)] for key in OrderedDict.__iter__(value)]


def _unordered(value: Any) -> str:
    words = [_text(each) or type_name(type(each)) for each in base_of(value, set, frozenset).__iter__(value)]
    return short_digest(repr(sorted(words)).encode())


def _generator(value: Any) -> str | None:
    if is_a(value, torch.Generator):
        return f"torch.Generator{IN_STATE}{short_digest(torch.Generator.get_state(value).numpy().tobytes())}"
    if is_a(value, np.random.Generator, np.random.BitGenerator):
        bits = value.bit_generator if is_a(value, np.random.Generator) else value
        return f"numpy.random.{type_name(type(value))}{IN_STATE}{short_digest(repr(bits.state).encode())}"
    if is_a(value, np.random.RandomState):
        return f"numpy.random.RandomState{IN_STATE}{short_digest(repr(value.get_state()).encode())}"
    if is_a(value, random.Random):
        return f"random.Random{IN_STATE}{short_digest(repr(random.Random.getstate(value)).encode())}"
    return None


def _memory(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous CPU tensor. After a view by numpy, FSDP could not resize the storage any more."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_ubyte * size).from_address(tensor.data_ptr()) if size else b""


def describe_array(value: Any) -> str:
    """A tensor or an array in words, from all its bytes."""
    if is_a(value, torch.Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            tensor: Any = value.detach()
            tensor = tensor.to_local() if is_distributed(tensor) else tensor
            freed = tensor.layout is torch.strided and tensor.numel() and not tensor.untyped_storage().nbytes()
            if tensor.device.type == "meta" or freed:
                return f"{tensor.dtype}{[*tensor.shape]} without values"
            single, text = tensor.numel() == 1, of_value(tensor)
            return _short(repr(tensor.item())) if single else _of_array(tensor, text)
    plain: Any = np.ndarray.view(value, np.ndarray) if is_a(value, np.ndarray) else value
    if _is_read_only_file(plain):  # it may be of any size, and nothing here can change it
        return f"{plain.dtype}{[*plain.shape]} of a file"
    return _short(repr(plain.item())) if plain.size == 1 else _of_array(plain, of_value(plain))


def _is_read_only_file(array: Any) -> bool:
    writable = array.flags.writeable
    while is_a(array, np.ndarray):
        array = array.base
    return is_a(array, mmap) and not writable


def _of_array(value: Any, text: str) -> str:
    return f"{value.dtype}{[*value.shape]} {short_digest(text.encode())}"


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]}... {short_digest(text.encode())}"


def short_digest(data: bytes) -> str:
    """A few characters, equal for equal bytes."""
    return hex_digest(data, size=4)

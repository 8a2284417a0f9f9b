"""A user's iterable and its state: looked at without a trace, and in a form that a checkpoint takes."""

import math
from contextlib import suppress
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch

_MANY = 10_000  # items of an attribute that is data, and that a copy need not have for itself
_PLAIN = (str, int, float, bool, torch.Tensor, type(None))
_NUMPY = "numpy"  # key of a dict in place of a number or an array
_NUMBERS = "biufcmM"  # kinds of them


def stateful(thing: Any) -> bool:
    """Whether it can tell where it is and go there."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def duplicate(samples: Any) -> Any:
    """A copy that can be read without a trace in the original, with which it shares only large data."""
    values = getattr(samples, "__dict__", {}).values()
    shared: list[Any] = [value for value in values if isinstance(value, list | tuple | dict) and len(value) > _MANY]
    arrays = [value for value in values if isinstance(value, np.ndarray | torch.Tensor)]
    shared += [array for array in arrays if math.prod(array.shape) > _MANY]
    return deepcopy(samples, {id(value): value for value in shared})


def iterator(samples: Any) -> Any:
    """An iterator over a copy, from which nothing is read: making it may change the object, also for the workers."""
    try:
        samples = duplicate(samples)
    except Exception:  # an open file, a lock
        with suppress(Exception):
            samples = copy(samples)
    return iter(samples)


def packed(value: Any) -> Any:
    """A state with numbers and arrays of numpy as plain values."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in _NUMBERS:
        shape = [*value.shape] if isinstance(value, np.ndarray) else None
        return {_NUMPY: value.dtype.str, "shape": shape, "bytes": value.tobytes().hex()}
    if type(value) is dict:
        return {key.item() if isinstance(key, np.generic) else key: packed(item) for key, item in value.items()}
    return type(value)(map(packed, value)) if type(value) in (list, tuple) else value


def unpacked(value: Any) -> Any:
    """The state that ``packed`` was given; nothing in it is shared with ``value``."""
    if type(value) is dict and value.keys() == {_NUMPY, "shape", "bytes"}:
        array = np.frombuffer(bytearray.fromhex(value["bytes"]), value[_NUMPY])
        return array[0] if value["shape"] is None else array.reshape(value["shape"])
    if type(value) is dict:
        return {key: unpacked(item) for key, item in value.items()}
    return type(value)(map(unpacked, value)) if type(value) in (list, tuple) else deepcopy(value)


def not_plain(value: Any) -> str | None:
    """The first type in a state which a checkpoint does not take; a worker could not even send some of them."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((kind for item in value if (kind := not_plain(item))), None)
    return None if isinstance(value, _PLAIN) else type(value).__qualname__

"""A value that some object remembers, in words, so that two of them can be compared and shown.

Of data that is large a sample of the values is looked at.
"""

import itertools
import operator
import random
from array import array
from collections import deque
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from runner.checkpoint.layout import is_distributed
from runner.verify.fingerprint import of_value

PLAIN = (str, bytes, int, float, complex, bool, type(None))

_COUNTED = (itertools.count, itertools.repeat)
_FEW = 16  # items of a container that are looked at one by one
_MANY = 1000  # items of a container whose values are looked at
_LARGE = 1 << 20  # bytes of an array, of which more is not looked at than a sample of values
_SAMPLE = 4096  # of these
_WIDE = 40  # characters of a value that is told as it is


def told(value: Any) -> str | None:
    """A value in words; None for what has to be looked into."""
    if isinstance(value, PLAIN):
        return _short(repr(value))
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return of_array(value)
    if isinstance(value, bytearray | array):
        return f"{type(value).__name__} of {len(value)} {digest(bytes(value))}"
    if isinstance(value, _COUNTED):
        return repr(value)
    if isinstance(value, Iterator) and hasattr(value, "__length_hint__"):
        return f"an iterator with {operator.length_hint(value)} to come"
    if hasattr(value, "cache_info") and callable(value):
        known = value.cache_info()
        return f"a cache of {known.currsize} results, {known.misses} times asked in vain"
    if isinstance(value, set | frozenset) or (isinstance(value, dict | list | tuple | deque) and len(value) > _FEW):
        return _many(value)
    return _generator(value)


def _generator(value: Any) -> str | None:
    if isinstance(value, torch.Generator):
        return f"torch.Generator in state {digest(value.get_state().numpy().tobytes())}"
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return f"numpy.random.{type(value).__name__} in state {digest(repr(bits.state).encode())}"
    if isinstance(value, np.random.RandomState):
        return f"numpy.random.RandomState in state {digest(repr(value.get_state()).encode())}"
    if isinstance(value, random.Random):
        return f"random.Random in state {digest(repr(value.getstate()).encode())}"
    return None


def of_array(value: Any) -> str:
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
    return _short(repr(value.item())) if single else f"{value.dtype}{[*value.shape]} {digest(looked.encode())}"


def _many(value: Any) -> str:
    """A container in words; one of anything but plain values and arrays is told by its length alone."""
    told = f"a {type(value).__name__} of {len(value)}"
    items = [*value.items()] if isinstance(value, dict) else [*value]
    if len(items) > _MANY or not all(map(_is_plain, items)):
        return told
    words = [of_array(item) if isinstance(item, torch.Tensor | np.ndarray) else repr(item) for item in items]
    return f"{told} {digest(repr(sorted(words) if isinstance(value, set | frozenset) else words).encode())}"


def _is_plain(item: Any) -> bool:
    if isinstance(item, tuple):
        return all(_is_plain(inner) and not isinstance(inner, torch.Tensor | np.ndarray) for inner in item)
    return isinstance(item, (*PLAIN, torch.Tensor, np.ndarray))


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]}... {digest(text.encode())}"


def digest(data: bytes) -> str:
    """A few characters, equal for equal bytes."""
    return blake2b(data, digest_size=4).hexdigest()

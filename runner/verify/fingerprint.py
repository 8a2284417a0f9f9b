"""A state in digests, so that two of them are compared leaf by leaf without being kept.

A value that some object remembers, in words, so that two of them can be compared and shown.

Of data that is large a sample of the values is looked at.
"""

import itertools
import json
import operator
import random
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import digest
from runner.checkpoint.sharding import is_distributed
from runner.checkpoint.tensor_file import bytes_of
from runner.hashing import hex_digest

_FEW_KEYS = 64
_SHORT = 48  # characters of a value that is told as it is


def fingerprint(state: Mapping[str, Any]) -> dict[str, str]:
    """``path -> digest`` of every tensor, and of every value, or it itself where it is short."""
    found: dict[str, str] = {}
    for part, inner in state.items():
        value, tensors = encode(inner, part)
        found |= {name: of_value(tensor) for name, tensor in tensors.items()}
        found |= dict(_values(part, value))
    return found


def of_value(value: Any) -> str:
    """A tensor, an array or a plain value in a few characters, which are equal only if it is, bit for bit. Of anything
    else its kind: its text may hold an address. One tensor of several processes is put together: all of them must ask.
    """
    if isinstance(value, np.ndarray | np.generic) and not np.asarray(value).dtype.hasobject:
        array = np.ascontiguousarray(value)
        return f"{array.dtype}{[*array.shape]} {digest(array.tobytes())}"
    if isinstance(value, torch.Tensor):
        tensor = _whole(value).detach().cpu()
        tensor = (tensor if tensor.layout is torch.strided else tensor.to_dense()).resolve_conj().resolve_neg()
        return f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]} {digest(bytes_of(tensor.contiguous()))}"
    if not isinstance(value, str | bytes | int | float | bool | None):
        return type(value).__qualname__
    text = repr(value)
    return text if len(text) <= _SHORT else digest(text.encode())


def _whole(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if is_distributed(tensor) else tensor
    return found


def _values(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value.get("$") == "ordered":
        value = value["items"]
    if isinstance(value, dict) and "$" not in value and 0 < len(value) <= _FEW_KEYS:
        for key, inner in value.items():
            yield from _values(f"{path}/{key}", inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for place, inner in enumerate(value):
            yield from _values(f"{path}/{place}", inner)
    elif not (isinstance(value, dict) and value.get("$") == "tensor"):
        text = json.dumps(value, sort_keys=True)
        yield path, text if len(text) <= _SHORT else digest(text.encode())


PLAIN = (str, bytes, int, float, complex, bool, type(None))

_COUNTED = (itertools.count, itertools.repeat)
_FEW = 16  # items of a container that are looked at one by one
_MANY = 1000  # items of a container whose values are looked at
_LARGE = 1 << 20  # bytes of an array, of which more is not looked at than a sample of values
_SAMPLE = 4096  # of these
_WIDE = 40  # characters of a value that is told as it is


def describe(value: Any) -> str | None:
    """A value in words; None for what has to be looked into."""
    if isinstance(value, PLAIN):
        return _short(repr(value))
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return describe_array(value)
    if isinstance(value, bytearray | array):
        return f"{type(value).__name__} of {len(value)} {short_digest(bytes(value))}"
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
        return f"torch.Generator in state {short_digest(value.get_state().numpy().tobytes())}"
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return f"numpy.random.{type(value).__name__} in state {short_digest(repr(bits.state).encode())}"
    if isinstance(value, np.random.RandomState):
        return f"numpy.random.RandomState in state {short_digest(repr(value.get_state()).encode())}"
    if isinstance(value, random.Random):
        return f"random.Random in state {short_digest(repr(value.getstate()).encode())}"
    return None


def describe_array(value: Any) -> str:
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
    return _short(repr(value.item())) if single else f"{value.dtype}{[*value.shape]} {short_digest(looked.encode())}"


def _many(value: Any) -> str:
    """A container in words; one of anything but plain values and arrays is told by its length alone."""
    describe = f"a {type(value).__name__} of {len(value)}"
    items = [*value.items()] if isinstance(value, dict) else [*value]
    if len(items) > _MANY or not all(map(_is_plain, items)):
        return describe
    words = [describe_array(item) if isinstance(item, torch.Tensor | np.ndarray) else repr(item) for item in items]
    return f"{describe} {short_digest(repr(sorted(words) if isinstance(value, set | frozenset) else words).encode())}"


def _is_plain(item: Any) -> bool:
    if isinstance(item, tuple):
        return all(_is_plain(inner) and not isinstance(inner, torch.Tensor | np.ndarray) for inner in item)
    return isinstance(item, (*PLAIN, torch.Tensor, np.ndarray))


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]}... {short_digest(text.encode())}"


def short_digest(data: bytes) -> str:
    """A few characters, equal for equal bytes."""
    return hex_digest(data, size=4)

"""States as digests, which are compared leaf by leaf without keeping the states; and values of objects in words, to be
compared and shown. Of large arrays in objects only a sample is read.
"""

import itertools
import json
import operator
import random
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import digest
from runner.checkpoint.sharding import is_distributed
from runner.checkpoint.tensor_file import bytes_of

_FEW_KEYS = 64
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
        return f"{array.dtype}{[*array.shape]} {digest(array.tobytes())}"
    if isinstance(value, torch.Tensor):
        whole: torch.Tensor = value.full_tensor() if is_distributed(value) else value  # type: ignore[attr-defined]
        tensor = whole.detach().cpu()
        tensor = (tensor if tensor.layout is torch.strided else tensor.to_dense()).resolve_conj().resolve_neg()
        return f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]} {digest(bytes_of(tensor.contiguous()))}"
    if not isinstance(value, str | bytes | int | float | bool | None):
        return type(value).__qualname__
    text = repr(value)
    return text if len(text) <= _SHORT else digest(text.encode())


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
_FEW = 16  # items up to which a container is entered item by item
_MANY = 1000  # items up to which the values of a container are digested
_LARGE = 1 << 20  # bytes of an array of which only a sample is read
_SAMPLE = 4096  # values
_WIDE = 40  # characters up to which a value is shown whole
IN_STATE = " in state "  # stands in the description of every generator of random numbers


def describe(value: Any) -> str | None:
    """A value in words; None for a value that has to be entered."""
    if isinstance(value, PLAIN):
        return _short(repr(value))
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return describe_array(value)
    if isinstance(value, bytearray | array):
        return f"{type(value).__name__} of {len(value)} {short_digest(bytes(value))}"
    if isinstance(value, _COUNTED):
        return repr(value)
    if isinstance(value, Iterator) and hasattr(value, "__length_hint__"):
        return f"an iterator with {operator.length_hint(value)} items left"
    if hasattr(value, "cache_info") and callable(value):
        info = value.cache_info()
        return f"a cache of {info.currsize} results, {info.misses} misses"
    if isinstance(value, set | frozenset) or (isinstance(value, dict | list | tuple | deque) and len(value) > _FEW):
        return _many(value)
    return _generator(value)


def _generator(value: Any) -> str | None:
    if isinstance(value, torch.Generator):
        return f"torch.Generator{IN_STATE}{short_digest(value.get_state().numpy().tobytes())}"
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return f"numpy.random.{type(value).__name__}{IN_STATE}{short_digest(repr(bits.state).encode())}"
    if isinstance(value, np.random.RandomState):
        return f"numpy.random.RandomState{IN_STATE}{short_digest(repr(value.get_state()).encode())}"
    if isinstance(value, random.Random):
        return f"random.Random{IN_STATE}{short_digest(repr(value.getstate()).encode())}"
    return None


def describe_array(value: Any) -> str:
    """A tensor or an array in words; of a large one a sample is read."""
    if isinstance(value, torch.Tensor):
        tensor: Any = value.detach()
        tensor = tensor.to_local() if is_distributed(tensor) else tensor
        large = tensor.layout is torch.strided and tensor.numel() * tensor.itemsize > _LARGE
        value_digest = of_value(tensor.reshape(-1)[:: tensor.numel() // _SAMPLE] if large else tensor)
        single = tensor.numel() == 1
    else:
        array = np.asarray(value)
        value_digest = of_value(array.reshape(-1)[:: array.size // _SAMPLE] if array.nbytes > _LARGE else array)
        single = array.size == 1
    return (
        _short(repr(value.item())) if single else f"{value.dtype}{[*value.shape]} {short_digest(value_digest.encode())}"
    )


def _many(value: Any) -> str:
    """A container in words: its length, and a digest if it has only plain values and arrays."""
    length = f"a {type(value).__name__} of {len(value)}"
    items = [*value.items()] if isinstance(value, dict) else [*value]
    if len(items) > _MANY or not all(map(_is_plain, items)):
        return length
    words = [describe_array(item) if isinstance(item, torch.Tensor | np.ndarray) else repr(item) for item in items]
    return f"{length} {short_digest(repr(sorted(words) if isinstance(value, set | frozenset) else words).encode())}"


def _is_plain(item: Any) -> bool:
    if isinstance(item, tuple):
        return all(_is_plain(inner) and not isinstance(inner, torch.Tensor | np.ndarray) for inner in item)
    return isinstance(item, (*PLAIN, torch.Tensor, np.ndarray))


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]}... {short_digest(text.encode())}"


def short_digest(data: bytes) -> str:
    """A few characters, equal for equal bytes."""
    return blake2b(data, digest_size=4).hexdigest()

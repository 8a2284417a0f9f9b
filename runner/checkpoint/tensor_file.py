"""Tensors as bytes: streaming safetensors files with a digest for every block of them.

The files are valid safetensors, so anyone can open them with that library; writing them here is what allows to digest
while streaming and to make them durable. A digest is of a block, not of a tensor: whoever needs a few rows of a large
tensor reads little more than those, and a thousand small ones need one digest.
"""

import cmath
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.manifest import digest
from runner.errors import StateError
from runner.storage.location import Buffer

BLOCK = 1 << 20  # bytes, counted from the end of a file's header; frozen: stored checkpoints depend on it

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_DIMENSIONS = 64  # torch's own
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own
_LONGEST = 500  # characters of a message
_PIECE = 32_000  # elements; so few are added up in the calling thread, and those that train are left alone


class Damaged(Exception):
    """Stored bytes are not those that were written; says what and where."""

    def __init__(self, message: str) -> None:
        # It may quote names and numbers of a stranger, who may have chosen long ones.
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ...")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One data file. Its first ``header`` bytes, which only other readers of the format use, have a digest of their
    own; all that follow belong to tensors, with a digest for each block.
    """

    size: int
    header: int
    digest: str
    blocks: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in (self.size, self.header)):
            raise Damaged(f"sizes {self.size!r} and {self.header!r}")
        if not 0 <= self.header <= min(self.size, _MAX_HEADER):
            raise Damaged(f"a file of {self.size} bytes cannot have a header of {self.header}")
        if len(self.blocks) != -(-self.data // BLOCK):
            raise Damaged(f"{len(self.blocks)} digests cannot be those of {self.data} bytes")

    @property
    def data(self) -> int:
        """Bytes of tensors."""
        return self.size - self.header


@dataclass(frozen=True, slots=True)
class Kind:
    """Type and shape of a whole tensor, which may lie in several files."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise Damaged(f"unknown dtype {self.dtype!r}")
        if not all(type(size) is int for size in self.shape):
            raise Damaged(f"sizes {self.shape!r}")
        # Strides are products of the sizes, too; those of an empty tensor can be too large for torch all the same.
        strides = math.prod(max(size, 1) for size in self.shape) if len(self.shape) <= _MAX_DIMENSIONS else math.inf
        if min(self.shape, default=0) < 0 or strides * self.itemsize >= 1 << 63:
            raise Damaged(f"there is no {self.dtype} tensor of shape {self.shape}")

    @classmethod
    def of(cls, tensor: Tensor, shape: tuple[int, ...], name: str) -> "Kind":
        """That of a tensor which is a part of one of that shape. Raises StateError for a type the format lacks."""
        if tensor.dtype not in _NAMES:
            raise StateError(f"cannot save {name}: {tensor.dtype} has no place in a safetensors file")
        return _kind(_NAMES[tensor.dtype], shape)

    @property
    def itemsize(self) -> int:
        return _DTYPES[self.dtype].itemsize

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Room for elements of this type."""
        return torch.empty(shape, dtype=_DTYPES[self.dtype])


@lru_cache(maxsize=4096)
def _kind(dtype: str, shape: tuple[int, ...]) -> Kind:
    """A state has many tensors of few kinds."""
    return Kind(dtype, shape)


class SafetensorsFile:
    """Tensors about to be written as one safetensors file, one copy under each name; consume ``chunks``, then ask for
    ``stored``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
        kinds = {name: Kind.of(tensor, tuple(tensor.shape), name) for name, tensor in tensors.items()}
        self._tensors = {name: tensors[name].resolve_conj().resolve_neg() for name in in_order(kinds)}
        self._header = _header({name: kinds[name] for name in self._tensors}, metadata)
        self._digests: tuple[str, ...] = ()

    def chunks(self) -> Iterator[Buffer]:
        """The bytes of the file in order; the tensors are digested meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            digests = pool.submit(lambda: tuple(digest(*block) for block in blocks(self._views())))
            yield self._header
            yield from self._views()
            self._digests = digests.result()

    def _views(self) -> Iterator[memoryview]:
        return (bytes_of(tensor.cpu().contiguous()) for tensor in self._tensors.values())

    def stored(self, size: int) -> StoredFile:
        """The written file, which has ``size`` bytes."""
        return StoredFile(size, len(self._header), digest(self._header), self._digests)


def in_order(kinds: Mapping[str, Kind]) -> list[str]:
    """The names in the order in which a file has the tensors: wide types first keeps every one aligned, as readers
    that map the file expect.
    """
    return sorted(kinds, key=lambda name: (-kinds[name].itemsize, name))


def blocks(views: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes block by block, each as the pieces that it is made of."""
    block: list[memoryview] = []
    room = BLOCK
    for view in views:
        while len(view) >= room:
            yield [*block, view[:room]]
            view, block, room = view[room:], [], BLOCK
        if view:
            block.append(view)
            room -= len(view)
    if block:
        yield block


def memory_key(tensor: Tensor) -> Any:
    """A key that two tensors have in common when they are the same bytes in the same shape."""
    # Those without a byte have no address; their storages tell them apart.
    place = tensor.data_ptr() if tensor.numel() else tensor.untyped_storage()._cdata
    lazy = tensor.is_conj(), tensor.is_neg()
    return tensor.device, place, tensor.shape, tensor.stride(), tensor.dtype, lazy


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. Sums show it, at a twentieth of the price of asking for each element; only
    where finite elements make one overflow is each asked.
    """
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # for which torch has neither
    pieces = torch.split(tensor.reshape(-1), _PIECE)
    sums = ((piece.float() if piece.itemsize < 4 else piece).sum().item() for piece in pieces)
    return all(map(cmath.isfinite, sums)) or bool(tensor.isfinite().all())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _header(kinds: Mapping[str, Kind], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: its length, then JSON."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, kind in kinds.items():
        end = position + math.prod(kind.shape) * kind.itemsize
        entries[name] = {"dtype": kind.dtype, "shape": list(kind.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

"""Tensors as bytes: streaming safetensors files with a digest for every block of them.

The files are valid safetensors, so anyone can open them with that library; it cannot write them here, because it
neither digests while it streams nor makes files durable. A digest is of a block, not of a tensor: a few rows of a large
tensor are verified by reading little more than them, and a thousand small tensors need one digest.
"""

import cmath
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.manifest import keyed_digest
from runner.errors import RunnerError, StateError
from runner.storage.location import Buffer

BLOCK = 1 << 20  # bytes, counted from the end of a file's header; frozen: stored checkpoints depend on it

_DTYPES: dict[str, torch.dtype] = {f"F{bits}": getattr(torch, f"float{bits}") for bits in (64, 32, 16)}
_DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (64, 32, 16, 8)}
_DTYPES |= {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (64, 32, 16, 8)}
_DTYPES |= {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_DTYPES |= {"C64": torch.complex64, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_DIMENSIONS = 64  # torch has no tensors with more
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_LONGEST = 500  # characters of a message
_PIECE = 32_000  # elements; torch sums more with all its threads, and would slow down training


class Damaged(RunnerError):
    """Stored bytes are not those that were written; says what and where."""

    def __init__(self, message: str) -> None:
        # It may quote names and numbers from a manifest that an attacker wrote.
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ...")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One data file of ``size`` bytes. The first ``header`` bytes, which only other readers of the format use, have a
    ``digest`` of their own; the rest belongs to tensors, with a digest for each block in ``blocks``.
    """

    size: int
    header: int
    digest: str
    blocks: list[str]

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in (self.size, self.header)):
            raise Damaged(f"sizes {self.size!r} and {self.header!r}")
        if not 0 <= self.header <= min(self.size, _MAX_HEADER):
            raise Damaged(f"a file of {self.size} bytes cannot have a header of {self.header}")
        if not isinstance(self.blocks, list) or len(self.blocks) != -(-self.data // BLOCK):
            raise Damaged(f"{len(self.blocks)} digests cannot be those of {self.data} bytes")

    @property
    def data(self) -> int:
        """Bytes of tensors."""
        return self.size - self.header


@dataclass(frozen=True, slots=True)
class Kind:
    """Type and shape of a whole tensor, which may be divided among several files."""

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
        """The kind of the whole tensor of this shape that ``tensor`` is a part of. Raises StateError for a type that
        safetensors lacks.
        """
        if tensor.dtype not in _NAMES:
            raise StateError(f"cannot save {name}: {tensor.dtype} has no place in a safetensors file")
        return cls(_NAMES[tensor.dtype], shape)

    @property
    def itemsize(self) -> int:
        return _DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """The size of a row, all elements with one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.itemsize

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor of this type."""
        return torch.empty(shape, dtype=_DTYPES[self.dtype])


class SafetensorsFile:
    """Tensors as one safetensors file, a copy under each name; consume ``chunks``, then ask for ``stored``."""

    def __init__(self, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
        kinds = in_file_order({name: Kind.of(tensor, tuple(tensor.shape), name) for name, tensor in tensors.items()})
        self._tensors = {name: tensors[name].resolve_conj().resolve_neg() for name in kinds}
        self._header = _header(kinds, metadata)
        self._digests: list[str] = []

    def chunks(self) -> Iterator[Buffer]:
        """The bytes of the file in order; the tensors are digested meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            digests = pool.submit(lambda: [keyed_digest(*block) for block in blocks(self._views())])
            yield self._header
            yield from self._views()
            self._digests = digests.result()

    def _views(self) -> Iterator[memoryview]:
        return (bytes_of(tensor.cpu().contiguous()) for tensor in self._tensors.values())

    def stored(self, size: int) -> StoredFile:
        """The written file, which has ``size`` bytes."""
        return StoredFile(size, len(self._header), keyed_digest(self._header), self._digests)


def in_file_order(kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """In the order of the file: wide types first, which keeps tensors aligned, as readers that map it expect."""
    return dict(sorted(kinds.items(), key=lambda item: (-item[1].itemsize, item[0])))


def blocks(views: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes in blocks, each a list of views."""
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
    """A key that is equal for two tensors if they are the same bytes in the same shape."""
    # Empty tensors have no address; their storages tell them apart.
    place = tensor.data_ptr() if tensor.numel() else tensor.untyped_storage()._cdata
    lazy = tensor.is_conj(), tensor.is_neg()
    return tensor.device, place, tensor.shape, tensor.stride(), tensor.dtype, lazy


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. A sum is not finite if an element is not, and costs a twentieth of a test
    of each element; the elements are tested only if a sum is not finite, as finite elements can make it overflow.
    """
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # torch cannot sum or test 8-bit floats
    pieces = torch.split(tensor.reshape(-1), _PIECE)
    sums = ((piece.float() if piece.itemsize < 4 else piece).sum().item() for piece in pieces)
    return all(map(cmath.isfinite, sums)) or bool(tensor.isfinite().all())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _header(kinds: Mapping[str, Kind], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file: its length, then JSON."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, kind in kinds.items():
        end = position + math.prod(kind.shape) * kind.itemsize
        entries[name] = {"dtype": kind.dtype, "shape": list(kind.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

"""Tensors as bytes: streaming safetensors files with a digest for every tensor.

The files are valid safetensors, so anyone can open them with that library; writing them here is what allows to digest
while streaming, to make them durable, and to store a shared tensor once.
"""

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.sealing import digest
from runner.errors import StateError
from runner.storage.location import Buffer, Location

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
_PIECE = 8 << 20  # bytes that are read at once
_READERS = 8
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_DIMENSIONS = 64  # torch's own
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own
_LONGEST = 500  # characters of a message


class Damaged(Exception):
    """Stored bytes are not those that were written; says what and where."""

    def __init__(self, message: str) -> None:
        # It may quote names and numbers of a stranger, who may have chosen long ones.
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ...")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One data file. Its first ``header`` bytes, which only other readers of the format use, have a digest of their
    own; all that follow belong to tensors.
    """

    size: int
    header: int
    digest: str

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in (self.size, self.header)):
            raise Damaged(f"sizes {self.size!r} and {self.header!r}")
        if not 0 <= self.header <= min(self.size, _MAX_HEADER):
            raise Damaged(f"a file of {self.size} bytes cannot have a header of {self.header}")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor within a data file. ``offset`` counts from the beginning of the file, ``length`` is in bytes."""

    dtype: str
    shape: tuple[int, ...]
    part: str
    offset: int
    length: int
    digest: str

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise Damaged(f"unknown dtype {self.dtype!r}")
        itemsize = _DTYPES[self.dtype].itemsize
        # Strides are products of the sizes, too; those of an empty tensor can be too large for torch all the same.
        strides = math.prod(max(size, 1) for size in self.shape) if len(self.shape) <= _MAX_DIMENSIONS else math.inf
        possible = min(self.shape, default=0) >= 0 and strides * itemsize < 1 << 63
        if not possible or self.length != math.prod(self.shape) * itemsize:
            raise Damaged(f"{self.length} bytes cannot be a {self.dtype} tensor of shape {self.shape}")


class SafetensorsFile:
    """Tensors about to be written as one safetensors file; consume ``chunks``, then ask for ``stored``.

    Tensors that share all their memory are written once unless ``copies`` asks for one copy each.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], copies: bool = False) -> None:
        tensors = {name: tensor.resolve_conj().resolve_neg() for name, tensor in tensors.items()}
        self._alias: dict[str, str] = {}
        first: dict[Any, str] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in _NAMES:
                raise StateError(f"cannot save {name}: {tensor.dtype} has no place in a safetensors file")
            self._alias[name] = name if copies else first.setdefault(memory_key(tensor, name), name)
        # Wide types first keeps every tensor aligned, as readers that map the file expect.
        unique = sorted({*self._alias.values()}, key=lambda name: (-tensors[name].itemsize, name))
        self._tensors = {name: tensors[name] for name in unique}
        self._header, self._offsets = _header(self._tensors, metadata)
        self._digests: dict[str, str] = {}

    def chunks(self) -> Iterator[Buffer]:
        """The bytes of the file in order; the tensors are digested meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            digests = pool.submit(lambda: {name: digest(view) for name, view in self._views()})
            yield self._header
            yield from (view for _, view in self._views())
            self._digests = digests.result()

    def _views(self) -> Iterator[tuple[str, memoryview]]:
        return ((name, bytes_of(tensor.cpu().contiguous())) for name, tensor in self._tensors.items())

    def stored_file(self, size: int) -> StoredFile:
        """The written file, which has ``size`` bytes."""
        return StoredFile(size, len(self._header), digest(self._header))

    def stored(self, part: str) -> dict[str, Stored]:
        """Where every tensor lies in the written file, which is called ``part``."""
        return {name: self._stored(alias, part) for name, alias in self._alias.items()}

    def _stored(self, name: str, part: str) -> Stored:
        tensor = self._tensors[name]
        return Stored(
            _NAMES[tensor.dtype],
            tuple(tensor.shape),
            part,
            self._offsets[name],
            tensor.numel() * tensor.itemsize,
            self._digests[name],
        )


def split(tensors: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The tensors for each of several files of about ``size`` bytes; those that share memory stay together."""
    parts: list[dict[str, Tensor]] = [{}]
    homes: dict[Any, dict[str, Tensor]] = {}
    filled = 0
    for name, tensor in tensors.items():
        key = memory_key(tensor, name)
        if key not in homes:
            if parts[-1] and filled + tensor.nbytes > size:
                parts.append({})
                filled = 0
            homes[key] = parts[-1]
            filled += tensor.nbytes
        homes[key][name] = tensor
    return parts


_Targets = list[tuple[str, int, int]]  # name, and the range of its bytes


def read(location: Location, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors by name, with their digests verified on the very bytes that are returned. Those that were one tensor when
    they were written are one again.

    Reads ranges in parallel, straight into their places.
    """
    first: dict[Stored, str] = {}
    names = {name: first.setdefault(entry, name) if entry.length else name for name, entry in stored.items()}
    tensors = _read(location, {name: stored[name] for name in names.values()})
    return {name: tensors[other] for name, other in names.items()}


def _read(location: Location, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    tensors = {name: torch.empty(entry.shape, dtype=_DTYPES[entry.dtype]) for name, entry in stored.items()}
    views = {name: bytes_of(tensor) for name, tensor in tensors.items()}

    def fill(part: str, offset: int, targets: _Targets) -> dict[str, str]:
        location.read_into(part, offset, [views[name][begin:end] for name, begin, end in targets])
        # While the bytes are in the processor's cache.
        return {name: digest(views[name]) for name, begin, end in targets if end - begin == len(views[name])}

    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(item for done in pool.map(lambda piece: fill(*piece), _pieces(stored)) for item in done.items())
        large = [name for name in stored if name not in found]
        found.update(zip(large, pool.map(lambda name: digest(views[name]), large), strict=True))
    for name, entry in stored.items():
        if found[name] != entry.digest:
            end = entry.offset + entry.length
            raise Damaged(f"{entry.part} bytes {entry.offset} to {end}: digest {found[name]}, expected {entry.digest}")
    return tensors


def _pieces(stored: Mapping[str, Stored]) -> Iterator[tuple[str, int, _Targets]]:
    """What to read at once: part, offset, and whose bytes those are. Neighbours come together, a large tensor in
    several pieces.
    """
    part, first, last = "", 0, 0
    targets: _Targets = []
    for name, entry in sorted(stored.items(), key=lambda item: (item[1].part, item[1].offset)):
        for begin in range(0, max(entry.length, 1), _PIECE):
            end = min(begin + _PIECE, entry.length)
            if targets and ((entry.part, entry.offset + begin) != (part, last) or entry.offset + end > first + _PIECE):
                yield part, first, targets
                targets = []
            if not targets:
                part, first = entry.part, entry.offset + begin
            targets.append((name, begin, end))
            last = entry.offset + end
    if targets:
        yield part, first, targets


def memory_key(tensor: Tensor, name: str) -> Any:
    """A key that two tensors have in common when they are the same bytes in the same shape."""
    if not tensor.numel():
        return name
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def check_header(location: Location, name: str, stored: StoredFile) -> None:
    """Raise Damaged unless the header of a data file is as it was written."""
    header = memoryview(bytearray(stored.header))
    location.read_into(name, 0, [header])
    found = digest(header)
    if found != stored.digest:
        raise Damaged(f"{name} bytes 0 to {stored.header}: digest {found}, expected {stored.digest}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file (its length, then JSON), and the offset of each tensor in the file."""
    begins: dict[str, int] = {}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        begins[name] = position
        end = position + tensor.numel() * tensor.itemsize
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}

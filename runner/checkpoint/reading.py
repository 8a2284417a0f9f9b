"""Reads boxes of tensors from data files: only the blocks that contain them, in parallel, directly into them.

No tensor is returned before the digests of all blocks that it came from have matched.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from torch import Tensor

from runner.checkpoint.manifest import digest
from runner.checkpoint.sharding import Box, FileGroup, cells_in
from runner.checkpoint.tensor_file import BLOCK, Damaged, Kind, StoredFile, bytes_of
from runner.storage.location import Location

_BLOCKS_PER_READ = 8
_READERS = 8


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """Where the bytes of a tensor are. ``first`` is the number of its group's first file among all files."""

    group: FileGroup
    name: str
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.group.tensors[self.name].shape


class _Source(NamedTuple):
    """A cell that overlaps a box: its file, the byte where the tensor begins there, and the overlap."""

    file: str
    begin: int
    cell: Box
    overlap: Box


@dataclass(frozen=True, slots=True)
class _Block:
    """A block to be read, and memory for pieces of it by their offsets. The rest is read, too, for the digest."""

    file: str
    number: int
    pieces: list[tuple[int, memoryview]] = field(default_factory=list)

    def buffers(self, size: int) -> list[memoryview]:
        """Memory for all ``size`` bytes of the block."""
        buffers: list[memoryview] = []
        position = 0
        for at, piece in sorted(self.pieces, key=lambda piece: piece[0]):
            buffers += [memoryview(bytearray(at - position)), piece] if at > position else [piece]
            position = at + len(piece)
        return buffers if position == size else [*buffers, memoryview(bytearray(size - position))]


class Reader:
    """Reads from the data files of one checkpoint."""

    def __init__(self, location: Location, files: Mapping[str, StoredFile]) -> None:
        self._location = location
        self._files = files
        self._names = [*files]

    def read(self, wanted: Mapping[str, tuple[TensorBytes, Box]]) -> dict[str, Tensor]:
        """The boxes of tensors, by any name. Raises Damaged."""
        blocks: dict[tuple[str, int], _Block] = {}
        tensors: dict[str, Tensor] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for name, (place, box) in wanted.items():
            kind, sources = place.group.tensors[place.name], self._sources(place, box)
            tensors[name] = kind.empty(box.shape)
            copies += _scatter(tensors[name], kind, box, sources, blocks)
        self._fill(blocks.values())
        for target, tensor in copies:
            target.copy_(tensor)
        return tensors

    def verify(self) -> None:
        """Read every byte of every file. Raises Damaged."""
        for name, file in self._files.items():
            self._fill(_Block(name, number) for number in range(len(file.blocks)))

    def check_header(self, name: str) -> None:
        """Raise Damaged unless the header of a data file is as it was written."""
        header = memoryview(bytearray(self._files[name].header))
        self._location.read_into(name, 0, [header])
        _require_digest(name, 0, len(header), digest(header), self._files[name].digest)

    def offsets(self, group: FileGroup, number: int, name: str) -> dict[str, int]:
        """Where each tensor begins in the file of a cell. Raises Damaged for a file of another size."""
        try:
            return group.offsets(number, self._files[name].data)
        except Damaged as error:
            raise Damaged(f"{name}: {error}") from None

    def _sources(self, place: TensorBytes, box: Box) -> list[_Source]:
        """The cells that hold a box. Raises Damaged unless their files have its bytes: before memory is allocated."""
        shape, sources = place.group.tensors[place.name].shape, []
        for number, cell, overlap in cells_in(box, shape, place.group.cuts):
            file = self._names[place.first + number]
            sources.append(_Source(file, self.offsets(place.group, number, file)[place.name], cell, overlap))
        return sources

    def _fill(self, blocks: Iterable[_Block]) -> None:
        """Read whole blocks, neighbours at once."""
        ordered = sorted(blocks, key=lambda block: (block.file, block.number))
        runs: list[list[_Block]] = []
        for block in ordered:
            last = runs[-1][-1] if runs else None
            follows = last is not None and (last.file, last.number + 1) == (block.file, block.number)
            if follows and len(runs[-1]) < _BLOCKS_PER_READ:
                runs[-1].append(block)
            else:
                runs.append([block])
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(self._read, runs):
                pass

    def _read(self, run: list[_Block]) -> None:
        file = self._files[run[0].file]
        buffers = [block.buffers(min(BLOCK, file.data - block.number * BLOCK)) for block in run]
        self._location.read_into(
            run[0].file, file.header + run[0].number * BLOCK, [b for some in buffers for b in some]
        )
        for block, some in zip(run, buffers, strict=True):  # while the bytes are in the processor's cache
            begin = file.header + block.number * BLOCK
            end = min(begin + BLOCK, file.size)
            _require_digest(block.file, begin, end, digest(*some), file.blocks[block.number])


def _require_digest(file: str, begin: int, end: int, actual: str, expected: str) -> None:
    if actual != expected:
        raise Damaged(f"{file} bytes {begin} to {end}: digest {actual}, expected {expected}")


def _scatter(
    target: Tensor, kind: Kind, box: Box, sources: Iterable[_Source], blocks: dict[tuple[str, int], _Block]
) -> Iterable[tuple[Tensor, Tensor]]:
    """Add memory for the bytes of a box to the blocks that they are in: the memory of ``target``, or where the bytes of
    an overlap are contiguous on one side only, other memory for whole rows of the cell. Yields the (target, source)
    pairs that are then to be copied.
    """
    view = bytes_of(target)
    for file, begin, cell, overlap in sources:
        to, at = overlap.run(box), overlap.run(cell)
        if to is None or at is None:
            rows = Box((*overlap.offset[:1], *cell.offset[1:]), (*overlap.shape[:1], *cell.shape[1:]))
            buffer, at = kind.empty(rows.shape), rows.run(cell)
            assert at is not None
            yield target[overlap.within(box)], buffer[overlap.within(rows)]
            piece = bytes_of(buffer)
        else:
            piece = view[to * kind.itemsize : (to + prod(overlap.shape)) * kind.itemsize]
        _add(blocks, file, begin + at * kind.itemsize, piece)


def _add(blocks: dict[tuple[str, int], _Block], file: str, offset: int, view: memoryview) -> None:
    """Add memory for the bytes of a file from ``offset`` on to the blocks that they are in."""
    while view:
        number, at = divmod(offset, BLOCK)
        block = blocks.setdefault((file, number), _Block(file, number))
        block.pieces.append((at, view[: BLOCK - at]))
        offset, view = offset + BLOCK - at, view[BLOCK - at :]

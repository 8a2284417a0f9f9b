"""Reads boxes of tensors from data files: only the blocks that contain them, in parallel, directly into the tensors.

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

_AT_ONCE = 8  # blocks that are read at once
_READERS = 8


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A tensor of a shelf. ``first`` is the number of the shelf's first file among all files."""

    shelf: FileGroup
    name: str
    first: int


class _Source(NamedTuple):
    """A cell that overlaps a box: its file, where the tensor begins in it, and the overlap."""

    file: str
    begin: int
    cell: Box
    common: Box


@dataclass(frozen=True, slots=True)
class _Block:
    """A block to be read, and the memory for parts of it, by offset. The rest is read, too, for the digest."""

    file: str
    number: int
    pieces: list[tuple[int, memoryview]] = field(default_factory=list)

    def buffers(self, size: int) -> list[memoryview]:
        """Memory for all ``size`` bytes of the block."""
        found: list[memoryview] = []
        position = 0
        for at, piece in sorted(self.pieces, key=lambda piece: piece[0]):
            found += [memoryview(bytearray(at - position)), piece] if at > position else [piece]
            position = at + len(piece)
        return found if position == size else [*found, memoryview(bytearray(size - position))]


class Reader:
    """Reads from the data files of one checkpoint."""

    def __init__(self, location: Location, files: Mapping[str, StoredFile]) -> None:
        self._location = location
        self._files = files
        self._names = [*files]

    def read(self, wanted: Mapping[str, tuple[TensorBytes, Box]]) -> dict[str, Tensor]:
        """The boxes of tensors, by any name. Raises Damaged."""
        blocks: dict[tuple[str, int], _Block] = {}
        found: dict[str, Tensor] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for name, (place, box) in wanted.items():
            kind, sources = place.shelf.tensors[place.name], self._sources(place, box)
            found[name] = kind.empty(box.shape)
            copies += _into(found[name], kind, box, sources, blocks)
        self._fill(blocks.values())
        for to, tensor in copies:
            to.copy_(tensor)
        return found

    def verify(self) -> None:
        """Read every byte of every file. Raises Damaged."""
        for name, file in self._files.items():
            self._fill(_Block(name, number) for number in range(len(file.blocks)))

    def check_header(self, name: str) -> None:
        """Raise Damaged unless the header of a data file is as it was written."""
        header = memoryview(bytearray(self._files[name].header))
        self._location.read_into(name, 0, [header])
        found, expected = digest(header), self._files[name].digest
        if found != expected:
            raise Damaged(f"{name} bytes 0 to {len(header)}: digest {found}, expected {expected}")

    def offsets(self, shelf: FileGroup, number: int, name: str) -> dict[str, int]:
        """Where each tensor begins in the file of a shelf's cell. Raises Damaged for a file of another size."""
        try:
            return shelf.offsets(number, self._files[name].data)
        except Damaged as error:
            raise Damaged(f"{name}: {error}") from None

    def _sources(self, place: TensorBytes, box: Box) -> list[_Source]:
        """What holds some of a box. Raises Damaged unless the files have room for it: before anything is allocated."""
        kind, found = place.shelf.tensors[place.name], []
        for number, cell, common in cells_in(box, kind.shape, place.shelf.cuts):
            file = self._names[place.first + number]
            found.append(_Source(file, self.offsets(place.shelf, number, file)[place.name], cell, common))
        return found

    def _fill(self, blocks: Iterable[_Block]) -> None:
        """Read whole blocks, neighbours at once."""
        ordered = sorted(blocks, key=lambda block: (block.file, block.number))
        runs: list[list[_Block]] = []
        for block in ordered:
            last = runs[-1][-1] if runs else None
            follows = last is not None and (last.file, last.number + 1) == (block.file, block.number)
            if follows and len(runs[-1]) < _AT_ONCE:
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
            found, expected = digest(*some), file.blocks[block.number]
            if found != expected:
                begin = file.header + block.number * BLOCK
                end = min(begin + BLOCK, file.size)
                raise Damaged(f"{block.file} bytes {begin} to {end}: digest {found}, expected {expected}")


def _into(
    target: Tensor, kind: Kind, box: Box, sources: Iterable[_Source], blocks: dict[tuple[str, int], _Block]
) -> Iterable[tuple[Tensor, Tensor]]:
    """Add what is to be read of a box, into ``target`` or, where its bytes do not lie alike, beside it; returns what is
    then to be copied.
    """
    view = bytes_of(target)
    for file, begin, cell, common in sources:
        to, at = common.run(box), common.run(cell)
        if to is None or at is None:
            rows = Box((*common.offset[:1], *cell.offset[1:]), (*common.shape[:1], *cell.shape[1:]))
            beside, at = kind.empty(rows.shape), rows.run(cell)
            assert at is not None
            yield target[common.within(box)], beside[common.within(rows)]
            piece = bytes_of(beside)
        else:
            piece = view[to * kind.itemsize : (to + prod(common.shape)) * kind.itemsize]
        _add(blocks, file, begin + at * kind.itemsize, piece)


def _add(blocks: dict[tuple[str, int], _Block], file: str, offset: int, view: memoryview) -> None:
    """Add memory for the bytes of a file from ``offset`` on to the blocks that they are in."""
    while view:
        number, at = divmod(offset, BLOCK)
        block = blocks.setdefault((file, number), _Block(file, number))
        block.pieces.append((at, view[: BLOCK - at]))
        offset, view = offset + BLOCK - at, view[BLOCK - at :]

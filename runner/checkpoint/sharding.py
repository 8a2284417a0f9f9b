"""How tensors are divided among ranks and files: which rank writes which part of which tensor into which file.

A distributed tensor is a grid of cells, each held by one rank or by several replicas. The files of a checkpoint belong
to groups of tensors that are divided alike: a group has one file for each cell, and every file contains the tensors in
the same order. So a manifest need not store offsets, which could overlap or leave gaps in a hostile manifest, and its
size grows with the number of tensors plus the number of files, not with their product.

The only module that knows torch's distributed tensors. It never imports them: if no other module did, there are none.
"""

import heapq
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.manifest import MAX_TENSORS
from runner.checkpoint.tensor_file import Damaged, Kind, in_file_order, memory_key
from runner.distributed.communicator import Communicator
from runner.errors import StateError

Cuts = tuple[tuple[int, int], ...]  # (dimension, number of chunks), as torch.chunk makes them; cells in row-major order


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region of a tensor: where it begins, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=4096)  # many tensors have few shapes
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that covers the box ``outer``."""
        pairs = zip(self.offset, self.shape, outer.offset, strict=True)
        return tuple(slice(at - begin, at - begin + size) for at, size, begin in pairs)

    def run(self, outer: "Box") -> int | None:
        """The index in ``outer`` of this box's first element, if the box is contiguous there (row-major), else None."""
        if self == outer:
            return 0
        full, first = True, 0
        for size, outer_size in zip(reversed(self.shape), reversed(outer.shape), strict=True):
            if not full and size != 1:
                return None
            full = full and size == outer_size
        for at, begin, outer_size in zip(self.offset, outer.offset, outer.shape, strict=True):
            first = first * outer_size + at - begin
        return first


@dataclass(frozen=True, slots=True)
class LocalShard:
    """What this rank holds of a tensor of shape ``shape``, which ``cuts`` divides into cells: cell ``cell``, as number
    ``replica`` of ``replicas`` ranks. Tensors with an equal ``layout`` are distributed in the same way.
    """

    local: Tensor
    shape: tuple[int, ...]
    cuts: Cuts
    cell: int
    replicas: int
    replica: int
    layout: Any

    @property
    def box(self) -> Box:
        return cell_of(self.shape, self.cuts, self.cell)


def shard(tensors: Mapping[str, Any], comm: Communicator) -> dict[str, LocalShard]:
    """How each tensor is distributed; a plain one is replicated. Raises StateError for what cannot be saved."""
    shards = {}
    for name, tensor in tensors.items():
        cell: Any = ((), 0, comm.size, comm.rank, ())
        if is_distributed(tensor):
            try:
                cell = _cell_fields(tensor.device_mesh, tensor.placements, comm.size)
            except ValueError as error:
                raise StateError(f"cannot save {name}: {error}") from None
        shards[name] = LocalShard(local(tensor), tuple(tensor.shape), *cell)
    return shards


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor; all of a plain one."""
    part: Tensor = tensor._local_tensor.detach() if is_distributed(tensor) else tensor
    return part


def is_distributed(tensor: Any) -> bool:
    """Whether it is a distributed tensor (DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def distribute(local: Tensor, like: Any) -> Tensor:
    """A distributed tensor made of this rank's cell, distributed like ``like``."""
    tensor: Tensor = type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return tensor


def cell_of(shape: tuple[int, ...], cuts: Cuts, number: int) -> Box:
    """The cell with this number."""
    if not cuts:
        return Box.whole(shape)
    offset, sizes = [0] * len(shape), [*shape]
    for dimension, count in reversed(cuts):
        number, index = divmod(number, count)
        width = -(-shape[dimension] // count)
        offset[dimension] = begin = min(index * width, shape[dimension])
        sizes[dimension] = min(width, shape[dimension] - begin)
    return Box(tuple(offset), tuple(sizes))


def cells_in(box: Box, shape: tuple[int, ...], cuts: Cuts) -> Iterator[tuple[int, Box, Box]]:
    """The cells of a tensor of this shape that overlap a box of it, as (number, cell, overlap)."""
    if 0 in box.shape:
        return
    if not cuts:
        yield 0, Box.whole(shape), box
        return
    ranges = []
    for dimension, count in cuts:
        width = -(-shape[dimension] // count)
        last = box.offset[dimension] + box.shape[dimension] - 1
        ranges.append(range(box.offset[dimension] // width, last // width + 1))
    for indices in product(*ranges):
        number = 0
        for index, (_, count) in zip(indices, cuts, strict=True):
            number = number * count + index
        cell = cell_of(shape, cuts, number)
        begin = tuple(map(max, cell.offset, box.offset))
        ends = zip(cell.offset, cell.shape, box.offset, box.shape, begin, strict=True)
        yield number, cell, Box(begin, tuple(min(x + n, y + m) - at for x, n, y, m, at in ends))


@lru_cache(maxsize=256)
def _cell_fields(mesh: Any, placements: tuple[Any, ...], size: int) -> tuple[Cuts, int, int, int, Any]:
    """The fields of ``LocalShard`` from ``cuts`` on, for a tensor that is placed like this on a mesh."""
    coordinate = mesh.get_coordinate()
    if coordinate is None or mesh.size() != size:
        raise ValueError(f"a tensor on {mesh.size()} of {size} ranks; only meshes of all ranks can be saved")
    cuts: list[tuple[int, int]] = []
    cell = replica = 0
    replicas = 1
    for placement, index, count in zip(placements, coordinate, mesh.shape, strict=True):
        if type(placement) is torch.distributed.tensor.Replicate:
            replicas, replica = replicas * count, replica * count + index
        elif type(placement) is torch.distributed.tensor.Shard and placement.dim not in dict(cuts):
            cuts.append((placement.dim, count))
            cell = cell * count + index
        else:
            raise ValueError(f"a tensor placed as {placements}; it may be replicated, or sharded once per dimension")
    return tuple(cuts), cell, replicas, replica, (mesh, placements)


@dataclass(frozen=True, slots=True)
class FileGroup:
    """Tensors that are divided alike, in the order in which each of the group's files contains them."""

    cuts: Cuts
    tensors: dict[str, Kind]
    _offsets: dict[int, dict[str, int]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        least = min((len(kind.shape) for kind in self.tensors.values()), default=0)
        if len(dict(self.cuts)) < len(self.cuts) or not all(0 <= at < least and n >= 1 for at, n in self.cuts):
            raise Damaged(f"tensors of {least} dimensions cannot be cut as {self.cuts}")

    @property
    def cells(self) -> int:
        """How many files it has."""
        return prod(count for _, count in self.cuts)

    def offsets(self, number: int, size: int) -> dict[str, int]:
        """Where each tensor begins in the file of a cell. Raises Damaged unless they take ``size`` bytes."""
        if number not in self._offsets:
            position, offsets = 0, {}
            for name in self.tensors:
                offsets[name] = position
                position += self._bytes(name, number)
            if position != size:
                raise Damaged(f"{size} bytes cannot be the tensors of a file, which take {position}")
            self._offsets[number] = offsets
        return self._offsets[number]

    def split(self, size: int) -> Iterator["FileGroup"]:
        """Groups whose files have about ``size`` bytes at most."""
        tensors: dict[str, Kind] = {}
        filled = 0
        for name, kind in self.tensors.items():
            more = self._bytes(name, 0)
            if tensors and filled + more > size:
                yield FileGroup(self.cuts, in_file_order(tensors))
                tensors, filled = {}, 0
            tensors[name] = kind
            filled += more
        yield FileGroup(self.cuts, in_file_order(tensors))

    def _bytes(self, name: str, number: int) -> int:
        kind = self.tensors[name]
        return prod(cell_of(kind.shape, self.cuts, number).shape) * kind.itemsize


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Which rank writes what. Every rank computes the same ``groups`` and ``aliases`` (tensors stored under another
    name). ``written``: group number -> the cell that this rank writes. ``own``: tensors that only this rank has.
    """

    groups: tuple[FileGroup, ...]
    written: dict[int, int]
    aliases: dict[str, str]
    own: FileGroup

    def names(self) -> list[str]:
        """The tensors of which this rank writes something."""
        return [name for group in (*map(self.groups.__getitem__, self.written), self.own) for name in group.tensors]

    def split(self, size: int) -> "WritePlan":
        """The same with files of about ``size`` bytes at most."""
        groups: list[FileGroup] = []
        written: dict[int, int] = {}
        for number, group in enumerate(self.groups):
            for piece in group.split(size):
                if number in self.written:
                    written[len(groups)] = self.written[number]
                groups.append(piece)
        return replace(self, groups=tuple(groups), written=written)


def plan(shards: Mapping[str, LocalShard], own: Mapping[str, Tensor]) -> WritePlan:
    """A plan that writes each cell of each tensor once. Replicas are spread over their ranks by bytes. Raises
    StateError for more tensors than could be loaded again.
    """
    if (count := len(shards) + len(own)) > MAX_TENSORS:
        raise StateError(f"cannot save {count} tensors; a checkpoint has at most {MAX_TENSORS}")
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    layouts: dict[Any, list[str]] = {}
    for name, part in shards.items():
        original = first.setdefault((memory_key(part.local), part.shape, part.layout), name)
        if original == name:
            layouts.setdefault(part.layout, []).append(name)
        else:
            aliases[name] = original
    groups: list[FileGroup] = []
    written: dict[int, int] = {}
    for names in layouts.values():
        like = shards[names[0]]
        kinds = {name: Kind.of(shards[name].local, shards[name].shape, name) for name in names}
        for replica, tensors in enumerate(_spread(kinds, like.cuts, like.replicas)):
            if tensors and replica == like.replica:
                written[len(groups)] = like.cell
            if tensors:
                groups.append(FileGroup(like.cuts, tensors))
    alone = {name: Kind.of(tensor, tuple(tensor.shape), name) for name, tensor in own.items()}
    return WritePlan(tuple(groups), written, aliases, FileGroup((), in_file_order(alone)))


def _spread(kinds: Mapping[str, Kind], cuts: Cuts, ways: int) -> Iterable[dict[str, Kind]]:
    """The tensors in ``ways`` shares of about the same bytes: the largest first, each to the smallest share."""
    if ways == 1:
        return [dict(kinds)]
    sizes = {name: prod(cell_of(kind.shape, cuts, 0).shape) * kind.itemsize for name, kind in kinds.items()}
    smallest = [(0, way) for way in range(ways)]  # a heap
    shares: list[dict[str, Kind]] = [{} for _ in range(ways)]
    for name in sorted(kinds, key=lambda name: (-sizes[name], name)):
        filled, way = smallest[0]
        shares[way][name] = kinds[name]
        heapq.heapreplace(smallest, (filled + sizes[name], way))
    return shares

"""How a tensor is distributed over ranks: a grid of cells, each held by one rank or by several replicas.

The only module that knows torch's distributed tensors. It never imports them: if nobody else did, there are none.

Where the tensors of a checkpoint are stored: on *shelves*, whose tensors are divided alike; and who writes what.

A shelf has one file per cell, and every file contains the tensors in the same order. So a manifest need not store
offsets, which could overlap or leave gaps in a hostile one, and its size grows with the number of tensors plus the
number of files, not with their product.
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

from runner.checkpoint.tensor_file import Damaged, Kind, in_order, memory_key
from runner.distributed.communicator import Communicator
from runner.errors import StateError

Cuts = tuple[tuple[int, int], ...]  # (dimension, number of chunks), as torch.chunk makes them; cells in row-major order


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a tensor: where it begins, and its sizes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=4096)  # many tensors have few shapes
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that is ``outer``."""
        pairs = zip(self.offset, self.shape, outer.offset, strict=True)
        return tuple(slice(at - begin, at - begin + size) for at, size, begin in pairs)

    def run(self, outer: "Box") -> int | None:
        """The index in ``outer`` of this box's first element, if the box is contiguous there (row-major), else None."""
        if self == outer:
            return 0
        full, first = True, 0
        for size, room in zip(reversed(self.shape), reversed(outer.shape), strict=True):
            if not full and size != 1:
                return None
            full = full and size == room
        for at, begin, room in zip(self.offset, outer.offset, outer.shape, strict=True):
            first = first * room + at - begin
        return first


@dataclass(frozen=True, slots=True)
class LocalShard:
    """What this rank holds of a tensor of shape ``shape``, which ``cuts`` divides into cells: the cell number ``cell``.

    ``replicas`` ranks hold the same cell; this rank is number ``replica`` of them. Tensors with an equal ``group`` are
    distributed in the same way.
    """

    local: Tensor
    shape: tuple[int, ...]
    cuts: Cuts
    cell: int
    replicas: int
    replica: int
    group: Any

    @property
    def box(self) -> Box:
        return cell_of(self.shape, self.cuts, self.cell)


def shard(tensors: Mapping[str, Any], comm: Communicator) -> dict[str, LocalShard]:
    """How each tensor is distributed; a plain one is replicated. Raises StateError for what cannot be saved."""
    plain: Any = ((), 0, comm.size, comm.rank, ())
    found = {}
    for name, tensor in tensors.items():
        if not is_distributed(tensor):
            found[name] = LocalShard(tensor, tuple(tensor.shape), *plain)
            continue
        try:
            how = _grid(tensor.device_mesh, tensor.placements, comm.size)
            found[name] = LocalShard(local(tensor), tuple(tensor.shape), *how)
        except ValueError as error:
            raise StateError(f"cannot save {name}: {error}") from None
    return found


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor; all of a plain one."""
    found: Tensor = tensor._local_tensor.detach() if is_distributed(tensor) else tensor
    return found


def is_distributed(tensor: Any) -> bool:
    """Whether it is a distributed tensor (DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def rebuilt(local: Tensor, like: Any) -> Tensor:
    """A distributed tensor made of this rank's cell, distributed like ``like``."""
    found: Tensor = type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return found


def cell_of(shape: tuple[int, ...], cuts: Cuts, number: int) -> Box:
    """The cell of that number."""
    if not cuts:
        return Box.whole(shape)
    offset, sizes = [0] * len(shape), [*shape]
    for dimension, count in reversed(cuts):
        number, index = divmod(number, count)
        width = -(-shape[dimension] // count)
        offset[dimension] = begin = min(index * width, shape[dimension])
        sizes[dimension] = min(width, shape[dimension] - begin)
    return Box(tuple(offset), tuple(sizes))


def cells(cuts: Cuts) -> int:
    """How many cells there are."""
    return prod(count for _, count in cuts)


def cells_in(box: Box, shape: tuple[int, ...], cuts: Cuts) -> Iterator[tuple[int, Box, Box]]:
    """The cells that overlap a box of a tensor of that shape, as (number, cell, overlap)."""
    if 0 in box.shape:
        return
    if not cuts:
        yield 0, Box.whole(shape), box
        return
    touched = []
    for dimension, count in cuts:
        width = -(-shape[dimension] // count)
        last = box.offset[dimension] + box.shape[dimension] - 1
        touched.append(range(box.offset[dimension] // width, last // width + 1))
    for indices in product(*touched):
        number = 0
        for index, (_, count) in zip(indices, cuts, strict=True):
            number = number * count + index
        cell = cell_of(shape, cuts, number)
        yield number, cell, _shared(cell, box)


def _shared(a: Box, b: Box) -> Box:
    begin = tuple(map(max, a.offset, b.offset))
    ends = zip(a.offset, a.shape, b.offset, b.shape, begin, strict=True)
    return Box(begin, tuple(min(x + n, y + m) - at for x, n, y, m, at in ends))


@lru_cache(maxsize=256)
def _grid(mesh: Any, placements: tuple[Any, ...], size: int) -> tuple[Cuts, int, int, int, Any]:
    """What a mesh and the placements on it mean for this rank, in the fields of ``LocalShard``."""
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
    """Tensors that are divided alike, in the order in which each of the shelf's files contains them."""

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
        return cells(self.cuts)

    def cell(self, name: str, number: int) -> Box:
        """The cell of that number of a tensor."""
        return cell_of(self.tensors[name].shape, self.cuts, number)

    def offsets(self, number: int, size: int) -> dict[str, int]:
        """Where in the file of that cell, of ``size`` bytes without its header, each tensor begins. Raises Damaged."""
        if number not in self._offsets:
            position, found = 0, {}
            for name, kind in self.tensors.items():
                found[name] = position
                position += prod(self.cell(name, number).shape) * kind.itemsize
            if position != size:
                raise Damaged(f"{size} bytes cannot be the tensors of a file, which take {position}")
            self._offsets[number] = found
        return self._offsets[number]

    def split(self, size: int) -> Iterator["FileGroup"]:
        """Shelves whose files have about ``size`` bytes at most."""
        some: dict[str, Kind] = {}
        filled = 0
        for name, kind in self.tensors.items():
            more = prod(self.cell(name, 0).shape) * kind.itemsize
            if some and filled + more > size:
                yield FileGroup(self.cuts, {one: some[one] for one in in_order(some)})
                some, filled = {}, 0
            some[name] = kind
            filled += more
        yield FileGroup(self.cuts, {name: some[name] for name in in_order(some)})


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Which rank writes what. Every rank computes the same plan.

    ``mine``: shelf number -> the cell that this rank writes. ``own``: tensors that only this rank has. ``same``: names
    of tensors that are stored under another name.
    """

    shelves: tuple[FileGroup, ...]
    mine: dict[int, int]
    same: dict[str, str]
    own: FileGroup

    def names(self) -> list[str]:
        """The tensors of which this rank writes something."""
        return [name for shelf in (*map(self.shelves.__getitem__, self.mine), self.own) for name in shelf.tensors]

    def split(self, size: int) -> "WritePlan":
        """The same with files of about ``size`` bytes at most."""
        shelves: list[FileGroup] = []
        mine: dict[int, int] = {}
        for number, shelf in enumerate(self.shelves):
            for piece in shelf.split(size):
                if number in self.mine:
                    mine[len(shelves)] = self.mine[number]
                shelves.append(piece)
        return replace(self, shelves=tuple(shelves), mine=mine)


def plan(dealt: Mapping[str, LocalShard], own: Mapping[str, Tensor]) -> WritePlan:
    """Each cell of each tensor is written once. Where several ranks have the same, the tensors are spread over them by
    bytes.
    """
    groups, same = _groups(dealt)
    shelves: list[FileGroup] = []
    mine: dict[int, int] = {}
    for names in groups.values():
        one = dealt[names[0]]
        kinds = {name: Kind.of(dealt[name].local, dealt[name].shape, name) for name in names}
        for replica, tensors in enumerate(_spread(kinds, one.cuts, one.replicas)):
            if tensors and replica == one.replica:
                mine[len(shelves)] = one.cell
            if tensors:
                shelves.append(FileGroup(one.cuts, tensors))
    mine_alone = {name: Kind.of(tensor, tuple(tensor.shape), name) for name, tensor in own.items()}
    return WritePlan(
        tuple(shelves), mine, same, FileGroup((), {name: mine_alone[name] for name in in_order(mine_alone)})
    )


def _groups(dealt: Mapping[str, LocalShard]) -> tuple[dict[Any, list[str]], dict[str, str]]:
    """Names of tensors that are dealt out alike, and those that are the same tensor as another one."""
    first: dict[Any, str] = {}
    groups: dict[Any, list[str]] = {}
    same: dict[str, str] = {}
    for name, one in dealt.items():
        origin = first.setdefault((memory_key(one.local), one.shape, one.group), name)
        if origin == name:
            groups.setdefault(one.group, []).append(name)
        else:
            same[name] = origin
    return groups, same


def _spread(kinds: Mapping[str, Kind], cuts: Cuts, ways: int) -> Iterable[dict[str, Kind]]:
    """The tensors in as many shares of about the same bytes: the largest first, each to the smallest share."""
    if ways == 1:
        return [dict(kinds)]
    sizes = {name: prod(cell_of(kind.shape, cuts, 0).shape) * kind.itemsize for name, kind in kinds.items()}
    shares: list[tuple[int, int]] = [(0, way) for way in range(ways)]
    found: list[dict[str, Kind]] = [{} for _ in range(ways)]
    for name in sorted(kinds, key=lambda name: (-sizes[name], name)):
        filled, way = shares[0]
        found[way][name] = kinds[name]
        heapq.heapreplace(shares, (filled + sizes[name], way))
    return found

"""How tensors are divided among ranks and files: which rank writes which part of which tensor into which file.

A distributed tensor is divided along its first dimension, as FSDP does it, into cells: consecutive rows, each held by
one rank or by several replicas. The files of a checkpoint belong to groups of tensors that are divided alike: a group
has one file for each cell, and every file contains the tensors in the same order. So a manifest need not store offsets,
which could overlap or leave gaps in a hostile manifest, and its size grows with the number of tensors plus the number
of files, not with their product.

The only module that knows torch's distributed tensors. It never imports them: if no other module did, there are none.
"""

import heapq
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.manifest import MAX_TENSORS
from runner.checkpoint.tensor_file import Damaged, Kind, in_file_order, memory_key
from runner.distributed.communicator import Communicator
from runner.errors import StateError


@dataclass(frozen=True, slots=True)
class LocalShard:
    """What this rank holds of a tensor of shape ``shape``: cell ``cell`` of ``cells``, as number ``replica`` of
    ``replicas`` ranks. Tensors with an equal ``layout`` are distributed in the same way.
    """

    local: Tensor
    shape: tuple[int, ...]
    cells: int
    cell: int
    replicas: int
    replica: int
    layout: Any

    @property
    def rows(self) -> range:
        return rows_of(self.shape, self.cells, self.cell)


def shard(tensors: Mapping[str, Any], comm: Communicator) -> dict[str, LocalShard]:
    """How each tensor is distributed; a plain one is replicated. Raises StateError for what cannot be saved."""
    shards = {}
    for name, tensor in tensors.items():
        cell: Any = (1, 0, comm.size, comm.rank, ())
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


def rows_of(shape: tuple[int, ...], cells: int = 1, number: int = 0) -> range:
    """The rows of cell ``number`` of a tensor of this shape, as ``torch.chunk`` divides it. A tensor without dimensions
    is one row.
    """
    count = shape[0] if shape else 1
    width = -(-count // cells)
    return range(min(number * width, count), min((number + 1) * width, count))


def cells_with(rows: range, shape: tuple[int, ...], cells: int) -> Iterator[tuple[int, range]]:
    """The cells of a tensor that have some of these rows: the number of each, and all of its rows."""
    if rows:
        width = len(rows_of(shape, cells))
        for number in range(rows.start // width, (rows.stop - 1) // width + 1):
            yield number, rows_of(shape, cells, number)


@lru_cache(maxsize=256)
def _cell_fields(mesh: Any, placements: tuple[Any, ...], size: int) -> tuple[int, int, int, int, Any]:
    """The fields of ``LocalShard`` from ``cells`` on, for a tensor that is placed like this on a mesh."""
    coordinate = mesh.get_coordinate()
    if coordinate is None or mesh.size() != size:
        raise ValueError(f"a tensor on {mesh.size()} of {size} ranks; only meshes of all ranks can be saved")
    cells, cell, replicas, replica = 1, 0, 1, 0
    for placement, index, count in zip(placements, coordinate, mesh.shape, strict=True):
        if type(placement) is torch.distributed.tensor.Replicate:
            replicas, replica = replicas * count, replica * count + index
        elif placement == torch.distributed.tensor.Shard(0) and cells == 1:
            cells, cell = count, index
        else:
            raise ValueError(f"a tensor placed as {placements}; it may be replicated, or sharded once, by its rows")
    return cells, cell, replicas, replica, (mesh, placements)


def cell_bytes(kind: Kind, cells: int, number: int = 0) -> int:
    """The size of a cell."""
    return len(rows_of(kind.shape, cells, number)) * kind.row_bytes


@dataclass(frozen=True, slots=True)
class FileGroup:
    """Tensors that are divided alike, in the order in which each of the group's files contains them. It has a file for
    each of its ``cells``.
    """

    cells: int
    tensors: dict[str, Kind]
    _offsets: dict[int, dict[str, int]] = field(default_factory=dict, repr=False, compare=False)

    def offsets(self, number: int, size: int) -> dict[str, int]:
        """Where each tensor begins in the file of a cell. Raises Damaged unless they take ``size`` bytes."""
        if number not in self._offsets:
            position, offsets = 0, {}
            for name, kind in self.tensors.items():
                offsets[name] = position
                position += cell_bytes(kind, self.cells, number)
            if position != size:
                raise Damaged(f"{size} bytes cannot be the tensors of a file, which take {position}")
            self._offsets[number] = offsets
        return self._offsets[number]

    def split(self, size: int) -> Iterator["FileGroup"]:
        """Groups whose files have about ``size`` bytes at most."""
        tensors: dict[str, Kind] = {}
        filled = 0
        for name, kind in self.tensors.items():
            more = cell_bytes(kind, self.cells)
            if tensors and filled + more > size:
                yield FileGroup(self.cells, in_file_order(tensors))
                tensors, filled = {}, 0
            tensors[name] = kind
            filled += more
        yield FileGroup(self.cells, in_file_order(tensors))


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
    first: dict[Any, str] = {}  # tied weights are written once
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
        # All ranks compute this, and must get the same: it depends on names and sizes only.
        for replica, tensors in enumerate(_spread(kinds, like.cells, like.replicas)):
            if tensors and replica == like.replica:
                written[len(groups)] = like.cell
            if tensors:
                groups.append(FileGroup(like.cells, tensors))
    alone = {name: Kind.of(tensor, tuple(tensor.shape), name) for name, tensor in own.items()}
    return WritePlan(tuple(groups), written, aliases, FileGroup(1, in_file_order(alone)))


def _spread(kinds: Mapping[str, Kind], cells: int, ways: int) -> Iterable[dict[str, Kind]]:
    """The tensors in ``ways`` shares of about the same bytes: the largest first, each to the smallest share."""
    if ways == 1:
        return [dict(kinds)]
    sizes = {name: cell_bytes(kind, cells) for name, kind in kinds.items()}
    smallest = [(0, way) for way in range(ways)]  # a heap
    shares: list[dict[str, Kind]] = [{} for _ in range(ways)]
    for name in sorted(kinds, key=lambda name: (-sizes[name], name)):
        filled, way = smallest[0]
        shares[way][name] = kinds[name]
        heapq.heapreplace(smallest, (filled + sizes[name], way))
    return shares

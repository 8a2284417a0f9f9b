"""How a tensor is distributed over ranks: a grid of cells, each held by one rank or by several replicas.

The only module that knows torch's distributed tensors. It never imports them: if nobody else did, there are none.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from runner.errors import StateError
from runner.ranks import Ranks

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
class Dealt:
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


def deal(tensors: Mapping[str, Any], ranks: Ranks) -> dict[str, Dealt]:
    """How each tensor is distributed; a plain one is replicated. Raises StateError for what cannot be saved."""
    plain: Any = ((), 0, ranks.size, ranks.rank, ())
    found = {}
    for name, tensor in tensors.items():
        if not is_distributed(tensor):
            found[name] = Dealt(tensor, tuple(tensor.shape), *plain)
            continue
        try:
            how = _grid(tensor.device_mesh, tensor.placements, ranks.size)
            found[name] = Dealt(local(tensor), tuple(tensor.shape), *how)
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
    """What a mesh and the placements on it mean for this rank, in the fields of ``Dealt``."""
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

"""Where the tensors of a checkpoint are stored: on *shelves*, whose tensors are divided alike; and who writes what.

A shelf has one file per cell, and every file contains the tensors in the same order. So a manifest need not store
offsets, which could overlap or leave gaps in a hostile one, and its size grows with the number of tensors plus the
number of files, not with their product.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from runner.checkpoint.layout import Box, Cuts, Dealt, cell_of, cells
from runner.checkpoint.tensors import Damaged, Kind, in_order, memory_key


@dataclass(frozen=True, slots=True)
class Shelf:
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

    def split(self, size: int) -> Iterator["Shelf"]:
        """Shelves whose files have about ``size`` bytes at most."""
        some: dict[str, Kind] = {}
        filled = 0
        for name, kind in self.tensors.items():
            more = prod(self.cell(name, 0).shape) * kind.itemsize
            if some and filled + more > size:
                yield Shelf(self.cuts, {one: some[one] for one in in_order(some)})
                some, filled = {}, 0
            some[name] = kind
            filled += more
        yield Shelf(self.cuts, {name: some[name] for name in in_order(some)})


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rank writes what. Every rank computes the same plan.

    ``mine``: shelf number -> the cell that this rank writes. ``own``: tensors that only this rank has. ``same``: names
    of tensors that are stored under another name.
    """

    shelves: tuple[Shelf, ...]
    mine: dict[int, int]
    same: dict[str, str]
    own: Shelf

    def names(self) -> list[str]:
        """The tensors of which this rank writes something."""
        return [name for shelf in (*map(self.shelves.__getitem__, self.mine), self.own) for name in shelf.tensors]

    def split(self, size: int) -> "Plan":
        """The same with files of about ``size`` bytes at most."""
        shelves: list[Shelf] = []
        mine: dict[int, int] = {}
        for number, shelf in enumerate(self.shelves):
            for piece in shelf.split(size):
                if number in self.mine:
                    mine[len(shelves)] = self.mine[number]
                shelves.append(piece)
        return replace(self, shelves=tuple(shelves), mine=mine)


def plan(dealt: Mapping[str, Dealt], own: Mapping[str, Tensor]) -> Plan:
    """Each cell of each tensor is written once. Where several ranks have the same, the tensors are spread over them by
    bytes.
    """
    groups, same = _groups(dealt)
    shelves: list[Shelf] = []
    mine: dict[int, int] = {}
    for names in groups.values():
        one = dealt[names[0]]
        kinds = {name: Kind.of(dealt[name].local, dealt[name].shape, name) for name in names}
        for replica, tensors in enumerate(_spread(kinds, one.cuts, one.replicas)):
            if tensors and replica == one.replica:
                mine[len(shelves)] = one.cell
            if tensors:
                shelves.append(Shelf(one.cuts, tensors))
    mine_alone = {name: Kind.of(tensor, tuple(tensor.shape), name) for name, tensor in own.items()}
    return Plan(tuple(shelves), mine, same, Shelf((), {name: mine_alone[name] for name in in_order(mine_alone)}))


def _groups(dealt: Mapping[str, Dealt]) -> tuple[dict[Any, list[str]], dict[str, str]]:
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

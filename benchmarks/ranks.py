"""How the cost of a checkpoint grows with the ranks and the tensors of a run, simulated in one process.

    plan        what every rank works out at each save: who writes which cells of which tensors
    report      what every rank tells rank 0 of what it wrote; bytes of JSON
    seal        on rank 0 alone: the manifest of all reports, sealed
    manifest    its size; one, however many ranks
    open        what every rank does at a start: unseal and parse the manifest, work out its share of the files
    read        what every rank works out to load its cells of all tensors: which bytes of which files
    list        on rank 0 alone: the objects of five such commits in a local folder, listed once

Nothing of a tensor is allocated or written, and nobody waits for a network: these are the costs that no hardware takes
away. Times are milliseconds of this process's CPU, the least of three.

    python -m benchmarks.ranks [--ranks 1 8 64 1024] [--tensors 1000 10000]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate

from runner.checkpoint.checkpoint import Checkpoint, Reader, TensorBytes, parse
from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import CommitId, seal, unseal
from runner.checkpoint.sharding import LocalShard, WritePlan, cell_bytes, plan, rows_of
from runner.checkpoint.snapshot import RankFiles, Snapshot, assemble, rank_files
from runner.checkpoint.tensor_file import BLOCK, StoredFile
from runner.storage.local import LocalLocation

ROWS, COLUMNS = 2048, 32  # of every tensor
HEADER = 4096  # bytes of a data file
PART = 64 << 20  # bytes of a data file
DIGEST = "xxh3:" + 32 * "0"
COMMIT = CommitId(1, 1000, "0123456789ab")

T = TypeVar("T")


@dataclass(frozen=True)
class Seat:
    """A rank that exchanges nothing."""

    rank: int
    size: int


class Unread(Reader):
    """Works out what is to be read."""

    def _fill(self, blocks: Iterable[Any]) -> None:
        self.blocks = len([*blocks])

    def check(self, place: TensorBytes, number: int) -> None:
        """There are no files, and so no headers."""
        place.group.offsets(number, self._files[self._names[place.first + number]].data)


@dataclass(frozen=True)
class Layout:
    """Replicated, sharded, or sharded within groups of eight."""

    name: str
    cells: int
    replicas: int

    @classmethod
    def all(cls, ranks: int) -> Iterator["Layout"]:
        yield cls("ddp", 1, ranks)
        if ranks > 1:
            yield cls("fsdp", ranks, 1)
        if ranks > 8:
            yield cls("fsdp in groups of 8", 8, ranks // 8)

    def deal(self, tensors: int, seat: Seat) -> dict[str, LocalShard]:
        cell = seat.rank // self.replicas
        local = len(rows_of((ROWS, COLUMNS), self.cells, cell)), COLUMNS
        return {
            f"model/layers.{number}.weight": LocalShard(
                torch.empty(local),  # whose pages are never touched
                (ROWS, COLUMNS),
                self.cells,
                cell,
                self.replicas,
                seat.rank % self.replicas,
                "",
            )
            for number in range(tensors)
        }


def stored(how: WritePlan, number: int, cell: int) -> tuple[str, StoredFile]:
    """The file of a cell, as it would have been written."""
    group = how.groups[number]
    size = sum(cell_bytes(kind, group.cells, cell) for kind in group.tensors.values())
    return COMMIT.data(number, cell), StoredFile(HEADER + size, HEADER, DIGEST, [DIGEST] * -(-size // BLOCK))


def least(work: Callable[[], T]) -> tuple[float, T]:
    """The least milliseconds of three calls, and the result."""
    times = []
    for _ in range(3):
        began = time.process_time()
        result = work()
        times.append(1000 * (time.process_time() - began))
    return min(times), result


def row(layout: Layout, ranks: int, tensors: int) -> list[str]:
    seat = Seat(ranks // 2, ranks)
    dealt = layout.deal(tensors, seat)
    planning, how = least(lambda: plan(dealt, {}).split(PART))
    snapshot = Snapshot(1000, {"model": encode(state(dealt), "model")[0]}, {}, plan=how)
    mine = rank_files(snapshot, how, [stored(how, number, cell) for number, cell in how.written.items()])
    reports = [*everybody(how, mine, ranks)]
    sealing, raw = least(lambda: seal(assemble(COMMIT, snapshot, how, reports)))
    opening, checkpoint = least(lambda: opened(raw, seat))
    reading, blocks = least(lambda: read(checkpoint, dealt))
    files = sum(group.cells for group in how.groups)
    costs = [f"{ms:.0f}" for ms in (planning, sealing, opening, reading, listing(files))]
    sizes = [f"{len(json.dumps(mine)) / 1e3:.1f}", f"{len(raw) / 1e6:.2f}", f"{len(how.written)}", f"{blocks}"]
    plans, seals, opens, reads, lists = costs
    return [
        layout.name,
        str(ranks),
        str(tensors),
        plans,
        sizes[2],
        sizes[0],
        seals,
        sizes[1],
        opens,
        reads,
        sizes[3],
        lists,
    ]


def state(dealt: dict[str, LocalShard]) -> dict[str, Any]:
    return {name.partition("/")[2]: one.local for name, one in dealt.items()}


def everybody(how: WritePlan, mine: RankFiles, ranks: int) -> Iterator[RankFiles]:
    """The reports of all ranks; those of others are like this rank's, of other cells."""
    shares: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for number, group in enumerate(how.groups):
        for cell in range(group.cells):
            shares[(number + cell) % ranks].append((number, cell))
    for share in shares:
        files = [stored(how, number, cell) for number, cell in share]
        entries = [[name, file.size, file.header, file.digest, file.blocks] for name, file in files]
        yield {**mine, "shelves": [[*cell] for cell in share], "files": entries}


def opened(raw: bytes, seat: Seat) -> Checkpoint:
    manifest = unseal(raw)
    assert manifest is not None
    location: Any = None
    checkpoint = parse(COMMIT, manifest, location, seat)  # type: ignore[arg-type]  # a seat has no other ranks
    checkpoint = replace(checkpoint, reader=Unread(location, checkpoint.files))
    checkpoint.check()
    return checkpoint


def read(checkpoint: Checkpoint, dealt: dict[str, LocalShard]) -> int:
    checkpoint.tensors_of("model", dealt)
    reader: Any = checkpoint.reader
    return int(reader.blocks)


def listing(files: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        location = LocalLocation(Path(folder))
        Path(folder, "data").mkdir()
        for number in range(5 * files):
            Path(folder, COMMIT.data(number % 100_000, number // 100_000)).touch()
        return least(lambda: location.list("data"))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--tensors", type=int, nargs="+", default=[1000, 10_000])
    options = parser.parse_args()
    headers = ["layout", "ranks", "tensors", "plan ms", "files", "report kB", "seal ms", "manifest MB"]
    headers += ["open ms", "read ms", "blocks", "list ms"]
    table = [
        row(layout, ranks, tensors)
        for tensors in options.tensors
        for ranks in options.ranks
        for layout in Layout.all(ranks)
    ]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=["left"] + ["right"] * 11))


if __name__ == "__main__":
    main()

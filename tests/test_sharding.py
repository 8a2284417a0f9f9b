"""Tensors that are dealt out over ranks: saved by so many in one way, loaded by so many in another, the same bits."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from faults import MemoryLocation
from threads import ThreadRanks, among, ends_among
from torch import Tensor

from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import CommitId, parse_data, seal, unseal
from runner.checkpoint.sharding import LocalShard, cells_with, plan, rows_of
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import BLOCK, Damaged
from runner.errors import RunnerError, StateError, StorageError, Superseded

Layout = tuple[int, int]  # the number of chunks, and how many ranks have the same

LAYOUTS: dict[int, list[Layout]] = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(1, 3), (3, 1)], 4: [(1, 4), (4, 1), (2, 2)]}
WORLDS = [(size, layout) for size, layouts in LAYOUTS.items() for layout in layouts]


def whole() -> dict[str, Tensor]:
    """Tensors of every kind of shape: even, uneven, smaller than the world, empty, without a dimension."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4), (7, 5), (2, 3), (1, 9), (0, 3), (3, 0), (12,), (5,), (1,), (), (3, 5, 2), (4, 1, 4)]
    found = {f"model/{number}": torch.rand(shape, generator=generator) for number, shape in enumerate(shapes)}
    found["model/half"] = torch.rand(9, 6, generator=generator).half()
    found["model/truth"] = torch.rand(6, 7, generator=generator) > 0.5
    return found


def deal(tensors: dict[str, Tensor], layout: Layout, comm: "ThreadRanks | Seat") -> dict[str, LocalShard]:
    """What a rank has of them, those without a dimension whole; two names are of one tensor each."""
    cells, replicas = layout
    found = {}
    for name, tensor in tensors.items():
        shape, cell = tuple(tensor.shape), comm.rank // replicas
        if cells > 1 and shape:
            local = tensor[[*rows_of(shape, cells, cell)]].clone()
            found[name] = LocalShard(local, shape, cells, cell, replicas, comm.rank % replicas, "mesh")
        else:
            found[name] = LocalShard(tensor, shape, 1, 0, comm.size, comm.rank, ())
    ties = {"model/tied": "model/1", "model/tied empty": "model/4"}
    return found | {name: found[other] for name, other in ties.items() if other in found}


def snapshot(found: dict[str, LocalShard], comm: ThreadRanks, *, step: int = 7, **more: Any) -> Snapshot:
    """As of a state with these tensors in one part, and a part that each rank has to itself."""
    model, _ = encode({name.partition("/")[2]: one.local for name, one in found.items()} | more, "model")
    own, tensors = encode({"seed": torch.tensor([comm.rank, 9]), "number": comm.rank}, f"rng/{comm.rank}")
    how = plan(found, tensors)
    kept = {name: tensors[name] if name in tensors else found[name].local for name in how.names()}
    return Snapshot(step, {"model": model}, kept, {"identity": {}}, {"rng": own}, how)


def save(location: Any, layout: Layout, comm: ThreadRanks, **how: Any) -> CommitId:
    made = snapshot(deal(whole(), layout, comm), comm, **how)
    return CheckpointStore(location, comm).commit(made, attempt=1, require_newest=lambda: None)


def saved(size: int, layout: Layout) -> tuple[MemoryLocation, CommitId]:
    location = MemoryLocation()
    ids = among(size, lambda comm: save(location, layout, comm))
    assert len({*ids}) == 1, "one commit, of which all know"
    return location, ids[0]


@pytest.mark.parametrize(("size", "layout"), WORLDS)
def test_every_layout_loads_into_every_other(size: int, layout: Layout) -> None:
    location, commit = saved(size, layout)
    expected = whole() | {"model/tied": whole()["model/1"], "model/tied empty": whole()["model/4"]}
    for other, wanted in WORLDS:

        def load(comm: ThreadRanks, wanted: Layout = wanted) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
            checkpoint = CheckpointStore(location).open(commit, comm)
            target = deal(whole(), wanted, comm)
            return checkpoint.tensors_of("model", target), deal(whole(), wanted, comm), checkpoint.load("rng")

        for rank, (found, parts, own) in enumerate(among(other, load)):
            assert found.keys() == expected.keys()
            assert [name for name in found if not torch.equal(found[name], parts[name].local)] == []
            assert [name for name in found if found[name].dtype != expected[name].dtype] == []
            assert found["model/tied"] is found["model/1"]
            number = rank if rank < size else 0
            assert own["number"] == number
            assert own["seed"].tolist() == [number, 9]


@pytest.mark.parametrize(("size", "layout"), WORLDS)
def test_every_byte_is_written_once_and_the_work_is_shared(size: int, layout: Layout) -> None:
    location, commit = saved(size, layout)
    checkpoint = CheckpointStore(location).open(commit)
    bytes_of_all = sum(tensor.nbytes for tensor in whole().values()) + size * 16
    assert sum(file.data for file in checkpoint.files.values()) == bytes_of_all
    written = [0] * size
    for name, file in checkpoint.files.items():
        written[int(name.split(".")[1]) if size > 1 else 0] += file.data
    largest = max(tensor.nbytes for tensor in whole().values())
    assert max(written) - min(written) <= 2 * largest


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 0, 3), (4, 3, 2), (0, 2)])
@pytest.mark.parametrize("cells", [1, 2, 3, 5, 9])
def test_cells_are_those_of_chunk(shape: tuple[int, ...], cells: int) -> None:
    chunks = [chunk.flatten().tolist() for chunk in torch.arange(prod(shape)).view(shape).chunk(cells)]
    rows = [rows_of(shape, cells, number) for number in range(cells)]
    width = prod(shape[1:])
    found = [[*range(each.start * width, each.stop * width)] for each in rows]
    assert found == chunks + [[]] * (cells - len(chunks))
    wanted = range(shape[0] // 2, shape[0])
    assert [*cells_with(wanted, shape, cells)] == [(n, each) for n, each in enumerate(rows) if {*each} & {*wanted}]


class Measured(MemoryLocation):
    """Counts the bytes that are read of data."""

    read_bytes = 0

    def read_into(self, name: str, offset: int, buffers: Any) -> None:
        self.read_bytes += sum(map(len, buffers)) if offset else 0
        super().read_into(name, offset, buffers)


@dataclass(frozen=True)
class Seat:
    """A rank that nobody tells anything."""

    rank: int
    size: int


def test_a_rank_reads_little_more_than_its_part() -> None:
    location = Measured()
    large = {"model/large": torch.rand(16 << 20 >> 2, 1), "model/other": torch.rand(8 << 20 >> 2, 1)}
    made = CheckpointStore(location).commit(
        Snapshot.of(1, {"model": nested(large)}), attempt=1, require_newest=lambda: None
    )
    for size in (2, 4, 16):
        for rank in range(size):
            target = deal(large, (size, 1), Seat(rank, size))
            location.read_bytes = 0
            found = CheckpointStore(location).open(made).tensors_of("model", target)
            assert all(torch.equal(found[name], target[name].local) for name in found)
            needed = sum(tensor.nbytes for tensor in found.values())
            assert needed <= location.read_bytes <= needed + 2 * len(found) * BLOCK


def test_a_manifest_grows_with_tensors_plus_files() -> None:
    many = {f"model/{number}": torch.rand(64, 2) for number in range(500)}

    def size(comm: int) -> int:
        def work(seat: ThreadRanks) -> CommitId:
            made = snapshot(deal(many, (comm, 1), seat), seat)
            return CheckpointStore(location, seat).commit(made, attempt=1, require_newest=lambda: None)

        location = MemoryLocation()
        return len(location.objects[among(comm, work)[0].commit])

    assert size(32) - size(1) < 32 * 1000 < size(1)


def nested(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items()}


def broken(location: MemoryLocation, how: Callable[[str], bool]) -> MemoryLocation:
    """Puts of objects of such names fail."""

    def fault(_: int, verb: str, name: str, done: bool) -> None:
        if verb == "put" and not done and how(name):
            raise StorageError(f"no space left for {name}")

    location.arm(fault)
    return location


@pytest.mark.parametrize("failing", range(4))
def test_a_failure_on_one_rank_commits_nothing_on_any(failing: int) -> None:
    location = broken(MemoryLocation(), lambda name: f".{failing:05d}.000" in name)
    ends = ends_among(4, lambda comm: save(location, (4, 1), comm))
    assert {type(end) for end in ends} == {StorageError}
    assert len({str(end) for end in ends}) == 1
    assert str(ends[0]).startswith(f"rank {failing}: no space left")
    assert [name for name in location.objects if name.startswith("commits/")] == []


def test_an_error_of_a_single_rank_ends_all() -> None:
    def work(comm: ThreadRanks) -> CommitId:
        made = snapshot(deal(whole(), (1, 2), comm), comm)
        if comm.rank == 1:
            made.tensors.clear()
        return CheckpointStore(MemoryLocation(), comm).commit(made, attempt=1, require_newest=lambda: None)

    first, second = ends_among(2, work)
    assert isinstance(first, RunnerError)
    assert str(first).startswith("rank 1: KeyError: ")
    assert isinstance(second, KeyError)


def test_a_superseded_commit_is_so_on_all_ranks() -> None:
    asked: list[int] = []

    def work(comm: ThreadRanks) -> CommitId:
        def require_newest() -> None:
            asked.append(comm.rank)
            raise Superseded("attempt 2 took over")

        made = snapshot(deal(whole(), (1, 3), comm), comm)
        return CheckpointStore(MemoryLocation(), comm).commit(made, attempt=1, require_newest=require_newest)

    ends = ends_among(3, work)
    assert {type(end) for end in ends} == {Superseded}
    assert asked == [0]


def test_the_manifest_is_written_when_all_ranks_have_written() -> None:
    location, commit = saved(4, (2, 2))
    events = [(name, done) for verb, name, done in location.log if verb == "put"]
    manifest = events.index((commit.commit, False))
    data = [name for name, done in events[:manifest] if done]
    assert {parse_data(name.partition("/")[2]) for name in data} == {commit}
    assert {*data, commit.commit} == location.objects.keys()


@pytest.mark.parametrize("differing", ["value", "shape", "name"])
def test_ranks_with_differing_tensors_are_refused(differing: str) -> None:
    def work(comm: ThreadRanks) -> CommitId:
        tensors, more = whole(), {}
        if comm.rank == 1 and differing == "value":
            more = {"epoch": 1}
        if comm.rank == 1 and differing == "shape":
            tensors["model/0"] = tensors["model/0"].t()
        if comm.rank == 1 and differing == "name":
            tensors["model/new"] = tensors.pop("model/half")
        made = snapshot(deal(tensors, (1, 2), comm), comm, **more)
        return CheckpointStore(location, comm).commit(made, attempt=1, require_newest=lambda: None)

    location = MemoryLocation()
    ends = ends_among(2, work)
    assert [type(end) for end in ends] == [StateError, StateError]
    assert "the state of model on rank 1 is not that on rank 0" in str(ends[0])
    assert [name for name in location.objects if name.startswith("commits/")] == []


@pytest.mark.parametrize("part", ["task", "callback.own.mean", "model"])
def test_ranks_with_differing_parts_are_refused(part: str) -> None:
    """A mean over what this rank saw, which a resume would give to all; weights after an update that drew numbers."""

    def work(comm: ThreadRanks) -> CommitId:
        made = Snapshot.of(1, {part: {"mean": torch.tensor([0.0, comm.rank])}}, comm=comm)
        return CheckpointStore(location, comm).commit(made, attempt=1, require_newest=lambda: None)

    location = MemoryLocation()
    ends = ends_among(2, work)
    assert [type(end) for end in ends] == [StateError, StateError]
    told = part.replace("model", "weights")
    assert f"the state of {told} on rank 1 is not that on rank 0" in str(ends[0])
    assert [name for name in location.objects if name.startswith("commits/")] == []


@pytest.mark.parametrize("place", ["header", "data"])
def test_damage_on_one_rank_is_damage_on_all(place: str) -> None:
    location, commit = saved(4, (4, 1))
    name = next(name for name in location.objects if ".00002.00000." in name)
    raw = bytearray(location.objects[name])
    raw[20 if place == "header" else -1] ^= 1
    damaged = MemoryLocation(location.objects | {name: bytes(raw)})

    def load(comm: ThreadRanks) -> Any:
        checkpoint = CheckpointStore(damaged if comm.rank == 2 else location).open(commit, comm)
        return [checkpoint.load(part) for part in checkpoint.parts]

    ends = ends_among(4, load)
    assert {type(end) for end in ends} == {Damaged}
    assert all(name in str(end) for end in ends)


def test_a_single_rank_lists_for_all() -> None:
    location, commit = saved(4, (4, 1))
    location.log.clear()
    among(4, lambda comm: CheckpointStore(location).open(commit, comm).load("model"))
    assert [event for event in location.log if event[0] == "list"] == [("list", "data", False), ("list", "data", True)]


def rewritten(location: MemoryLocation, commit: CommitId, change: Callable[[Any], object]) -> None:
    manifest = unseal(location.objects[commit.commit])
    assert manifest is not None
    change(manifest)
    location.objects[commit.commit] = seal(manifest)


def last(files: dict[str, Any]) -> list[Any]:
    found: list[Any] = [*files.values()][-1]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].popitem(),
        lambda m: m["files"].update({"data/another": last(m["files"])}),
        lambda m: m["shelves"][0].update(cuts=[]),
        lambda m: m["shelves"][0].update(cuts=[[0, 3]]),
        lambda m: m["shelves"][0].update(cuts=[[0, 5]]),
        lambda m: m["shelves"][0].update(cuts=[[0, 1 << 70]]),
        lambda m: m["shelves"][0].update(cuts=[[0, -4]]),
        lambda m: m["shelves"][0].update(cuts=[[1, 4]]),
        lambda m: m["shelves"][0].update(cuts=[[7, 4]]),
        lambda m: m["shelves"][0].update(cuts=[[-1, 4]]),
        lambda m: m["shelves"][0].update(cuts=[[0, 2], [0, 2]]),
        lambda m: m["shelves"][0].update(cuts=[[0, 4.0]]),
        lambda m: m["shelves"][0].update(cuts=[[False, 4]]),
        lambda m: m["shelves"].append(m["shelves"][0]),
        lambda m: m["shelves"].append({"cuts": [], "tensors": {}}),
        lambda m: m["shelves"].pop(),
        lambda m: m["shelves"][0]["tensors"].popitem(),
        lambda m: m["shelves"][0]["tensors"].update({"model/more": ["F32", [4]]}),
        lambda m: m["shelves"][0]["tensors"].update({"model/0": ["F32", [9, 4]]}),
        lambda m: last(m["files"])[3].clear(),
        lambda m: last(m["files"])[3].append(last(m["files"])[2]),
        lambda m: m["same"].update({"model/alias": "model/nothing"}),
        lambda m: m["same"].update({"model/alias": ["model/0"]}),
        lambda m: m.update(ranks=0),
        lambda m: m.update(ranks=[4]),
        lambda m: m["parts"]["rng"]["items"].pop(),
        lambda m: m["parts"]["rng"].update(items={}),
    ],
)
def test_places_that_cannot_be_true_are_damage(change: Callable[[Any], object]) -> None:
    """Cells that do not cover a tensor, files of no cell, cells of no file, bytes without a digest."""
    location, commit = saved(4, (4, 1))
    rewritten(location, commit, change)
    with pytest.raises(Damaged):
        [CheckpointStore(location).open(commit).load(part) for part in ("model", "rng")]

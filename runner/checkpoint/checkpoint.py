"""An opened checkpoint: a manifest that passed all plausibility checks, and the state that it describes.

Of a tensor, all or some rows are read: only the blocks that contain them, in parallel, directly into the result. No
tensor is returned before the digests of all blocks that it came from have matched.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runner.activity import doing
from runner.checkpoint.encoding import decode, encode, in_memory_order, orders
from runner.checkpoint.manifest import MAX_TENSORS, CommitId, keyed_digest
from runner.checkpoint.sharding import FileGroup, LocalShard, cells_with, distribute, is_distributed, rows_of, shard
from runner.checkpoint.tensor_file import BLOCK, Damaged, Kind, StoredFile, bytes_of
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, on_all_ranks
from runner.errors import StateError
from runner.storage.location import Location

_BLOCKS_PER_READ = 8  # of a MiB each
_READERS = 8  # threads

# (file, number of the block) -> memory for pieces of the block by their offsets. The rest is read, too, for the digest.
_Blocks = dict[tuple[str, int], list[tuple[int, memoryview]]]


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """Where the bytes of a tensor are. ``first`` is the number of its group's first file among all files."""

    group: FileGroup
    name: str
    first: int

    @property
    def kind(self) -> Kind:
        return self.group.tensors[self.name]


class Reader:
    """Reads from the data files of one checkpoint."""

    def __init__(self, location: Location, files: Mapping[str, StoredFile]) -> None:
        self._location = location
        self._files = files
        self._names = [*files]

    def read(self, wanted: Mapping[str, tuple[TensorBytes, range]]) -> dict[str, Tensor]:
        """Rows of tensors, by any name. Raises Damaged."""
        blocks: _Blocks = {}
        tensors: dict[str, Tensor] = {}
        for name, (place, rows) in wanted.items():
            kind = place.kind
            sources = []  # of consecutive rows: the file, where they begin in it, and their size
            for number, cell in cells_with(rows, kind.shape, place.group.cells):
                file = self._names[place.first + number]
                begin = place.group.offsets(number, self._files[file].data)[place.name]
                first, end = max(cell.start, rows.start), min(cell.stop, rows.stop)
                sources.append((file, begin + (first - cell.start) * kind.row_bytes, (end - first) * kind.row_bytes))
            # Made only now: the files have its bytes.
            tensors[name] = kind.empty((len(rows), *kind.shape[1:]) if kind.shape else ())
            _scatter(bytes_of(tensors[name]), sources, blocks)
        self._fill(blocks)
        return tensors

    def verify(self) -> None:
        """Read every byte of every file. Raises Damaged."""
        for name, file in self._files.items():
            self._fill({(name, number): [] for number in range(len(file.blocks))})

    def check(self, place: TensorBytes, number: int) -> None:
        """Raise Damaged for another size or header of the file of a cell."""
        name = self._names[place.first + number]
        file = self._files[name]
        place.group.offsets(number, file.data)
        header = memoryview(bytearray(file.header))
        self._location.read_into(name, 0, [header])
        _require_digest(name, 0, [header], file.digest)

    def _fill(self, blocks: _Blocks) -> None:
        """Read whole blocks, neighbours at once."""
        runs: list[list[tuple[str, int]]] = []
        for file, number in sorted(blocks):
            if runs and runs[-1][-1] == (file, number - 1) and len(runs[-1]) < _BLOCKS_PER_READ:
                runs[-1].append((file, number))
            else:
                runs.append([(file, number)])
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(lambda run: self._read(run, blocks), runs))  # raises their errors

    def _read(self, run: list[tuple[str, int]], blocks: _Blocks) -> None:
        name, first = run[0]
        file = self._files[name]
        buffers = [_buffers(blocks[key], min(BLOCK, file.data - key[1] * BLOCK)) for key in run]
        self._location.read_into(name, file.header + first * BLOCK, [part for block in buffers for part in block])
        for (_, number), block in zip(run, buffers, strict=True):  # while the bytes are in the processor's cache
            _require_digest(name, file.header + number * BLOCK, block, file.blocks[number])


def _require_digest(file: str, begin: int, data: list[memoryview], expected: str) -> None:
    actual = keyed_digest(*data)
    if actual != expected:
        raise Damaged(f"{file} bytes {begin} to {begin + sum(map(len, data))}: digest {actual}, expected {expected}")


def _buffers(pieces: list[tuple[int, memoryview]], size: int) -> list[memoryview]:
    """Memory for all ``size`` bytes of a block: its pieces, and scratch memory between them, read for the digest."""
    buffers: list[memoryview] = []
    position = 0
    for at, piece in sorted(pieces, key=lambda piece: piece[0]):
        buffers += [memoryview(bytearray(at - position)), piece] if at > position else [piece]
        position = at + len(piece)
    return buffers if position == size else [*buffers, memoryview(bytearray(size - position))]


def _scatter(memory: memoryview, sources: Iterable[tuple[str, int, int]], blocks: _Blocks) -> None:
    """Add the memory for bytes of files, one source after the other, to the blocks that they are in."""
    for file, offset, size in sources:
        piece, memory = memory[:size], memory[size:]
        while piece:
            number, within = divmod(offset, BLOCK)
            blocks.setdefault((file, number), []).append((within, piece[: BLOCK - within]))
            offset, piece = offset + BLOCK - within, piece[BLOCK - within :]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A commit whose manifest unsealed and whose data files are there in full size; tensors are verified as they are
    read. It was saved by ``world_size`` ranks; the ranks of ``comm`` load it together.
    """

    id: CommitId
    world_size: int
    files: dict[str, StoredFile]
    parts: dict[str, Any]
    places: dict[str, TensorBytes]
    facts: dict[str, Any]
    reader: Reader
    comm: Communicator = SINGLE_PROCESS

    @property
    def step(self) -> int:
        return self.id.step

    @doing("saves")
    def load(self, part: str, *, like: Any = None) -> Any:
        """The state dict of one part; if it differs between ranks, this rank's, or rank 0's if there was no such rank.
        Where the state ``like`` has a distributed tensor, the loaded state has one, too.

        Raises Damaged; nothing that failed its digest is returned, on any rank.
        """
        return on_all_ranks(self.comm, lambda: self._load(part, like))

    def _load(self, part: str, like: Any) -> Any:
        live = {} if like is None else encode(like, part)[1]
        live = {name: tensor for name, tensor in live.items() if is_distributed(tensor)}
        self._require_shapes(live)
        try:
            tensors = self.tensors_of(part, shard(live, self.comm))
            tensors |= {name: distribute(tensors[name], like) for name, like in live.items() if name in tensors}
            return decode(self._value(part), tensors.__getitem__)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, StateError) as error:
            raise Damaged(f"{self.id.commit} has no state of {part} that can be read: {error!r}") from error

    @doing("saves")
    def tensors_of(self, part: str, shards: Mapping[str, LocalShard] | None = None) -> dict[str, Tensor]:
        """The tensors of one part by their names in the checkpoint; of those in ``shards`` the cell of this rank. Names
        that shared one tensor when they were written share one again.
        """
        entries = orders(self._value(part))
        names = dict(entries)
        if len(names) < len(entries):  # a few bytes of references could stand for any amount of memory
            raise ValueError("a tensor is named twice")
        missing = next((name for name in names if name not in self.places), None)
        if missing is not None:
            raise Damaged(f"{self.id.commit} has no tensor {missing!r}")
        rows = {name: shard.rows for name, shard in (shards or {}).items()}
        wanted = {name: (at := self.places[name], rows.get(name, rows_of(at.kind.shape))) for name in names}
        first: dict[Any, str] = {}
        aliases = {name: first.setdefault((place.name, each), name) for name, (place, each) in wanted.items()}
        read = self.reader.read({name: wanted[name] for name in first.values()})
        # Popped one by one, so that no more than one of them is in memory in two layouts.
        tensors = {name: in_memory_order(read.pop(name), names[name]) for name in [*read]}
        return {name: tensors[original] for name, original in aliases.items()}

    @doing("saves")
    def check(self) -> None:
        """Raise Damaged for a file of another size or header; each rank looks at its share of the files."""
        for place in {place.first: place for place in self.places.values()}.values():
            for number in range(place.group.cells):
                if (place.first + number) % self.comm.size == self.comm.rank:
                    self.reader.check(place, number)

    @doing("saves")
    def verify(self) -> None:
        """Read every byte. Raises Damaged."""
        self.reader.verify()

    def _value(self, part: str) -> Any:
        """An encoded part; of a part that differs between ranks the value of this rank."""
        value = self.parts[part]
        if isinstance(value, dict) and value.get("$") == "ranks":
            if len(value["items"]) != self.world_size:
                raise ValueError(f"{len(value['items'])} states of {self.world_size} ranks")
            return value["items"][self.comm.rank if self.comm.rank < self.world_size else 0]
        return value

    def _require_shapes(self, live: Mapping[str, Tensor]) -> None:
        for name, tensor in live.items():
            place = self.places.get(name)
            if place is not None and (saved := place.kind.shape) != tuple(tensor.shape):
                raise StateError(
                    f"{name} has shape {tuple(tensor.shape)} in this run, and {saved} in {self.id.commit}",
                    kind="structure",
                )


def parse(commit: CommitId, manifest: Mapping[str, Any], location: Location, comm: Communicator) -> Checkpoint:
    """The checkpoint that a manifest describes. Raises Damaged for values that no run writes."""
    try:
        files = {name: StoredFile(*fields) for name, fields in manifest["files"].items()}
        places = dict(_places(manifest["shelves"], len(files)))
        places |= {name: places[other] for name, other in manifest["same"].items()}
        if len(places) > MAX_TENSORS:
            raise Damaged(f"{commit.commit} has more than {MAX_TENSORS} tensors")
        if (manifest["attempt"], manifest["step"]) != (commit.attempt, commit.step):
            raise Damaged(f"{commit.commit} is the manifest of another commit")
        facts, world_size = _facts(decode(manifest["facts"], no_tensor)), manifest["ranks"]
        if type(world_size) is not int or world_size < 1:
            raise Damaged(f"{commit.commit} was saved by {world_size!r} ranks")
        reader = Reader(location, files)
        return Checkpoint(commit, world_size, files, dict(manifest["parts"]), places, facts, reader, comm)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, StateError) as error:
        raise Damaged(f"{commit.commit} is not a manifest of this format: {error!r}") from error


def objective_of(facts: Mapping[str, Any]) -> float | None:
    """The value of the objective among the facts of a commit, if there is one."""
    value = facts.get("objective")
    return float(value) if isinstance(value, int | float) else None


def no_tensor(name: str) -> Tensor:
    """For ``decode``, where no tensor is allowed. Raises ValueError."""
    raise ValueError(f"a tensor {name!r} among the facts")


def _facts(decoded: Any) -> dict[str, Any]:
    """The facts of a commit, if they have the types that their readers expect. Raises ValueError."""
    facts = dict(decoded)
    end, elapsed = facts.get("metrics") or {"segment": "", "lines": 0}, facts.get("elapsed", 0.0)
    marks = facts.get("writers", {})
    mappings = (end, facts.get("identity", {}), facts.get("structure", {}), marks, *dict(marks).values())
    if not all(isinstance(each, dict) for each in mappings) or not isinstance(elapsed, int | float):
        raise ValueError("facts of other types")
    if not isinstance(end["segment"], str) or type(end["lines"]) is not int or not 0 <= elapsed < 1e15:
        raise ValueError("facts that cannot be true")
    return facts


def _places(groups: list[Any], files: int) -> Iterator[tuple[str, TensorBytes]]:
    """Where each tensor is. The files are those of the cells of the groups, in their order."""
    first = 0
    names: set[str] = set()
    for entry in groups:
        if len(names) + len(entry["tensors"]) > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        kinds = {name: Kind(dtype, tuple(shape)) for name, (dtype, shape) in entry["tensors"].items()}
        group = FileGroup(_cells(entry["cuts"]), kinds)
        if not kinds or not names.isdisjoint(kinds):
            raise ValueError("a group without tensors, or a tensor twice")
        names.update(kinds)
        yield from ((name, TensorBytes(group, name, first)) for name in kinds)
        first += group.cells
    if first != files:
        raise ValueError(f"{files} files for {first} cells")


def _cells(cuts: Any) -> int:
    """Into how many cells the tensors of a group are divided."""
    if cuts == []:
        return 1
    ((dimension, cells),) = cuts
    if (type(dimension), dimension, type(cells)) != (int, 0, int) or cells < 1:
        raise ValueError(f"cuts {cuts}")
    return int(cells)

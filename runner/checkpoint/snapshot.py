"""The state at a step on its way to the storage: what each rank writes, reports, and the manifest of all of it.

Copies of the state in reused host memory: the only part of saving for which training waits.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import FORMAT, CommitId, digest
from runner.checkpoint.sharding import FileGroup, WritePlan, is_distributed, local, plan, shard
from runner.checkpoint.tensor_file import StoredFile, bytes_of, memory_key
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, PerRank
from runner.errors import StateError

MAX_TENSORS = 1 << 18  # of a checkpoint; about as many as the bytes of a manifest have room for

Report = dict[str, Any]  # what a rank tells of what it wrote; JSON

_ELEMENTS = 1 << 18  # of a tensor that are compared between ranks
_TRAINED = {"model", "optimizer", "average"}  # large, and alike by the gradients that all ranks have together ...
_GLANCED, _FEW = 16, 64  # ... unless an update draws numbers: of so many weights so many elements are compared


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state at a step, as it will be committed: JSON by part, and tensors by name, those that this rank writes.

    Among several ranks ``plan`` is how the tensors are dealt out, and ``own`` has the parts that each has to itself;
    ``contents`` are digests of what all must have alike: of a little of the weights, and of all that a user remembers.
    """

    step: int
    parts: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    plan: WritePlan | None = None
    contents: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, step: int, parts: Mapping[str, Any], *, comm: Communicator = SINGLE_PROCESS, **facts: Any
    ) -> "Snapshot":
        """Encode the state dicts of ``parts``. Raises StateError for what cannot be restored exactly."""
        own = {name for name, state in parts.items() if isinstance(state, PerRank) and comm.size > 1}
        encoded = {n: encode(state, f"{n}/{comm.rank}" if n in own else n) for n, state in parts.items()}
        found = {name: value for name, (value, _) in encoded.items() if name not in own}
        shared, alone = _tensors(encoded, {*encoded} - own), _tensors(encoded, own)
        told = encode(facts, "facts")[0]
        if comm.size == 1:
            return cls(step, found, {name: local(tensor) for name, tensor in shared.items()}, told)
        dealt = shard(shared, comm)
        how = plan(dealt, alone)
        tensors = {name: alone[name] if name in alone else dealt[name].local for name in how.names()}
        contents = {name: _content(encoded[name][1].values()) for name in {*encoded} - own - _TRAINED}
        contents["weights"] = _content(
            _glance([tensor for name, tensor in shared.items() if name.startswith("model/")])
        )
        return cls(step, found, tensors, told, {name: encoded[name][0] for name in own}, how, contents)


def _tensors(encoded: Mapping[str, tuple[Any, dict[str, Tensor]]], of: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for part, (_, found) in encoded.items() if part in of for name, tensor in found.items()}


def _glance(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors[:: max(1, len(tensors) // _GLANCED)]:
        yield tensor if is_distributed(tensor) else tensor.reshape(-1)[:_FEW]


def _content(tensors: Iterable[Tensor]) -> str:
    """A digest of the elements of tensors, of large ones of the first."""
    firsts = (tensor.reshape(-1)[:_ELEMENTS].cpu() for tensor in tensors if not is_distributed(tensor))
    return digest(*(bytes_of(first.resolve_conj().resolve_neg().contiguous()) for first in firsts))


def report(snapshot: Snapshot, how: WritePlan, files: Sequence[tuple[str, StoredFile]]) -> Report:
    """What a rank tells of the ``files`` that it wrote, one for each of its shelves and one for what it has to itself,
    and of the state that all ranks have alike: a digest for each part.
    """
    told = [[name, *_fields(file)] for name, file in files]
    shelves = [[number, cell] for number, cell in how.mine.items()]
    if snapshot.plan is None:
        return {"files": told, "shelves": shelves}
    return {
        "files": told,
        "shelves": shelves,
        "tensors": _kinds(how.own),
        "own": snapshot.own,
        "alike": _alike(snapshot, how),
    }


def require_few(how: WritePlan, *, more: int = 0) -> None:
    """Raise StateError for so many tensors that they could not be loaded again."""
    found = sum(len(shelf.tensors) for shelf in how.shelves) + len(how.same) + more
    if found > MAX_TENSORS:
        raise StateError(f"cannot save {found} tensors; a checkpoint has at most {MAX_TENSORS}")


def assemble(commit: CommitId, snapshot: Snapshot, how: WritePlan, reports: Sequence[Report]) -> dict[str, Any]:
    """The manifest of what all ranks wrote. Raises StateError where they do not have the same state."""
    files: dict[tuple[int, int], list[Any]] = {}
    own: list[tuple[dict[str, Any], list[Any]]] = []
    for rank, told in enumerate(reports):
        _require_alike(rank, told, reports[0])
        for (number, cell), file in zip(told["shelves"], told["files"], strict=False):
            assert (number, cell) not in files, "two ranks wrote the same"
            files[number, cell] = file
        if told.get("tensors"):
            own.append((told["tensors"], told["files"][-1]))
    ordered = [files[number, cell] for number, shelf in enumerate(how.shelves) for cell in range(shelf.cells)]
    shelves = [{"cuts": shelf.cuts, "tensors": _kinds(shelf)} for shelf in how.shelves]
    require_few(how, more=sum(len(tensors) for tensors, _ in own))
    return {
        "format": FORMAT,
        "attempt": commit.attempt,
        "step": commit.step,
        "ranks": len(reports),
        "files": {name: fields for name, *fields in (*ordered, *(file for _, file in own))},
        "shelves": [*shelves, *({"cuts": (), "tensors": tensors} for tensors, _ in own)],
        "same": how.same,
        "parts": snapshot.parts | {part: _of_ranks(part, reports) for part in snapshot.own},
        "facts": snapshot.facts,
    }


def _fields(file: StoredFile) -> list[Any]:
    return [file.size, file.header, file.digest, list(file.blocks)]


def _kinds(shelf: FileGroup) -> dict[str, Any]:
    return {name: [kind.dtype, kind.shape] for name, kind in shelf.tensors.items()}


def _of_ranks(part: str, reports: Sequence[Report]) -> dict[str, Any]:
    return {"$": "ranks", "items": [told["own"][part] for told in reports]}


def _alike(snapshot: Snapshot, how: WritePlan) -> dict[str, str]:
    """A digest of each part, of its values as of its tensors' names, shapes, places and contents."""
    lines: dict[str, list[str]] = {part: [json.dumps(value)] for part, value in snapshot.parts.items()}
    for number, shelf in enumerate(how.shelves):
        for name, kind in shelf.tensors.items():
            lines[name.partition("/")[0]].append(f"{number} {shelf.cuts} {name} {kind.dtype} {kind.shape}")
    for name, other in how.same.items():
        lines[name.partition("/")[0]].append(f"{name} {other}")
    for part, content in snapshot.contents.items():
        lines.setdefault(part, []).append(content)
    return {part: digest("\n".join(found).encode()) for part, found in lines.items()}


def _require_alike(rank: int, told: Report, first: Report) -> None:
    ours, others = first.get("alike", {}), told.get("alike", {})
    if differing := [part for part in {**ours, **others} if ours.get(part) != others.get(part)]:
        raise StateError(
            f"cannot save: the state of {', '.join(differing)} on rank {rank} is not that on rank 0. "
            "What is not sharded must be the same on all ranks, or it cannot be restored: bring together what each "
            "saw, and let what moves weights draw the same on all."
        )


class Staging:
    """Room for one copy of the state. Tensors that share all their memory share it in the copy."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}
        self._copied: list[torch.cuda.Event] = []  # one for each device that holds a part of the state

    def stage(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its tensors as they are at this moment, on the host.

        From CUDA they are copied into pinned memory in the order of the stream: kernels that are launched later see the
        copy done, and this thread does not wait for it. ``wait`` does.
        """
        return replace(snapshot, tensors=self._copy(snapshot.tensors))

    def wait(self) -> None:
        """Return when everything that was staged has arrived."""
        for event in self._copied:
            event.synchronize()

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first: dict[object, str] = {}
        alias = {name: first.setdefault(memory_key(tensor), name) for name, tensor in tensors.items()}
        rooms = {name: self._room(name, tensors[name]) for name in first.values()}
        self._rooms = rooms  # what is no longer part of the state is given back
        for name, room in rooms.items():
            room.copy_(tensors[name], non_blocking=True)
        devices = {tensors[name].device for name in rooms if tensors[name].is_cuda}
        # An event alone would be of the current device, whatever device the copies come from.
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        return {name: rooms[alias[name]] for name in tensors}

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        room = self._rooms.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return room

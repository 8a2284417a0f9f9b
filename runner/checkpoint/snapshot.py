"""The state at a step on its way to the storage: its copy in host memory, the thread that commits copies one at a time,
the record that each rank makes of its files, and the manifest made of all records.

The copy is the only part of saving for which training waits. Every rank has such a thread. Rank 0 takes the copy that
waits and announces its step; the threads of the other ranks wait for that and write their copy of the same step.
"""

import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from runner.activity import doing
from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import FORMAT, CommitId, keyed_digest
from runner.checkpoint.sharding import FileGroup, WritePlan, is_distributed, local, plan, shard
from runner.checkpoint.tensor_file import StoredFile, bytes_of, memory_key
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, PerRank
from runner.errors import StateError

RankFiles = dict[str, Any]  # what a rank wrote; JSON

# Before a commit, ranks compare the state that all must have alike. The trained parts are large, and alike because the
# gradients are; only a few weights are compared, which shows an update that draws different numbers on each rank.
_LARGE_PARTS = {"model", "optimizer", "average"}
_COMPARED_WEIGHTS, _COMPARED_OF_WEIGHT = 16, 64  # weights, and elements of each
_COMPARED_OF_TENSOR = 1 << 18  # elements of any other tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state at a step, as it will be committed: JSON by part, and tensors by name, those that this rank writes.

    Among several ranks ``plan`` says who writes what, ``own`` has the JSON of the parts that differ between ranks, and
    ``contents`` has digests of tensors that must not differ, to be compared.
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
        states = {n: encode(state, f"{n}/{comm.rank}" if n in own else n) for n, state in parts.items()}
        values = {name: value for name, (value, _) in states.items() if name not in own}
        shared: dict[str, Tensor] = {}
        alone: dict[str, Tensor] = {}
        for name, (_, tensors) in states.items():
            (alone if name in own else shared).update(tensors)
        facts = encode(facts, "facts")[0]
        if comm.size == 1:
            return cls(step, values, {name: local(tensor) for name, tensor in shared.items()}, facts)
        shards = shard(shared, comm)
        write = plan(shards, alone)
        output = {name: alone[name] if name in alone else shards[name].local for name in write.names()}
        small = [name for name in values if name.partition(".")[0] not in _LARGE_PARTS]
        contents = {name: _content_digest(states[name][1].values()) for name in small}
        weights = [tensor for name, tensor in shared.items() if name.startswith("model/")]
        weights = weights[:: max(1, len(weights) // _COMPARED_WEIGHTS)]
        contents["weights"] = _content_digest(weights, most=_COMPARED_OF_WEIGHT)
        return cls(step, values, output, facts, {name: states[name][0] for name in own}, write, contents)


def _content_digest(tensors: Iterable[Tensor], *, most: int = _COMPARED_OF_TENSOR) -> str:
    """A digest of the first ``most`` elements of each tensor."""
    pieces = (tensor.reshape(-1)[:most].cpu() for tensor in tensors if not is_distributed(tensor))
    return keyed_digest(*(bytes_of(piece.resolve_conj().resolve_neg().contiguous()) for piece in pieces))


def rank_files(snapshot: Snapshot, plan: WritePlan, files: Sequence[tuple[str, StoredFile]]) -> RankFiles:
    """What this rank wrote: ``files`` are those of ``plan.written``, and a last one for the tensors that only it has;
    and digests of the state that all ranks have alike.
    """
    entries = {
        "files": [[name, file.size, file.header, file.digest, file.blocks] for name, file in files],
        "shelves": [[number, cell] for number, cell in plan.written.items()],
    }
    if snapshot.plan is None:
        return entries
    return entries | {"tensors": _kinds(plan.own), "own": snapshot.own, "alike": _part_digests(snapshot, plan)}


def assemble(commit: CommitId, snapshot: Snapshot, plan: WritePlan, ranks: Sequence[RankFiles]) -> dict[str, Any]:
    """The manifest of what all ranks wrote. Raises StateError where they do not have the same state."""
    files: dict[tuple[int, int], list[Any]] = {}
    own: list[tuple[dict[str, Any], list[Any]]] = []
    for rank, entries in enumerate(ranks):
        _require_alike(rank, entries, ranks[0])
        for (number, cell), file in zip(entries["shelves"], entries["files"], strict=False):
            assert (number, cell) not in files, "two ranks wrote the same"
            files[number, cell] = file
        if entries.get("tensors"):
            own.append((entries["tensors"], entries["files"][-1]))
    in_order = [files[number, cell] for number, group in enumerate(plan.groups) for cell in range(group.cells)]
    # The format calls groups shelves, and has room for tensors that are divided along several dimensions.
    cuts = [[[0, group.cells]] if group.cells > 1 else [] for group in plan.groups]
    groups = [{"cuts": each, "tensors": _kinds(group)} for each, group in zip(cuts, plan.groups, strict=True)]
    return {
        "format": FORMAT,
        "attempt": commit.attempt,
        "step": commit.step,
        "ranks": len(ranks),
        "files": {name: fields for name, *fields in (*in_order, *(file for _, file in own))},
        "shelves": [*groups, *({"cuts": [], "tensors": tensors} for tensors, _ in own)],
        "same": plan.aliases,
        "parts": snapshot.parts
        | {part: {"$": "ranks", "items": [entries["own"][part] for entries in ranks]} for part in snapshot.own},
        "facts": snapshot.facts,
    }


def _kinds(group: FileGroup) -> dict[str, Any]:
    return {name: [kind.dtype, kind.shape] for name, kind in group.tensors.items()}


def _part_digests(snapshot: Snapshot, plan: WritePlan) -> dict[str, str]:
    """A digest of each part: of its values, and of its tensors' names, shapes, places and contents."""
    lines: dict[str, list[str]] = {part: [json.dumps(value)] for part, value in snapshot.parts.items()}
    for number, group in enumerate(plan.groups):
        for name, kind in group.tensors.items():
            lines[name.partition("/")[0]].append(f"{number} {group.cells} {name} {kind.dtype} {kind.shape}")
    for name, original in plan.aliases.items():
        lines[name.partition("/")[0]].append(f"{name} {original}")
    for part, content in snapshot.contents.items():
        lines.setdefault(part, []).append(content)
    return {part: keyed_digest("\n".join(text).encode()) for part, text in lines.items()}


def _require_alike(rank: int, entries: RankFiles, first: RankFiles) -> None:
    digests, expected = entries.get("alike", {}), first.get("alike", {})
    differences = [part for part in {**expected, **digests} if expected.get(part) != digests.get(part)]
    if differences:
        raise StateError(
            f"cannot save: the state of {', '.join(differences)} on rank {rank} is not that on rank 0. "
            "What is not sharded must be the same on all ranks, or it cannot be restored: combine what each rank has "
            "seen (update.gather), and draw the same random numbers on all ranks where they move weights."
        )


class Staging:
    """Reused host memory with one copy of the state, ``snapshot``. Tensors that share all their memory share it in the
    copy. An ``exact`` copy is needed itself; any other may be replaced by a newer one. ``weights`` are the names of the
    tensors that have to be finite.
    """

    def __init__(self) -> None:
        self.snapshot = Snapshot(0, {}, {})
        self.exact = False
        self.weights: Collection[str] = ()
        self._buffers: dict[str, Tensor] = {}
        self._copied: list[torch.cuda.Event] = []  # one for each device that holds a part of the state

    def stage(self, snapshot: Snapshot, *, exact: bool = False, weights: Collection[str] = ()) -> None:
        """Copy the snapshot, with its tensors as they are at this moment. From CUDA they come into pinned memory in the
        order of the stream: kernels launched later cannot change the copy. ``wait`` waits for it.
        """
        tensors, first = snapshot.tensors, dict[object, str]()
        alias = {name: first.setdefault(memory_key(tensor), name) for name, tensor in tensors.items()}
        buffers = {}
        for name in first.values():
            tensor, buffer = tensors[name], self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffers[name] = buffer
        self._buffers = buffers  # memory of tensors that left the state is freed, before anything is copied
        for name, buffer in buffers.items():
            buffer.copy_(tensors[name], non_blocking=True)
        devices = {tensors[name].device for name in buffers if tensors[name].is_cuda}
        # An event alone would be of the current device, whatever device the copies come from.
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        self.snapshot = replace(snapshot, tensors={name: buffers[alias[name]] for name in tensors})
        self.exact, self.weights = exact, weights

    def wait(self) -> None:
        """Return when everything that was staged has arrived."""
        for event in self._copied:
            event.synchronize()


class CommitThread:
    """Calls ``commit`` in a background thread for every copy that was ``put``, in their order.

    A copy whose commit raised is the next again, and the thread is idle until ``retry``, or until that copy is taken.
    On rank 0 ``failure`` is its step and error. ``commit`` of rank 0 has to broadcast the step of its copy over
    ``comm``, which belongs to this thread: those of the other ranks follow.
    """

    def __init__(self, commit: Callable[[Staging], None], comm: Communicator) -> None:
        self.failure: tuple[int, BaseException] | None = None
        self._commit = commit
        self._comm = comm
        self._changed = threading.Condition()
        self._waiting: dict[int, Staging] = {}  # by step
        self._failed: int | None = None  # the step of a copy that waits because its commit raised
        self._busy = self._held = self._closed = False
        self._error: Exception | None = None  # of the wait for rank 0
        self._thread: threading.Thread | None = None  # started for the first copy: data workers are forked before

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, and nothing will be before the next ``put`` or ``retry``."""
        return not self._busy and (self._failed is not None or not self._waiting)

    @property
    def waiting(self) -> dict[int, Staging]:
        """The copies by step that are not being written yet, or have failed."""
        with self._changed:
            return dict(self._waiting)

    def put(self, copy: Staging) -> None:
        """Commit it after the copies before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
            self._thread.start()
        with self._changed:
            self._waiting[copy.snapshot.step] = copy
            self._held = False
            self._changed.notify_all()

    def hold(self) -> dict[int, Staging]:
        """Begin no other copy before ``put`` or ``retry``; returns ``waiting``."""
        with self._changed:
            self._held = True
            return dict(self._waiting)

    @doing("joins")
    def retry(self) -> None:
        """Commit the copy that failed once more; blocks while it is still failing."""
        with self._changed:
            self._wait_for(lambda: self._failed is not None)
            self._failed, self._held = None, False
            self._changed.notify_all()

    @doing("joins")
    def take(self, step: int) -> Staging:
        """Remove and return the copy of a step, which waits or has failed; blocks while it is still failing."""
        with self._changed:
            self._wait_for(lambda: step in self._waiting)
            self._failed = None if self._failed == step else self._failed
            return self._waiting.pop(step)

    @doing("joins")
    def wait(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> bool:
        """Wait ``seconds`` at most; returns whether the thread is idle or the condition holds."""
        with self._changed:
            return self._wait_for(lambda: self.idle or condition(), seconds)

    @doing("joins")
    def close(self, seconds: float) -> None:
        """Finish all commits, within ``seconds`` at most, and end the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self.idle or self._error is not None, seconds)
            self._closed, self._held = True, False
            self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        done = self._changed.wait_for(lambda: condition() or self._error is not None, seconds)
        if self._error is not None:
            raise self._error
        return done

    def _run(self) -> None:
        while (copy := self._next()) is not None:
            failure = None
            try:
                with doing("saves"):
                    self._commit(copy)
            except BaseException as error:  # also sys.exit: for the owner, since this thread has no caller
                failure = error
            with self._changed:
                if failure is not None:
                    self._failed = copy.snapshot.step
                    self._waiting = {self._failed: copy, **self._waiting}
                    if self._comm.rank == 0:
                        self.failure = self._failed, failure
                self._busy = False
                self._changed.notify_all()

    def _next(self) -> Staging | None:
        """The next copy to commit, once there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not (self.idle or self._held))
            if self._comm.rank == 0:
                return None if self.idle else self._begin(next(iter(self._waiting)))
            if self._closed:
                return None
        try:
            step = int(self._comm.broadcast(None))
        except Exception as error:  # for the owner
            with self._changed:
                self._error = error
                self._changed.notify_all()
            return None
        with self._changed:  # the training thread of this rank may not have come to that step yet
            self._changed.wait_for(lambda: step in self._waiting or self._closed)
            return None if self._closed else self._begin(step)

    def _begin(self, step: int) -> Staging:
        self._busy = True
        copy = self._waiting.pop(step)
        self._changed.notify_all()
        return copy

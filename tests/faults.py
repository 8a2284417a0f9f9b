"""Storages that fail, and what is asked of a checkpoint store in spite of them."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from runner.checkpoint.checkpoint import Checkpoint
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import Damaged
from runner.errors import StorageError
from runner.storage.location import Buffer, Entry, check_name

Fault = Callable[[int, str, str, bool], None]


class MemoryLocation:
    """Objects in a dictionary, with every promise that a store of checkpoints needs of a location.

    ``log`` has two events of each verb: (verb, name, whether it has returned). ``fault`` is asked before and after each
    verb, with the number of the verb, and may raise; a put that fails half-way leaves half an object.
    """

    part_bytes = 1 << 40
    parallel_puts = 1

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.url = "memory"
        self.objects = dict(objects or {})
        self.log: list[tuple[str, str, bool]] = []
        self.fault: Fault | None = None
        self._count = 0

    def arm(self, fault: Fault | None) -> None:
        """Count verbs from here on, and let them fail."""
        self.fault, self._count = fault, 0

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        self._do("put", name, lambda: self.objects.update({name: data}))
        return len(data)

    def replace(self, name: str, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
        data = b"".join(bytes(chunk) for chunk in chunks)
        self._do("replace", name, lambda: self.objects.update({name: data}))

    def read(self, name: str, *, limit: int) -> bytes | None:
        found: bytes | None = self._do("read", name, lambda: self.objects.get(name))
        if found is not None and len(found) > limit:
            raise StorageError(f"{name} has more than {limit} bytes")
        return found

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        def fill() -> None:
            data = io.BytesIO(self.objects.get(name, b""))
            data.seek(offset)
            if any(data.readinto(buffer) < len(buffer) for buffer in buffers):
                raise StorageError(f"{name} ends at byte {data.tell()}")

        self._do("read_into", name, fill)

    def list(self, folder: str) -> list[Entry]:
        def found() -> Any:
            names = (name.rpartition("/") for name in sorted(self.objects))
            return [
                Entry(name, len(self.objects[f"{at}/{name}" if at else name])) for at, _, name in names if at == folder
            ]

        listed: list[Entry] = self._do("list", folder, found)
        return listed

    def remove(self, name: str) -> None:
        self._do("remove", name, lambda: self.objects.pop(name, None))

    def sweep(self, folder: str) -> None:
        pass

    def _do(self, verb: str, name: str, act: Callable[[], Any]) -> Any:
        if name or verb != "list":
            check_name(name)
        self._count += 1
        number = self._count
        self.log.append((verb, name, False))
        if self.fault is not None:
            self.fault(number, verb, name, False)
        result = act()
        if self.fault is not None:
            self.fault(number, verb, name, True)
        self.log.append((verb, name, True))
        return result


def state(step: int) -> dict[str, Any]:
    """The state of a step, and of no other one."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.rand(300, generator=generator)
    return {
        "model": {"weight": weight, "tied": weight, "half": torch.rand(5, 3, generator=generator).half()},
        "optimizer": {
            "state": {0: {"moment": torch.rand(20, generator=generator), "step": step}},
            "betas": (0.9, 0.99),
        },
        "progress": {"step": step},
    }


def save(store: CheckpointStore, step: int, *, attempt: int = 1) -> CommitId:
    """Commit the state of a step."""
    snapshot = Snapshot.of(step, state(step), identity={"seed": 0})
    return store.commit(snapshot, attempt=attempt, require_newest=lambda: None)


def is_right(checkpoint: Checkpoint) -> bool:
    """Whether everything in a checkpoint is the state of its step, to the bit. Raises Damaged."""
    loaded = {part: checkpoint.load(part) for part in checkpoint.parts}
    return same(loaded, state(checkpoint.step)) and checkpoint.facts == {"identity": {"seed": 0}}


def newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    """The step that a resume continues from, None if nothing can be loaded, and why newer ones cannot. An error if
    anything else than the state of that step is handed out.
    """
    reasons: list[str] = []
    for commit in store.commits():
        try:
            assert is_right(store.open(commit)), f"{commit} loads, and not what was saved"
            return commit.step, reasons
        except Damaged as error:
            reasons.append(str(error))
    return None, reasons


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, tensors to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)

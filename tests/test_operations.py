"""In which order a store changes its location, and what any failing operation leaves behind.

Digests would hide a manifest that is written before its data from tests that only kill and load; a trace does not.
"""

import contextlib
from collections.abc import Callable, Iterable
from itertools import count

import counts
import pytest
from faults import Fault, MemoryLocation, newest, save

from runner.checkpoint.manifest import parse_commit, parse_data, unseal
from runner.checkpoint.store import CheckpointStore, Retention
from runner.checkpoint.tensor_file import Damaged
from runner.errors import StorageError
from runner.storage.location import Buffer

CHANGES = ("put", "replace", "remove")


def traced(location: MemoryLocation) -> MemoryLocation:
    """A history: three attempts of four commits, one of them half done, with removals after each commit."""
    store = CheckpointStore(location)
    for attempt in (1, 2, 3):
        for step in range(1, 5):
            save(store, step + attempt, attempt=attempt)
            store.retain(Retention(2, every_steps=3), attempt=attempt)
        location.put(f"data/s000000099-a{attempt:06d}-0123456789ab.00000.safetensors", [b"half"])
    return location


def check_order(location: MemoryLocation) -> int:
    """Hold a trace against the invariants; returns how many changes it has."""
    events = [event for event in location.log if event[0] in CHANGES]
    begun: list[tuple[str, str]] = []
    returned: set[tuple[str, str]] = set()
    for verb, name, has_returned in events:
        if has_returned:
            returned.add((verb, name))
            continue
        folder, _, leaf = name.partition("/")
        owner = {"commits": parse_commit, "data": parse_data}[folder](leaf)
        assert owner is not None, f"{verb} of {name}, which is no name of a store"
        assert verb != "replace", f"{name} is replaced"
        assert (verb, name) not in begun, f"{verb} of {name} twice"
        if verb == "put" and folder == "commits":
            for part in location.written[name]:
                assert ("put", part) in returned, f"{name} names {part} before it is written"
        if verb == "remove" and folder == "data":
            gone = ("remove", owner.commit) in returned or ("put", owner.commit) not in begun
            assert gone, f"{name} is removed before {owner.commit}"
        begun.append((verb, name))
    return len(begun)


class Tracing(MemoryLocation):
    """Notes which objects each manifest names."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, list[str]] = {}

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        if name.startswith("commits/"):
            manifest = unseal(data)
            assert manifest is not None
            self.written[name] = [*manifest["files"]]
        return super().put(name, [data])


class ManifestFirst(Tracing):
    """A mutant: data is written when its manifest is there."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        self.late = getattr(self, "late", {})
        data = b"".join(bytes(chunk) for chunk in chunks)
        if name.startswith("data/") and data != b"half":
            self.late[name] = data
            return len(data)
        size = super().put(name, [data])
        for waiting in [*self.late]:
            super().put(waiting, [self.late.pop(waiting)])
        return size


class DataFirst(Tracing):
    """A mutant: removes the data of a commit before its manifest."""

    def remove(self, name: str) -> None:
        owner = parse_commit(name.removeprefix("commits/"))
        if owner is not None:
            super().remove(owner.data(0))
        super().remove(name)


class Overwriting(Tracing):
    """A mutant: writes what is there once more."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        super().put(name, [data])
        return super().put(name, [data])


class Replacing(Tracing):
    """A mutant: writes over whatever has the name."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        self.replace(name, [data])
        return len(data)


class Wide(Tracing):
    """A mutant: removes more than it is told to."""

    def remove(self, name: str) -> None:
        super().remove(name)
        super().remove(name.partition("/")[0])


def test_changes_come_in_the_order_of_the_protocol() -> None:
    location = traced(Tracing())
    assert check_order(location) > 40
    assert location.written.keys() >= {f"commits/{commit}.json" for commit in CheckpointStore(location).commits()}
    assert newest(CheckpointStore(location)) == (7, [])


@pytest.mark.parametrize("mutant", [ManifestFirst, DataFirst, Overwriting, Replacing, Wide])
def test_every_other_order_is_noticed(mutant: type[Tracing]) -> None:
    location = traced(mutant())
    with pytest.raises((AssertionError, KeyError)):
        check_order(location)


def fails(at: int, moment: str) -> Fault:
    """The at-th verb fails: before it is applied, after it, or in the middle of a put."""

    def fault(number: int, verb: str, name: str, applied: bool) -> None:
        if number == at and applied == (moment != "before"):
            raise StorageError(f"{verb} {name}: injected")

    return fault


class Tearing(MemoryLocation):
    """Whose failing puts leave half of the object."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        try:
            return super().put(name, [data])
        except StorageError:
            self.objects[name] = data[: len(data) // 2]
            raise


def until_success(
    objects: dict[str, bytes], moment: str, work: Callable[[CheckpointStore], object], *, spares: bool = True
) -> int:
    """Fail the 1st, 2nd, ... operation of some work until it has no more of them; returns how many failed.

    After each failure an acknowledged state is there, and the work can be done again; with ``spares`` there are two.
    """
    acknowledged = newest(CheckpointStore(MemoryLocation(objects)))[0]
    assert acknowledged is not None
    for n in count(1):
        location = (Tearing if moment == "half" else MemoryLocation)(objects)
        store = CheckpointStore(location)
        location.arm(fails(n, moment))
        try:
            work(store)
        except StorageError:
            location.arm(None)
            step, _ = newest(CheckpointStore(location))
            assert step is not None
            assert step >= acknowledged, f"operation {n}"
            work(store)
        else:
            if len(location.log) // 2 < n:
                counts.count("faults", n - 1)
                return n - 1
        location.arm(None)
        assert newest(CheckpointStore(location))[0] == 3
        assert not spares or spare(location) is not None, f"operation {n}: a half-made commit is kept for a good one"
    raise AssertionError


def spare(location: MemoryLocation) -> int | None:
    """What could be loaded if the newest good commit were lost."""
    store = CheckpointStore(location)
    for commit in store.commits():
        with contextlib.suppress(Damaged):
            store.open(commit)
            return newest(CheckpointStore(MemoryLocation({**location.objects, commit.commit: b""})))[0]
    return None


def stored(*steps: int) -> dict[str, bytes]:
    location = MemoryLocation()
    for step in steps:
        save(CheckpointStore(location), step)
    return location.objects


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_failing_operation_of_a_commit_loses_nothing(moment: str) -> None:
    def work(store: CheckpointStore) -> None:
        save(store, 3)

    assert until_success(stored(1, 2), moment, work) >= 2


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_failing_operation_of_a_removal_loses_nothing(moment: str) -> None:
    def work(store: CheckpointStore) -> None:
        store.retain(Retention(2), attempt=1)

    assert until_success(stored(1, 2, 3), moment, work, spares=False) >= 6


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_failing_save_with_removal_loses_nothing(moment: str) -> None:
    def work(store: CheckpointStore) -> None:
        save(store, 3)
        store.retain(Retention(2), attempt=1)

    assert until_success(stored(1, 2), moment, work) >= 6


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_storage_that_cannot_be_read_is_not_taken_for_damage(moment: str) -> None:
    """Else a resume would pass over a good commit, or begin from scratch."""
    objects = stored(1, 2)
    for n in count(1):
        location = MemoryLocation(objects)
        location.arm(fails(n, moment))
        try:
            assert newest(CheckpointStore(location)) == (2, [])
        except StorageError:
            continue
        break
    assert n >= 5
    assert len(location.log) // 2 < n

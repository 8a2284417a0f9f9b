"""Every stored object damaged in every way: detected, passed over for an older commit, never loaded."""

import random
from collections.abc import Callable, Iterator

import pytest
from counts import count
from faults import MemoryLocation, newest, save

from runner.checkpoint.store import CheckpointStore

PAGE = 512
Objects = dict[str, bytes]
Damage = Callable[[Objects, str], Iterator[Objects]]


def whole(commits: int) -> Objects:
    """The objects of a store with so many commits, of steps 1, 2, ..."""
    location = MemoryLocation()
    for step in range(1, commits + 1):
        save(CheckpointStore(location), step)
    return location.objects


def step_of(name: str) -> int:
    return int(name[name.index("s0") + 1 :][:9])


def kind_of(objects: Objects, name: str) -> list[str]:
    """The other objects of the same kind."""
    return [other for other in objects if other.split("/")[0] == name.split("/")[0] and other != name]


def flipped(objects: Objects, name: str) -> Iterator[Objects]:
    """One bit of every third byte, and every bit around both ends, which hold headers and seals."""
    chance, raw = random.Random(name[-12:]), objects[name]
    bits = [8 * place + chance.randrange(8) for place in range(0, len(raw), 3)]
    for bit in {*bits, *range(8 * 24), *range(8 * (len(raw) - 8), 8 * len(raw))}:
        bad = bytearray(raw)
        bad[bit // 8] ^= 1 << bit % 8
        yield objects | {name: bytes(bad)}


def zeroed(objects: Objects, name: str) -> Iterator[Objects]:
    for start in range(0, len(objects[name]), PAGE):
        bad = bytearray(objects[name])
        bad[start : start + PAGE] = bytes(len(bad[start : start + PAGE]))
        yield objects | {name: bytes(bad)}


def truncated(objects: Objects, name: str) -> Iterator[Objects]:
    for end in {len(objects[name]) - 1, *range(1, len(objects[name]), 97)}:
        yield objects | {name: objects[name][:end]}


def extended(objects: Objects, name: str) -> Iterator[Objects]:
    for more in (b"\0", b"\n", b" ", bytes(PAGE), objects[name]):
        yield objects | {name: objects[name] + more}


def swapped(objects: Objects, name: str) -> Iterator[Objects]:
    for other in kind_of(objects, name):
        yield objects | {name: objects[other], other: objects[name]}


def copied(objects: Objects, name: str) -> Iterator[Objects]:
    """The bytes of another commit, older or newer, where these should be."""
    for other in kind_of(objects, name):
        yield objects | {name: objects[other]}


def emptied(objects: Objects, name: str) -> Iterator[Objects]:
    yield objects | {name: b""}


def deleted(objects: Objects, name: str) -> Iterator[Objects]:
    yield {other: raw for other, raw in objects.items() if other != name}


DAMAGES: list[Damage] = [flipped, zeroed, truncated, extended, swapped, copied, emptied, deleted]
LEAST = {flipped: 3800, zeroed: 18, truncated: 80, extended: 30, swapped: 12, copied: 12, emptied: 6, deleted: 6}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_detected_and_the_newest_good_commit_used(damage: Damage) -> None:
    objects, cases = whole(3), 0
    assert len(objects) == 6, "three manifests and three data files"
    for name in objects:
        for bad in damage(objects, name):
            changed = {other for other in objects if bad.get(other) != objects[other]}
            good = {1, 2, 3} - {step_of(other) for other in changed}
            step, reasons = newest(CheckpointStore(MemoryLocation(bad)))
            assert changed, "nothing was damaged"
            assert step == max(good), (name, reasons)
            unlisted = {step_of(other) for other in objects.keys() - bad.keys() if other.startswith("commits/")}
            assert len(reasons) == 3 - step - sum(gone > step for gone in unlisted)
            cases += 1
    assert cases >= LEAST[damage]
    count("corruptions", cases)


@pytest.mark.parametrize("commits", [2, 3])
def test_the_loss_of_any_object_leaves_a_loadable_commit(commits: int) -> None:
    objects = whole(commits)
    for name in objects:
        step, _ = newest(CheckpointStore(MemoryLocation({n: raw for n, raw in objects.items() if n != name})))
        assert step == (commits - 1 if step_of(name) == commits else commits)


def test_every_byte_of_a_data_file_is_covered_by_a_digest() -> None:
    """The header is, too, although loading does not use it: other programs do."""
    objects = whole(1)
    (data,) = (name for name in objects if name.startswith("data/"))
    for place in range(len(objects[data])):
        bad = bytearray(objects[data])
        bad[place] ^= 0x10
        step, (reason,) = newest(CheckpointStore(MemoryLocation(objects | {data: bytes(bad)})))
        assert step is None, f"byte {place}"
        assert data in reason
        assert "digest" in reason


def test_several_damages_at_once_leave_the_undamaged() -> None:
    objects, chance = whole(3), random.Random(0)
    outcomes: list[int | None] = []
    for _ in range(300):
        bad = objects
        for name in chance.sample(sorted(objects), chance.randint(2, 5)):
            bad = chance.choice([*chance.choice([zeroed, truncated, extended, emptied, deleted])(bad, name)])
        good = {1, 2, 3} - {step_of(name) for name in objects if bad.get(name) != objects[name]}
        step, _ = newest(CheckpointStore(MemoryLocation(bad)))
        assert step == max(good, default=None)
        outcomes.append(step)
    assert {*outcomes} == {None, 1, 2, 3}

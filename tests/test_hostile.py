"""Run directories of a stranger: whatever their bytes, opening them ends in a clean error."""

import base64
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import MemoryLocation, save

from runner.checkpoint import tensor_file
from runner.checkpoint.manifest import MAX_DEPTH, MAX_TENSORS, MAX_VALUES, seal, seal_of, unseal
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import Damaged
from runner.data.ledger import Ledger
from runner.data.plan import Plan
from runner.errors import StateError, StorageError
from runner.storage import LocalLocation

Manifest = dict[str, Any]

RECIPE = {"samples": 100, "seed": 0, "shuffle": True, "tail": "carry", "randomness": "sample"}
LEDGER_LINE = "1 0 63 0123456789abcdef\n"


def run(folder: Path) -> Path:
    """An ordinary run directory with two commits, a record of an attempt, and a ledger."""
    location = LocalLocation(folder)
    for step in (1, 2):
        save(CheckpointStore(location), step)
    (folder / "run.json").write_text('{"format": 1, "experiment": "e", "variant": "v", "parent": null}')
    (folder / "config.yaml").write_text("seed: 0\ntrainer: {max_steps: 3}\n")
    (folder / "result.json").write_text('{"identity": "00000000", "step": 3}')
    (folder / "attempts").mkdir()
    (folder / "attempts/000001-0123456789ab.json").write_text('{"attempt": 1, "host": "h", "pid": 1}')
    (folder / "attempts/000001-0123456789ab.beat").write_text('{"step": 2, "committed": 2}')
    keep_ledger(folder, RECIPE)
    return folder


def keep_ledger(folder: Path, recipe: dict[str, Any]) -> None:
    book = Ledger(LocalLocation(folder), attempt=1, recipe=recipe, grouping=64)
    book.open(0)
    book.close()
    (segment,) = (folder / "ledger").glob("s*.txt")
    with segment.open("a") as file:
        file.write(LEDGER_LINE)


def newest(folder: Path) -> Path:
    return sorted((folder / "commits").iterdir())[-1]


def changed(change: Callable[[Manifest], Any]) -> Callable[[Path], None]:
    """A manifest that is sealed all the same."""

    def apply(folder: Path) -> None:
        manifest = unseal(newest(folder).read_bytes())
        assert manifest is not None
        change(manifest)
        sealed(json.dumps(manifest).encode())(folder)

    return apply


def weight(dtype: Any = "F32", shape: Any = (300,)) -> Callable[[Path], None]:
    """What a manifest says of one tensor, which is of 300 floats."""
    return changed(lambda manifest: manifest["shelves"][0]["tensors"].update({"model/weight": [dtype, shape]}))


def cut(*cuts: Any) -> Callable[[Path], None]:
    """In how many pieces it says that tensors are."""
    return changed(lambda manifest: manifest["shelves"][0].update(cuts=[*cuts]))


def file(**values: Any) -> Callable[[Path], None]:
    """What a manifest says of its data file."""

    def change(manifest: Manifest) -> None:
        for fields in manifest["files"].values():
            for place, name in enumerate(("size", "header", "digest", "blocks")):
                fields[place] = values.get(name, fields[place])

    return changed(change)


def named(name: str) -> Callable[[Path], None]:
    """Another name for the data file."""
    return changed(lambda m: m.update(files={name: next(iter(m["files"].values()))}))


def sealed(body: bytes) -> Callable[[Path], None]:
    """Any bytes under a right seal."""
    body += b"\n"
    return lambda folder: [newest(folder).write_bytes(body + seal_of(body) + b"\n"), None][1]


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Another content of a file."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: [(folder / name).write_bytes(raw), None][1]


def linked(pattern: str, target: str) -> Callable[[Path], None]:
    """A symbolic link in place of objects."""

    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()
            path.symlink_to(target)

    return apply


def linked_folder(name: str) -> Callable[[Path], None]:
    """A folder of this run that is in another one."""

    def apply(folder: Path) -> None:
        (folder / name).rename(folder.with_name(f"{folder.name}-{name}"))
        (folder / name).symlink_to(folder.with_name(f"{folder.name}-{name}"))

    return apply


def planned(**recipe: Any) -> dict[str, Any]:
    return RECIPE | recipe


def packed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def many(count: int) -> Callable[[Path], None]:
    """As many tensors as fit, without a byte."""
    empty = {f"{number}": ["F32", [0]] for number in range(count)}
    return changed(lambda manifest: manifest["shelves"][0]["tensors"].update(empty))


def aliases(manifest: Manifest) -> None:
    """As many names as fit, all of them of the same few bytes."""
    manifest["same"] = {f"{number}": "model/weight" for number in range(MAX_TENSORS)}


def repeated(manifest: Manifest) -> None:
    manifest["parts"]["model"] = [{"$": "tensor", "name": "model/weight"}] * 100_000


ZEROS = bytes(32 << 20)
DEEP = b"[" * 100_000 + b"]" * 100_000

HOSTILE: dict[str, Callable[[Path], None]] = {
    "deep json": sealed(b'{"format":2,"parts":' + DEEP + b"}"),
    "deeper than can be walked": sealed(b'{"format":2,"parts":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a list": sealed(b"[1]"),
    "not a number": changed(lambda m: m.update(step=float("nan"))),
    "infinite size": weight(shape=[float("inf")]),
    "infinity by exponent": sealed(b'{"format":2,"step":1e999}'),
    "long number": sealed(b'{"format":2,"step":' + b"9" * 5000 + b"}"),
    "a key twice": sealed(b'{"format":2,"format":1}'),
    "many small lists": sealed(b'{"format":2,"parts":[' + b"[]," * (MAX_VALUES + 1) + b"[]]}"),
    "many empty objects": sealed(b'{"format":2,"parts":[' + b"{}," * (20 << 20) + b"[]]}"),
    "larger than the limit": sealed(b'{"format":2,"parts":"' + bytes(65 << 20) + b'"}'),
    "no utf-8": sealed(b'{"format":2,"parts":"\xff\xfe"}'),
    "another format": changed(lambda m: m.update(format="\x1b[31m" * 100_000)),
    "huge size beside zero": weight(shape=[1 << 70, 0]),
    "zero beside huge size": weight(shape=[0, 1 << 62, 1 << 62]),
    "sizes that overflow": weight(shape=[1 << 32, 1 << 32]),
    "many dimensions": weight(shape=[1] * 100_000),
    "65 dimensions": weight(shape=[1] * 65),
    "1e13 elements": weight(shape=[10**13]),
    "1e13 rows of nothing": weight(shape=[10**13, 0]),
    "negative sizes": weight(shape=[-300]),
    "truth for a size": weight(shape=[True] * 300),
    "text for a size": weight(shape="300"),
    "wide type": weight(dtype="F64"),
    "narrow type": weight(dtype="U8"),
    "unknown type": weight(dtype="__import__('os').system('true')"),
    "type that is a list": weight(dtype=["F32"]),
    "cut without files": cut([0, 4]),
    "1e13 cells": cut([0, 10**13]),
    "2**70 cells": cut([0, 1 << 70]),
    "no cells": cut([0, 0]),
    "negative cells": cut([0, -1]),
    "cut beyond the dimensions": cut([64, 1]),
    "negative dimension": cut([-1, 1]),
    "cut twice": cut([0, 1], [0, 1]),
    "many cuts": cut(*[[0, 1]] * 10_000),
    "cut that is text": cut("01"),
    "cuts that are a number": changed(lambda m: m["shelves"][0].update(cuts=7)),
    "shelf that is a list": changed(lambda m: m.update(shelves=[[]])),
    "many shelves": changed(lambda m: m.update(shelves=m["shelves"] * 5_000)),
    "shelf without tensors": changed(lambda m: m["shelves"].append({"cuts": [], "tensors": {}})),
    "digest that is none": file(digest=None),
    "no digests": file(blocks=[]),
    "blocks that are text": file(blocks="x"),
    "block that is none": file(blocks=[None]),
    "many blocks": file(blocks=[""] * 1_000_000),
    "large file": file(size=1 << 50),
    "size of 2**70": file(size=1 << 70),
    "size that is truth": file(size=True),
    "header of 2**70": file(header=1 << 70),
    "negative header": file(header=-8),
    "no header": file(header=0),
    "parent path": named("data/../../secret"),
    "file outside": named("../secret"),
    "absolute file": named("/etc/passwd"),
    "control characters": named("data/\x1b[2J"),
    "more of a file": changed(lambda m: [fields.append("x") for fields in m["files"].values()]),
    "less of a file": changed(lambda m: [fields.pop() for fields in m["files"].values()]),
    "a file twice": changed(lambda m: m["files"].update(again=next(iter(m["files"].values())))),
    "files in a list": changed(lambda m: m.update(files=[])),
    "aliases of nothing": changed(lambda m: m.update(same={"model/tied": "model/gone"})),
    "aliases of themselves": changed(lambda m: m.update(same={"model/tied": "model/tied"})),
    "alias that is a list": changed(lambda m: m.update(same={"model/tied": ["model/weight"]})),
    "many aliases": changed(aliases),
    "no ranks": changed(lambda m: m.update(ranks=0)),
    "2**70 ranks": changed(lambda m: (m.update(ranks=1 << 70), m["parts"].update(model={"$": "ranks", "items": []}))),
    "ranks without states": changed(lambda m: m["parts"].update(model={"$": "ranks", "items": []})),
    "ranks without a list": changed(lambda m: m["parts"].update(model={"$": "ranks"})),
    "ranks in ranks": changed(lambda m: m["parts"].update(model={"$": "ranks", "items": [{"$": "ranks"}]})),
    "many tensors": many(MAX_TENSORS + 1),
    "one tensor many times": changed(repeated),
    "unknown tag": changed(lambda m: m["parts"].update(model={"$": "object", "class": "os.system"})),
    "tag that is a list": changed(lambda m: m["parts"].update(model={"$": ["tensor"]})),
    "tag without a value": changed(lambda m: m["parts"].update(model={"$": "tensor"})),
    "tensor of no name": changed(lambda m: m["parts"].update(model={"$": "tensor", "name": []})),
    "float of a list": changed(lambda m: m["parts"].update(model={"$": "float", "value": []})),
    "float of a huge number": changed(lambda m: m["parts"].update(model={"$": "float", "value": 10**400})),
    "dict that is flat": changed(lambda m: m["parts"].update(model={"$": "dict", "items": [1]})),
    "dict with a key that is none": changed(lambda m: m["parts"].update(model={"$": "dict", "items": [[[], 1]]})),
    "tuple of nothing": changed(lambda m: m["parts"].update(model={"$": "tuple", "items": None})),
    "tensor among facts": changed(lambda m: m.update(facts={"a": {"$": "tensor", "name": "model/weight"}})),
    "facts that are a list": changed(lambda m: m.update(facts=[[1, 2, 3]])),
    "parts that are a number": changed(lambda m: m.update(parts=7)),
    "linked data": linked("data/*", "/etc/passwd"),
    "linked commits": linked("commits/*", "/etc/passwd"),
    "linked device": linked("data/*", "/dev/zero"),
    "linked folder": linked_folder("commits"),
    "deep attempt": text("attempts/000001-0123456789ab.json", DEEP),
    "attempt that is a list": text("attempts/000001-0123456789ab.json", "[]"),
    "attempt of other types": text("attempts/000001-0123456789ab.json", '{"pid": [1], "host": {"a": 1}, "started": 7}'),
    "attempt of escapes": text("attempts/000001-0123456789ab.json", json.dumps({"pid": "\x1b[2J", "host": "\x07"})),
    "process number 2**70": text(
        "attempts/000001-0123456789ab.json", json.dumps({"pid": 1 << 70, "host": os.uname().nodename})
    ),
    "attempt of high number": text("attempts/999999999999999999999-0123456789ab.json", "{}"),
    "beat of other types": text("attempts/000001-0123456789ab.beat", '{"step": {}, "time": []}'),
    "end of other types": text("attempts/000001-0123456789ab.end.json", '{"outcome": ["\\u001b"], "time": {}}'),
    "large attempt": text("attempts/000001-0123456789ab.json", b" " * (2 << 20)),
    "aliases": text("config.yaml", "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    "yaml object": text("config.yaml", "!!python/object/apply:os.system [touch ../secret]\n"),
    "yaml tag": text("config.yaml", "a: !<tag:yaml.org,2002:python/name:os.system> ''\n"),
    "deep yaml": text("config.yaml", "[" * 1500),
    "yaml date and set": text("config.yaml", "a: 2001-13-45\nb: !!set {c}\n"),
    "yaml key that is a list": text("config.yaml", "? [a]\n: 1\n"),
    "yaml number as key": text("config.yaml", "1: 2\n2: {3: 4}\n"),
    "yaml list": text("config.yaml", "- 1\n"),
    "result that is a list": text("result.json", "[]"),
    "deep result": text("result.json", DEEP),
    "result of other types": text("result.json", '{"identity": [], "step": "x", "objective": 3}'),
    "record of other types": text("run.json", '{"format": 1, "experiment": [], "parent": "x"}'),
    "record of a later format": text("run.json", json.dumps({"format": "\x1b[31m"})),
    "unending record": text("run.json", b'{"format":' + b" " * (2 << 20)),
}

PLANS: dict[str, dict[str, Any]] = {
    "compressed zeros": planned(lengths=packed(ZEROS), max_tokens=10),
    "a bomb": planned(lengths=base64.b64encode(zlib.compress(bytes(1 << 30), 1)).decode(), max_tokens=10),
    "not compressed": planned(shards="AAAA", streams={"count": 1, "window": 1, "chunk": 1}),
    "not base64": planned(shards="\x1b"),
    "half a number": planned(shards=packed(b"abc")),
    "cut": planned(shards=packed(bytes(80))[:8]),
    "a list": planned(shards=[1, 2]),
    "no streams": planned(shards=packed(b"\x64" + bytes(7)), streams={"count": 0, "window": 0, "chunk": 0}),
    "streams of another kind": planned(shards=packed(b"\x64" + bytes(7)), streams={"exec": 1}),
    "no samples": planned(samples=0),
    "2**70 samples": planned(samples=1 << 70),
    "1e13 samples": planned(samples=10**13),
    "negative samples": planned(samples=-5),
    "text for samples": planned(samples="5"),
    "text for a seed": planned(seed={"a": 1}),
    "large shares": planned(sources=[{"samples": 100, "share": 1 << 40}]),
    "sources that are numbers": planned(sources=[1]),
    "large batches": planned(batch_size=1 << 70, tail="drop"),
    "unknown value": planned(exec="x"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """How each way of looking at each directory ended, all of them looked at by one guarded process."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "secret").write_text("secret")
    run(root / "ordinary")
    for number, apply in enumerate(HOSTILE.values()):
        apply(Path(shutil.copytree(root / "ordinary", root / f"h{number}")))
    for number, recipe in enumerate(PLANS.values()):
        shutil.rmtree(shutil.copytree(root / "ordinary", root / f"p{number}") / "ledger")
        keep_ledger(root / f"p{number}", recipe)
    paths = [str(root / "ordinary")]
    paths += [str(root / f"h{number}") for number in range(len(HOSTILE))]
    paths += [str(root / f"p{number}") for number in range(len(PLANS))]
    guard = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("guard.py"))],
        input=json.dumps([*paths, paths[0]]),
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
    )
    assert guard.returncode == 0, guard.stderr
    assert (root / "secret").read_text() == "secret"
    outcomes = json.loads(guard.stdout)
    names = ["ordinary", *HOSTILE, *(f"plan: {name}" for name in PLANS)]
    return {name: outcomes[path] for name, path in zip(names, paths, strict=True)}


FACTS: list[dict[str, Any]] = [
    {"metrics": 1},
    {"metrics": {"segment": "s000000000-a000001.jsonl"}},
    {"metrics": {"segment": 1, "lines": 1}},
    {"metrics": {"segment": "s000000000-a000001.jsonl", "lines": "1"}},
    {"identity": [1]},
    {"structure": "groups"},
    {"elapsed": "long"},
    {"elapsed": 10**299},
    {"elapsed": {"$": "float", "value": "nan"}},
]


@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_facts_that_cannot_be_true_are_damage(facts: dict[str, Any], tmp_path: Path) -> None:
    store = CheckpointStore(LocalLocation(run(tmp_path / "run")))
    store.open(store.commits()[0])
    changed(lambda manifest: manifest.update(facts=facts))(tmp_path / "run")
    with pytest.raises(Damaged):
        store.open(store.commits()[0])


@pytest.mark.parametrize("name", [*HOSTILE, *(f"plan: {name}" for name in PLANS)])
def test_a_hostile_directory_ends_in_a_clean_error(name: str, ends: dict[str, dict[str, str]]) -> None:
    assert {look: end for look, end in ends[name].items() if not end.startswith("clean")} == {}


def test_an_ordinary_directory_is_looked_at_to_the_end(ends: dict[str, dict[str, str]]) -> None:
    """Else the guard, not the runner, would make everything an error."""
    assert {end.partition(" ")[0] for end in ends["ordinary"].values()} == {"clean:"}
    assert ends["ordinary"]["checkpoints"] == "clean: 0 damaged"
    assert not [look for look, end in ends["ordinary"].items() if end.endswith("Error")]


MANIFESTS = [*HOSTILE][: [*HOSTILE].index("linked data")]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_damage(name: str, ends: dict[str, dict[str, str]]) -> None:
    """So that an older commit is used; except where the storage refuses to read so much, or the format is another."""
    expected = {"larger than the limit": "StorageError", "another format": "StorageError"}
    assert ends[name]["checkpoints"] == f"clean: {expected.get(name, '1 damaged')}"


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    1.5,
    float("inf"),
    "",
    "..",
    "/",
    "\x1b",
    "data/x",
    [],
    {},
]
VALUES += [[[]], {"$": "tensor"}, {"$": "tuple"}, {"$": 1}, [1 << 70, 0], [0, -1], "F64", "xxh3:", 10**400, "a" * 10**4]


def mutate(value: Any, chance: random.Random) -> Any:
    """The value with one thing anywhere in it changed, taken away, doubled or moved."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        keys: list[Any] = [*value] if isinstance(value, dict) else [*range(len(value))]
        key, other = chance.choice(keys), chance.choice(keys)
        other_value = value.copy()
        kind = chance.random()
        if kind < 0.7:
            other_value[key] = mutate(value[key], chance)
        elif kind < 0.8:
            other_value.pop(key)
        elif kind < 0.9:
            other_value[key] = value[other]
        elif isinstance(other_value, dict):
            other_value[chance.choice(["$", "", "..", "data/x", "model/weight"])] = other_value.pop(key)
        else:
            other_value += other_value
        return other_value
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 7, 512, -512])
    return chance.choice(VALUES)


@pytest.fixture
def modest(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is allocated that is larger than the file that it is in."""
    empty = torch.empty

    def measured(shape: Any, *, dtype: torch.dtype) -> torch.Tensor:
        tensor = empty(shape, dtype=dtype)
        assert tensor.numel() * tensor.itemsize < 4096
        return tensor

    monkeypatch.setattr(tensor_file.torch, "empty", measured)


def loads(body: bytes, objects: dict[str, bytes]) -> bool:
    """Whether a store loads everything of a commit with that manifest; else it is Damaged, or refused."""
    (name,) = (name for name in objects if name.startswith("commits/"))
    store = CheckpointStore(MemoryLocation(objects | {name: body + seal_of(body) + b"\n"}))
    (commit,) = store.commits()
    try:
        checkpoint = store.open(commit)
        for part in checkpoint.parts:
            checkpoint.load(part)
        checkpoint.verify()
    except (Damaged, StorageError):
        return False
    return True


@pytest.mark.usefixtures("modest")
@pytest.mark.parametrize("seed", range(4))
def test_a_fuzzed_manifest_loads_or_is_damaged(seed: int) -> None:
    location = MemoryLocation()
    save(CheckpointStore(location), 1)
    chance = random.Random(seed)
    (name,) = (name for name in location.objects if name.startswith("commits/"))
    body = location.objects[name].rpartition(b"\nsha256:")[0] + b"\n"
    manifest, outcomes = json.loads(body), {True: 0, False: 0}
    for number in range(1500):
        if number % 3:
            other = manifest
            for _ in range(chance.choice([1, 1, 1, 2, 5])):
                other = mutate(other, chance)
            bad = json.dumps(other).encode() + b"\n"
        else:
            raw = bytearray(body)
            for _ in range(chance.randint(1, 3)):
                at = chance.randrange(len(raw))
                raw[at : at + chance.choice([0, 1, 1, 1, 8])] = chance.choice(
                    [b"", b"9", b'"', b"]", b"\0", b"e9", b"-"]
                )
            bad = bytes(raw) + b"\n"
        outcomes[loads(bad, location.objects)] += 1
    assert outcomes[False] > 700, "the mutations do not bite"
    assert outcomes[True] > 20, "nothing but noise"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_an_unreadable_manifest_is_not_sealed() -> None:
    """Else it would be acknowledged, and no resume could use it."""
    for depth in (MAX_DEPTH - 2, 100):
        assert unseal(seal({"a": nested(depth)})) == {"a": nested(depth)}
    for bad in (nested(MAX_DEPTH), nested(5000), [0] * (MAX_VALUES + 1), "x" * (64 << 20)):
        with pytest.raises(StateError, match="cannot save"):
            seal({"a": bad})


def test_more_tensors_than_can_be_read_again_are_not_saved() -> None:
    location = MemoryLocation()
    many = Snapshot(1, {}, dict.fromkeys(map(str, range(MAX_TENSORS + 1)), torch.zeros(1)))
    with pytest.raises(StateError, match="a checkpoint has at most"):
        CheckpointStore(location).commit(many, attempt=1, require_newest=lambda: None)
    assert location.objects == {}


@pytest.mark.parametrize("name", ["a bomb", "not compressed", "not base64", "half a number", "cut"])
def test_numbers_of_a_plan_are_unpacked_within_bounds(name: str) -> None:
    with pytest.raises(ValueError, match=r"more than|not compressed|base64|padd|multiple|size|ASCII"):
        Plan.of(PLANS[name])

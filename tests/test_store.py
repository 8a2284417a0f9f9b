"""Committed checkpoints: what was acknowledged is there, and nothing else is handed out."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import MemoryLocation
from torch import nn

from runner.checkpoint import store as store_module
from runner.checkpoint.manifest import CommitId, parse_data, seal, unseal
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.store import CheckpointStore, Retention, Torn
from runner.checkpoint.tensor_file import Damaged
from runner.errors import StorageError, Superseded
from runner.storage import LocalLocation
from runner.storage.location import Buffer, Entry

STATE = {"weight": torch.arange(4.0), "bias": torch.tensor(1.5), "moments": {0: (0.1, float("inf"))}}


class Recording(LocalLocation):
    """Notes what changes it, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.log: list[tuple[str, str]] = []

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        self.log.append(("put", name))
        return super().put(name, chunks)

    def remove(self, name: str) -> None:
        self.log.append(("remove", name))
        super().remove(name)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Recording(tmp_path))


def commit(store: CheckpointStore, step: int, *, attempt: int = 1) -> CommitId:
    snapshot = Snapshot.of(step, {"model": STATE, "progress": {"step": step}}, identity={"seed": 0})
    return store.commit(snapshot, attempt=attempt, require_newest=lambda: None)


def commits(store: CheckpointStore) -> list[tuple[int, int]]:
    return [(found.attempt, found.step) for found in store.commits()]


def data(store: CheckpointStore) -> list[str]:
    return [entry.name for entry in store.location.list("data")]


def path(store: CheckpointStore, name: str) -> Path:
    return Path(store.location.url, name)


def rewrite(store: CheckpointStore, commit: CommitId, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and seal it again: what a seal cannot find."""
    file = path(store, commit.commit)
    manifest = unseal(file.read_bytes())
    assert manifest is not None
    change(manifest)
    file.write_bytes(seal(manifest))


def test_a_committed_state_is_loaded(store: CheckpointStore) -> None:
    made = commit(store, 5, attempt=3)
    checkpoint = store.open(made)
    state = checkpoint.load("model")
    assert (checkpoint.step, checkpoint.id, checkpoint.facts) == (5, made, {"identity": {"seed": 0}})
    assert checkpoint.load("progress") == {"step": 5}
    assert state["moments"] == STATE["moments"]
    assert torch.equal(state["weight"], STATE["weight"])
    assert torch.equal(state["bias"], STATE["bias"])
    assert torch.equal(checkpoint.tensors_of("model")["model/weight"], STATE["weight"])


def test_a_manifest_is_written_after_its_data(store: CheckpointStore) -> None:
    made = commit(store, 5)
    assert store.location.log == [("put", made.data(0)), ("put", made.commit)]


def test_a_commit_whose_data_cannot_be_written_is_none(store: CheckpointStore) -> None:
    path(store, "data").write_text("in the way")
    with pytest.raises(StorageError):
        commit(store, 5)
    assert commits(store) == []


def test_the_newest_attempt_comes_first_then_the_highest_step(store: CheckpointStore) -> None:
    for attempt, step in [(1, 10), (1, 30), (2, 20), (1, 20), (2, 5)]:
        commit(store, step, attempt=attempt)
    assert commits(store) == [(2, 20), (2, 5), (1, 30), (1, 20), (1, 10)]


def test_a_superseded_commit_is_not_acknowledged(store: CheckpointStore) -> None:
    """It asks after the manifest is there: a successor either saw the commit, or is seen."""
    seen = []

    def require_newest() -> None:
        seen.extend(store.commits())
        raise Superseded("attempt 2 took over")

    with pytest.raises(Superseded):
        store.commit(Snapshot.of(5, {}), attempt=1, require_newest=require_newest)
    assert [made.step for made in seen] == [5]


def test_the_last_commits_are_kept_with_their_data(store: CheckpointStore) -> None:
    made = [commit(store, step) for step in range(1, 6)]
    store.retain(Retention(2), attempt=1)
    assert commits(store) == [(1, 5), (1, 4)]
    assert data(store) == [made[3].data(0)[5:], made[4].data(0)[5:]]
    assert store.open(made[3]).load("progress") == {"step": 4}


def test_commits_that_were_not_read_do_not_count(tmp_path: Path) -> None:
    """A resume has read one of three; the two that are counted are that one and the next to be made."""
    before, store = CheckpointStore(Recording(tmp_path)), CheckpointStore(Recording(tmp_path))
    made = [commit(before, step) for step in range(1, 4)]
    store.retain(Retention(2), attempt=2)
    assert len(commits(store)) == 3
    store.verified.add(made[1])
    commit(store, 4, attempt=2)
    store.retain(Retention(2), attempt=2)
    assert commits(store) == [(2, 4), (1, 3), (1, 2)]


def test_the_best_is_kept_by_the_value_in_its_commit(tmp_path: Path) -> None:
    for step, value in enumerate((0.5, 0.9, float("nan"), None, 0.2), 1):
        facts = {} if value is None else {"objective": value}
        CheckpointStore(Recording(tmp_path)).commit(
            Snapshot.of(step, {}, **facts), attempt=1, require_newest=lambda: None
        )
    store = CheckpointStore(Recording(tmp_path))
    assert [known.objective for known in store.survey()][:2] == [0.2, None]
    commit(store, 6)
    commit(store, 7)
    store.retain(Retention(2, best=2, mode="max"), attempt=1)
    assert commits(store) == [(1, 7), (1, 6), (1, 2), (1, 1)]


def test_the_manifest_of_a_commit_is_read_once(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 5):
        commit(store, step)
    store.survey()
    monkeypatch.setattr(store, "open", lambda _: pytest.fail("it was read again"))
    store.survey()


def test_a_commit_that_does_not_unseal_is_known_as_damaged(store: CheckpointStore) -> None:
    made = [commit(store, step) for step in range(1, 4)]
    path(store, made[2].commit).write_bytes(b"{}")
    CheckpointStore(store.location).retain(Retention(2), attempt=1)
    assert len(commits(store)) == 3
    fresh = CheckpointStore(store.location)
    fresh.verified |= {*made}
    fresh.retain(Retention(2), attempt=1)
    assert commits(store) == [(1, 3), (1, 2), (1, 1)]
    assert fresh.damaged == {made[2]}


def test_a_manifest_is_removed_before_its_data(store: CheckpointStore) -> None:
    made = [commit(store, step) for step in range(1, 6)]
    store.location.log.clear()
    store.retain(Retention(2), attempt=1)
    removed = store.location.log
    for gone in made[:3]:
        assert removed.index(("remove", gone.commit)) < removed.index(("remove", gone.data(0)))
    assert len(removed) == 6


def test_half_made_commits_of_older_attempts_are_removed(store: CheckpointStore) -> None:
    """But none of this attempt or of a newer one, which may be at work on them."""
    kept = commit(store, 5, attempt=2)
    orphans = [CommitId.new(attempt, 6) for attempt in (1, 2, 3)]
    for orphan in orphans:
        store.location.put(orphan.data(0), [b"half"])
    store.location.put("data/notes.txt", [b"a person's"])
    store.retain(Retention(2), attempt=2)
    assert data(store) == sorted([kept.data(0)[5:], orphans[1].data(0)[5:], orphans[2].data(0)[5:], "notes.txt"])


def test_whatever_is_retained_can_be_resumed_from(store: CheckpointStore) -> None:
    """Thirty random histories: the newest good commits survive, nothing kept lost its data, nothing else is left."""
    chance = random.Random(0)
    for attempt in range(1, 31):
        made = [commit(store, step, attempt=attempt) for step in range(chance.randint(1, 3))]
        store.damaged |= {*chance.sample(made, chance.randint(0, 1))}
        good = [found for found in store.commits() if found not in store.damaged]
        store.retain(Retention(2, every_steps=2), attempt=attempt)
        left = store.commits()
        assert {*good[:2]} <= {*left}
        assert {found.step for found in good} & {0, 2} <= {found.step for found in left}
        assert data(store) == sorted(found.data(0)[5:] for found in left)


def test_a_missing_data_file_is_damage(store: CheckpointStore) -> None:
    made = commit(store, 5)
    store.location.remove(made.data(0))
    with pytest.raises(Damaged, match="has no bytes, expected"):
        store.open(made)


@pytest.mark.parametrize("change", [-1, +1])
def test_a_data_file_of_another_length_is_damage(store: CheckpointStore, change: int) -> None:
    made = commit(store, 5)
    file = path(store, made.data(0))
    raw = file.read_bytes() + b"\0"
    file.write_bytes(raw[: len(raw) - 1 + change])
    with pytest.raises(Damaged, match=rf"has {len(raw) - 1 + change} bytes, expected {len(raw) - 1}"):
        store.open(made)


def test_other_bytes_are_damage_and_are_not_handed_out(store: CheckpointStore) -> None:
    made = commit(store, 5)
    file = path(store, made.data(0))
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    checkpoint = store.open(made)
    assert checkpoint.load("progress") == {"step": 5}
    with pytest.raises(Damaged, match="digest"):
        checkpoint.load("model")


def test_a_torn_or_missing_manifest_is_damage(store: CheckpointStore) -> None:
    made = commit(store, 5)
    file = path(store, made.commit)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Torn, match=r"a000001-s000000005-.* does not unseal"):
        store.open(made)
    file.unlink()
    with pytest.raises(Damaged, match="is gone"):
        store.open(made)


def test_a_manifest_under_the_name_of_another_commit_is_damage(store: CheckpointStore) -> None:
    one, other = commit(store, 5), commit(store, 6)
    path(store, other.commit).write_bytes(path(store, one.commit).read_bytes())
    with pytest.raises(Damaged, match="is the manifest of another commit"):
        store.open(other)


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused_and_not_taken_for_damage(store: CheckpointStore, version: int) -> None:
    made = commit(store, 5)
    rewrite(store, made, lambda manifest: manifest.update(format=version))
    with pytest.raises(StorageError, match=rf"has format {version}, this version reads 2\. Use the version"):
        store.open(made)


def weight(manifest: dict[str, Any], *values: Any) -> None:
    manifest["shelves"][0]["tensors"]["model/weight"] = [*values]


def file(manifest: dict[str, Any], place: int, value: Any) -> None:
    for fields in manifest["files"].values():
        fields[place] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda m: weight(m, "F32", [1 << 50]),
        lambda m: weight(m, "F32", [5]),
        lambda m: weight(m, "F64", [4]),
        lambda m: weight(m, "F32", [-4]),
        lambda m: weight(m, "F32", [4.0]),
        lambda m: weight(m, "F32", [True] * 4),
        lambda m: weight(m, "F32", "4"),
        lambda m: weight(m, "F32", None),
        lambda m: weight(m, "F31", [4]),
        lambda m: weight(m, ["F32"], [4]),
        lambda m: weight(m, "F32", [4], "data/other"),
        lambda m: weight(m),
        lambda m: file(m, 0, 1 << 50),
        lambda m: file(m, 1, 0),
        lambda m: file(m, 1, -8),
        lambda m: file(m, 2, None),
        lambda m: file(m, 3, []),
        lambda m: file(m, 3, ["xxh3:00"] * 2),
        lambda m: file(m, 3, "x"),
        lambda m: file(m, 3, {"x": 1}),
        lambda m: m["shelves"][0]["tensors"].update({"model/weight": None}),
        lambda m: m.update(files=[]),
        lambda m: m.update(files={"../run.json": next(iter(m["files"].values()))}),
        lambda m: m.update(files={"../run.json": 3}),
        lambda m: m.update(shelves=[]),
        lambda m: m.update(same=[]),
        lambda m: m.update(parts=3),
        lambda m: m.update(facts=None),
        lambda m: m.update(step="5"),
        lambda m: m.pop("files"),
        lambda m: m.pop("parts"),
        lambda m: m.pop("shelves"),
        lambda m: m.pop("ranks"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_damage(store: CheckpointStore, change: Callable[[Any], object]) -> None:
    """Sealed all the same, by a bug or by a stranger; nothing is allocated or read on its word."""
    made = commit(store, 5)
    rewrite(store, made, change)
    with pytest.raises(Damaged):
        store.open(made)


def test_a_part_that_names_an_unknown_tensor_is_damage(store: CheckpointStore) -> None:
    made = commit(store, 5)
    rewrite(
        store, made, lambda manifest: manifest["parts"]["model"].update(weight={"$": "tensor", "name": "model/gone"})
    )
    with pytest.raises(Damaged, match="has no tensor 'model/gone'"):
        store.open(made).load("model")


def test_a_shared_tensor_is_written_once_for_all_names(store: CheckpointStore) -> None:
    weight, empty = torch.rand(1000), torch.empty(0)
    state = {"head": weight, "tokens": weight.view(1000), "other": weight.clone(), "a": empty, "b": torch.empty(0, 7)}
    checkpoint = store.open(store.commit(Snapshot.of(1, {"model": state}), attempt=1, require_newest=lambda: None))
    assert sum(file.data for file in checkpoint.files.values()) == 2 * 4000
    found = checkpoint.load("model")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["head"].data_ptr() == found["tokens"].data_ptr() != found["other"].data_ptr()
    assert (found["a"].shape, found["b"].shape) == ((0,), (0, 7))


def test_differing_views_of_one_memory_are_not_shared(store: CheckpointStore) -> None:
    base, z = torch.arange(16.0).view(4, 4), torch.tensor([1 + 2j])
    views = {"base": base, "flat": base.view(16), "part": base[0], "turned": base.t(), "bits": base.view(torch.int32)}
    views |= {"z": z, "conjugate": z.conj(), "negative": torch._neg_view(base)}
    checkpoint = store.open(store.commit(Snapshot.of(1, {"model": views}), attempt=1, require_newest=lambda: None))
    found = checkpoint.load("model")
    assert [name for name, view in views.items() if not torch.equal(found[name], view)] == []


def test_tensors_lie_in_memory_as_they_did(store: CheckpointStore) -> None:
    usual = torch.arange(48.0).view(2, 4, 3, 2)
    last = usual.to(memory_format=torch.channels_last)
    state = {"usual": usual, "last": last, "tied": last, "turned": usual.permute(3, 1, 0, 2), "thinned": usual[:, ::2]}
    made = store.commit(Snapshot.of(1, {"model": state}), attempt=1, require_newest=lambda: None)
    found = store.open(made).load("model")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert all(found[name].stride() == state[name].stride() for name in ("usual", "last", "tied", "turned"))
    assert found["thinned"].is_contiguous(), "what does not lie densely need not lie so again"
    assert found["last"] is found["tied"]


@pytest.mark.parametrize("order", [[0, 0, 1], [0], [0, 1, 3], [2.0, 1.0, 0.0], "210", 7, [[0], [1], [2]]])
def test_an_order_that_is_none_is_damage(store: CheckpointStore, order: Any) -> None:
    state = {"model": {"weight": torch.rand(2, 3, 4).permute(2, 0, 1)}}
    made = store.commit(Snapshot.of(1, state), attempt=1, require_newest=lambda: None)
    rewrite(store, made, lambda manifest: manifest["parts"]["model"]["weight"].update(order=order))
    with pytest.raises(Damaged):
        store.open(made).load("model")


def test_a_fused_optimizer_with_channels_last_goes_on_exactly(store: CheckpointStore) -> None:
    """It takes weights and moments pairwise, as they lie, and does not look at their strides."""

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

    model, optimizer = built()
    trained(model, optimizer, range(3))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    made = store.commit(Snapshot.of(3, state), attempt=1, require_newest=lambda: None)
    trained(model, optimizer, range(3, 6))
    resumed, other = built()
    resumed.load_state_dict(store.open(made).load("model"))
    other.load_state_dict(store.open(made).load("optimizer"))
    trained(resumed, other, range(3, 6))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_equal_names_in_different_parts_do_not_meet(store: CheckpointStore) -> None:
    snapshot = Snapshot.of(1, {"model": {"w": torch.zeros(1)}, "average": {"w": torch.ones(1)}})
    checkpoint = store.open(store.commit(snapshot, attempt=1, require_newest=lambda: None))
    assert checkpoint.load("model")["w"].item() == 0
    assert checkpoint.load("average")["w"].item() == 1


@pytest.mark.parametrize("count", [10, 20, 40])
def test_the_first_retention_of_an_attempt_is_linear(count: int, tmp_path: Path) -> None:
    """Kept commits are listed a few times in all, not once for each of them."""

    class Counting(LocalLocation):
        listed = 0

        def list(self, folder: str) -> list[Entry]:
            found = super().list(folder)
            self.listed += len(found)
            return found

    before = CheckpointStore(LocalLocation(tmp_path))
    for step in range(1, count + 1):
        commit(before, step)
    location = Counting(tmp_path)
    store = CheckpointStore(location)
    for known in (store.retain, CheckpointStore(location).retain):
        location.listed = 0
        known(Retention(2, every_steps=1), attempt=2)
        assert location.listed <= 3 * count
    location.listed = 0
    assert len(CheckpointStore(location).survey()) == count
    assert location.listed == 2 * count


def test_a_retention_reads_few_manifests_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits wait for it. Step by step it comes to the same as one that reads all."""
    reads: list[str] = []

    class Reading(LocalLocation):
        def read(self, name: str, *, limit: int) -> bytes | None:
            reads.append(name)
            return super().read(name, limit=limit)

    policy = Retention(2, every_steps=5, best=2, mode="max")
    for folder, most in (("few", 3), ("all", 99)):
        monkeypatch.setattr(store_module, "SURVEYED_MANIFESTS", most)
        before = CheckpointStore(LocalLocation(tmp_path / folder))
        for step in range(1, 13):
            facts = {"objective": float(step * 7 % 11)}
            before.commit(Snapshot.of(step, {}, **facts), attempt=1, require_newest=lambda: None)
        store, found = CheckpointStore(Reading(tmp_path / folder)), []
        for step in range(13, 20):
            commit(store, step, attempt=2)
            reads.clear()
            store.retain(policy, attempt=2)
            assert len(reads) <= most
            found.append(commits(store))
        if most == 3:
            few = found
            assert len(few[0]) > len(few[3])
    assert few[4:] == found[4:]
    assert all({*more} >= {*fewer} for more, fewer in zip(few, found, strict=True))


def wide(store: CheckpointStore, step: int) -> CommitId:
    """A commit of four data files, where ``part_bytes`` is 16."""
    snapshot = Snapshot.of(step, {"model": {name: torch.zeros(4) for name in "abcd"}})
    return store.commit(snapshot, attempt=1, require_newest=lambda: None)


@pytest.mark.parametrize("part", ["commits/", ".00002."], ids=["at the manifest", "in the data"])
def test_commits_that_fail_do_not_leave_a_copy_each(part: str) -> None:
    """An outage with many tries would fill the disk."""

    def refuse(number: int, verb: str, name: str, after: bool) -> None:
        if verb == "put" and part in name:
            raise StorageError("no space left")

    location = MemoryLocation()
    location.part_bytes = 16
    store = CheckpointStore(location)
    wide(store, 1)
    assert len(data(store)) == 4
    location.arm(refuse)
    for step in range(2, 9):
        with pytest.raises(StorageError, match="no space left"):
            wide(store, step)
        assert len(data(store)) <= 8
    location.arm(None)
    for step in (9, 10, 11):
        wide(store, step)
    assert {parse_data(name) for name in data(store)} == {*store.commits()}
    assert len(data(store)) == 4 * len(store.commits())
    store.retain(Retention(2), attempt=1)
    assert (len(store.commits()), len(data(store))) == (2, 8)


def test_the_room_of_a_failed_commit_is_there_for_the_next() -> None:
    """Three of four files were written when the disk was full; whoever leaves them there fails forever."""
    location = MemoryLocation()
    location.part_bytes = 16
    store = CheckpointStore(location)
    wide(store, 1)
    room = 7

    def full(number: int, verb: str, name: str, after: bool) -> None:
        if verb == "put" and not after and name.startswith("data/") and len(data_files()) >= room:
            raise StorageError("no space left")

    def data_files() -> list[str]:
        return [name for name in location.objects if name.startswith("data/")]

    location.arm(full)
    with pytest.raises(StorageError):
        wide(store, 2)
    assert len(data_files()) == room
    room = 8
    wide(store, 3)
    assert [made.step for made in store.commits()] == [3, 1]

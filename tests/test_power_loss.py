"""A power cut at any moment: acknowledged commits are there to the bit, and nothing wrong is loaded."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from counts import count
from faults import MemoryLocation, is_right, save
from power import Event, RecordingOs, crash_states

from runner.checkpoint.manifest import CommitId
from runner.checkpoint.store import CheckpointStore, Retention, Torn
from runner.checkpoint.tensor_file import Damaged
from runner.data.ledger import Ledger, LedgerLine, read_segments
from runner.experiment import export
from runner.run import attempts
from runner.run.directory import MODEL, RunDirectory
from runner.storage import LocalLocation, local
from runner.storage.location import Buffer


class ManifestFirst(LocalLocation):
    """A mutant: writes the data of a commit once its manifest is there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._late: dict[str, bytes] = {}

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        if name.startswith("data/"):
            self._late[name] = data
            return len(data)
        size = super().put(name, [data])
        for waiting in [*self._late]:
            super().put(waiting, [self._late.pop(waiting)])
        return size


def recorded(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    forget: str = "",
    kind: type[LocalLocation] = LocalLocation,
    below: str = "",
) -> list[Event]:
    """Two attempts of three commits each, under retention. Notes ("acknowledged", commit) and ("kept", commits). The
    run's folder is ``below`` the root, and made by somebody else.
    """
    system = RecordingOs(root, forget=forget)
    monkeypatch.setattr(local, "os", system)
    if below:
        system.others_make(root / below)
    location = kind(root / below)
    if below:
        location.sync_parents()
    store = CheckpointStore(location)
    commits: list[CommitId] = []
    for attempt in (1, 2):
        for step in (1, 2, 3):
            commits.append(save(store, step, attempt=attempt))
            system.note("acknowledged", commits[-1])
            system.note("kept", tuple(commits[-2:]))
            store.retain(Retention(2), attempt=attempt)
    monkeypatch.undo()
    return system.events


def check(events: list[Event], below: str = "") -> int:
    """Hold every crash state against the promises; returns how many there were."""
    states = 0
    for number, files in crash_states(events):
        acknowledged = {event[1] for event in events[:number] if event[0] == "acknowledged"}
        kept = next((event[1] for event in reversed(events[:number]) if event[0] == "kept"), tuple(acknowledged))
        removable = acknowledged - {*kept}
        store = CheckpointStore(MemoryLocation({name.removeprefix(f"{below}/"): files[name] for name in files}))
        loadable = set()
        for commit in store.commits():
            try:
                assert is_right(store.open(commit)), f"{commit} is handed out wrong"
                loadable.add(commit)
            except Torn:
                pass
            except Damaged as error:
                if commit not in removable:
                    raise AssertionError("a whole manifest names what is not there") from error
        lost = acknowledged - removable - loadable
        assert not lost, f"{lost} lost after {number} of {len(events)} events"
        states += 1
    return states


def test_a_cut_at_any_moment_loses_nothing_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = recorded(tmp_path, monkeypatch)
    assert sum(event[0] == "write" for event in events) > 20
    assert sum(event[0] == "sync file" for event in events) >= 12
    assert sum(event[0] == "sync folder" for event in events) >= 12
    assert sum(event[0] == "unname" for event in events) >= 8
    states = check(events)
    assert states > 1000
    count("crash states", states)


def test_a_folder_that_hydra_made_is_there_after_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = recorded(tmp_path, monkeypatch, below="outputs/experiment/run")
    assert check(events, "outputs/experiment/run") > 1000


@pytest.mark.slow
def test_a_run_syncs_all_names_above_it_before_it_claims(tmp_path: Path) -> None:
    code = """
import sys
from runner.storage import local

sync, log = local.sync_folder, open("synced", "w", buffering=1)
local.sync_folder = lambda folder, **how: (sync(folder, **how), print(folder, file=log))
from runner.__main__ import main

sys.exit(main())
"""
    command = [sys.executable, "-c", code, "experiment=smoke", "trainer.max_steps=1", "run.root=new/root", "run.name=r"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    run = tmp_path / "new/root/smoke/r"
    synced = (tmp_path / "synced").read_text().splitlines()
    claimed = synced.index(str(run / "attempts"))
    above = [folder for folder in run.parents if folder.is_relative_to(tmp_path)]
    assert {*map(str, above), str(run)} <= {*synced[:claimed]}


def test_all_records_of_a_run_are_there_after_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim, run.json, config.yaml, ledger, weights and result, in folders that Hydra or a killed life made."""
    system, identity = RecordingOs(tmp_path), {"seed": 1}
    monkeypatch.setattr(local, "os", system)
    for folder in ("", "/attempts", "/ledger"):  # a life may die between the calls that make a folder and sync its name
        system.others_make(tmp_path / f"outputs/e/v{folder}")
    directory = RunDirectory.under(str(tmp_path / "outputs"), "e", "v")
    directory.sync_parents()
    directory.location.put("attempts/000001-aaaaaaaaaaaa.json", [b"{}"])
    directory.create(identity, parent=None)
    ledger = Ledger(directory.location, attempt=1, recipe={"samples": 9}, grouping=4)
    ledger.open(0)
    ledger.add(LedgerLine(1, 0, 3, 7))
    ledger.flush()
    ledger.close()
    sha256, size = export(directory.location, MODEL, {"weight": torch.ones(9)})
    directory.finish(identity, {"step": 1, "metrics": {}, "sha256": {MODEL: sha256}, "bytes": {MODEL: size}})
    monkeypatch.undo()
    after = [files for number, files in crash_states(system.events) if number == len(system.events)]
    assert after
    for files in after:
        there = MemoryLocation({name.removeprefix("outputs/e/v/"): files[name] for name in files})
        reader = RunDirectory("", "e", "v", there)
        assert [name.number for name in attempts.names(there)] == [1]
        assert (reader.record() or {})["variant"] == "v"
        assert reader.identity() == identity
        assert reader.complete_result(identity) is not None
        assert [segment.lines for segment in read_segments(there)] == [(LedgerLine(1, 0, 3, 7),)]


@pytest.mark.parametrize(
    ("forget", "kind"),
    [("file", LocalLocation), ("folder", LocalLocation), ("", ManifestFirst)],
    ids=["no sync of files", "no sync of folders", "manifest first"],
)
def test_a_location_that_forgets_something_is_noticed(
    forget: str, kind: type[LocalLocation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = recorded(tmp_path, monkeypatch, forget=forget, kind=kind)
    with pytest.raises(AssertionError, match=r"lost after|names what is not there"):
        check(events)


@pytest.mark.parametrize("forget", ["", "file", "folder"])
def test_a_replaced_object_is_the_old_one_or_the_new_one(
    forget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = RecordingOs(tmp_path, forget=forget)
    monkeypatch.setattr(local, "os", system)
    location, versions = LocalLocation(tmp_path), [b"old" * 700, b"new" * 900]
    for version in versions:
        location.replace("metrics/x", [version[:1000], version[1000:]])
        system.note("returned", version)
    states = wrong = 0
    for number, files in crash_states(system.events):
        returned = [event[1] for event in system.events[:number] if event[0] == "returned"]
        possible = [*(returned[-1:] or [None]), *versions[len(returned) :]]
        wrong += files.get("metrics/x") not in possible
        states += 1
    assert states > 100
    assert (wrong == 0) == (forget == "")

"""A run whose directory goes away under it, or whose weights are gone when it is finished: nothing is taken for right
that is not, and nothing is written where nothing belongs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from lives import LAST, Lives
from marks import slow
from servers import Server
from waiting import until

from runner import signals
from runner.distributed.communicator import SINGLE_PROCESS
from runner.errors import Interrupted, RunGone, StorageError, Superseded
from runner.experiment import retry_export
from runner.run import attempts
from runner.run.attempts import Attempt, claim
from runner.storage import open_location
from runner.storage.location import Location
from runner.storage.remote import RemoteLocation

COMMAND = ("experiment=smoke", "trainer.max_steps=30", "checkpoint.every_steps=10", "trainer.evaluate_every_steps=10")


@pytest.fixture(params=["local", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr(attempts, "GONE_SECONDS", 0.3)
    monkeypatch.setattr(RemoteLocation, "beat_seconds", 0.05)
    found = open_location(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run")
    if request.param == "local":
        found.beat_seconds = 0.05
    return found


def objects(location: Location) -> list[str]:
    system, path = fsspec.url_to_fs(location.url)
    system.invalidate_cache()
    return [str(name) for name in system.find(path)]


def ended(attempt: Attempt) -> bool:
    try:
        attempt.raise_if_superseded()
    except RunGone:
        return True
    return False


def removed(location: Location) -> None:
    system, path = fsspec.url_to_fs(location.url)
    system.rm(path, recursive=True)


def claim_deleted(location: Location) -> None:
    (name,) = attempts.names(location)
    location.remove(f"{name}.json")


def replaced(location: Location) -> None:
    removed(location)
    location = open_location(location.url)
    location.put("run.json", [b"{}"])
    location.put("attempts/000001-aaaaaaaaaaaa.json", [b"{}"])


@pytest.mark.parametrize("goes", [removed, claim_deleted, replaced])
def test_a_run_that_is_gone_for_good_ends_with_its_reason(
    location: Location, goes: Callable[[Location], None], caplog: pytest.LogCaptureFixture
) -> None:
    attempt = claim(location, {})
    attempt.beat(step=1)
    until(lambda: location.read(f"{attempt.name}.beat", limit=9999) is not None)
    goes(location)
    until(lambda: attempt.gone_since is not None)
    left = objects(location)
    until(lambda: ended(attempt), seconds=20)
    assert "Waiting 0 seconds for it to come back" in caplog.text
    with pytest.raises(RunGone, match=r"was moved, removed or replaced: attempt 1, this process, is not in it"):
        attempt.require_newest()
    attempt.beat(step=2)
    attempt.end("failed")
    assert objects(location) == left, "nothing is written where it was"


def test_a_directory_that_comes_back_in_time_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = open_location(str(tmp_path / "run"))
    location.beat_seconds = 0.05
    attempt = claim(location, {})
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    until(lambda: attempt.gone_since is not None)
    with pytest.raises(StorageError, match="was there and is gone; it is not made again"):
        location.put("attempts/x", [b""])
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    until(lambda: attempt.gone_since is None)
    monkeypatch.setattr(attempts, "GONE_SECONDS", 0.0)
    attempt.raise_if_superseded()
    attempt.end("finished")
    assert attempts.history(location)[0].outcome() == "finished"


def test_an_outage_is_not_taken_for_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = open_location(str(tmp_path / "run"))
    location.beat_seconds = 0.02
    attempt = claim(location, {})
    asked = []

    def fails(*_: object) -> None:
        asked.append(1)
        raise StorageError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(attempts, "successor", fails)
        until(lambda: len(asked) > 5)
        assert attempt.gone_since is None
    attempt.end("finished")


def test_a_removed_run_ends_and_leaves_no_folder(life: Lives, tmp_path: Path) -> None:
    with life.start(*COMMAND, "trainer.max_steps=10000000", f"run.root={tmp_path}", "run.name=r") as living:
        until(lambda: len([*tmp_path.glob("smoke/r/commits/*")]) > 1)
        (tmp_path / "smoke/r").rename(tmp_path / "elsewhere")
        end = living.wait()
    assert end.status == 1
    assert "was moved, removed or replaced" in end.output
    assert "Traceback" not in end.output
    assert not (tmp_path / "smoke/r").exists()


def test_an_export_waits_for_a_storage_that_comes_back(life: Lives, tmp_path: Path) -> None:
    (tmp_path / "smoke/r/model.safetensors").mkdir(parents=True)
    with life.start(*COMMAND, f"run.root={tmp_path}", "run.name=r") as living:
        until(lambda: "the weights could not be exported" in living.output)
        (tmp_path / "smoke/r/model.safetensors").rmdir()
        assert living.wait().status == 0
    assert (tmp_path / "smoke/r/result.json").exists()
    life(*COMMAND, "checkpoint.max_unsaved=0.1", f"run.root={tmp_path}", "run.name=s", call=LAST)
    (tmp_path / "smoke/s/model.safetensors").mkdir()
    end = life(*COMMAND, "checkpoint.max_unsaved=0.1", f"run.root={tmp_path}", "run.name=s")
    assert end.status == 1
    assert "the weights could not be exported: cannot write" in end.output
    assert "fix the storage and run the same command again (checkpoint.max_unsaved=0.1)" in end.output


def test_a_wait_for_the_export_obeys_signals_and_takeovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, object]:
        monkeypatch.setattr(signals, "received", lambda: "SIGTERM")
        raise StorageError("no answer")

    location = open_location(str(tmp_path))
    attempt = claim(location, {})
    with pytest.raises(Interrupted, match="SIGTERM while the weights could not be exported; every step is committed"):
        retry_export(fails, attempt, 1000.0, SINGLE_PROCESS)
    monkeypatch.undo()
    newer = attempts.claim(location, {}, steal=True)
    with pytest.raises(Superseded, match="attempt 2"):
        retry_export(lambda: pytest.fail("it exported"), attempt, 1000.0, SINGLE_PROCESS)
    for one in (attempt, newer):
        one.end("finished")


@pytest.mark.parametrize("kind", ["local", slow("s3")])
def test_a_finished_run_without_its_weights_makes_them_again(
    kind: str, life: Lives, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root, environment, options = str(tmp_path), {}, {}
    if kind == "s3":
        server: Server = request.getfixturevalue("s3")
        root, environment, options = f"{server.url}/{tmp_path.name}", server.environment, server.options
    command = (*COMMAND, f"run.root={root}", "run.name=r")
    assert life(*command, environment=environment).status == 0
    system, run = fsspec.url_to_fs(f"{root}/smoke/r", **options)
    first, best = "model.safetensors", "best.safetensors"
    whole = {name: system.cat_file(f"{run}/{name}") for name in (first, best)}
    result = json.loads(system.cat_file(f"{run}/result.json"))
    assert "attempt" not in life(*command, environment=environment).output
    for name, damaged in [(best, None), (first, whole[first][:-1])]:
        system.rm_file(f"{run}/{name}")
        if damaged is not None:
            system.pipe_file(f"{run}/{name}", damaged)
        end = life(*command, environment=environment)
        told = (
            f"finished, but {name} has {len(damaged or b'')} bytes, expected {len(whole[name])}; it is exported again"
        )
        assert (end.status, told in end.output) == (0, True), end.output
        assert {name: system.cat_file(f"{run}/{name}") for name in (first, best)} == whole
        again = json.loads(system.cat_file(f"{run}/result.json"))
        assert again | {"seconds": 0} == result | {"seconds": 0}
    if kind == "local":
        system.rm_file(f"{run}/{first}")
        assert not life(*command, "-m").output.startswith("1 done")
        assert system.cat_file(f"{run}/{first}") == whole[first]


def test_weights_that_nothing_can_make_again_are_no_success(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command).status == 0
    run = tmp_path / "smoke/r"
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "data")
    end = life(*command)
    assert end.status == 5
    assert "has no checkpoint that can be loaded" in end.output
    assert (run / "result.json").exists()

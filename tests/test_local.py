"""The promises of a location, kept by a folder on a disk."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.errors import StorageError
from runner.storage import LocalLocation, find_folders, open_location
from runner.storage.location import Entry, check_name

OUTSIDE = ["", ".", "..", "../x", "/x", "a/../b", "a/..", "a//b", "a/", ".a", "-a", "A", "a b", "a\n", "a\0", "a\\b"]

PREAMBLE = """
import os, signal, sys
from runner.storage import LocalLocation
location, me = LocalLocation(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def location(tmp_path: Path) -> LocalLocation:
    return LocalLocation(tmp_path / "here")


@contextlib.contextmanager
def process(location: LocalLocation, code: str, name: str = "") -> Iterator["subprocess.Popen[str]"]:
    """Another process that is ready to run ``code``; a line on its stdin starts it."""
    command = [sys.executable, "-c", PREAMBLE + code, location.url, name]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as started:
        try:
            assert started.stdout
            assert started.stdout.readline() == "ready\n"
            yield started
        finally:
            started.kill()


def go(started: "subprocess.Popen[str]") -> None:
    assert started.stdin
    started.stdin.write("go\n")
    started.stdin.flush()


def said(started: "subprocess.Popen[str]") -> str:
    """The next line of another process."""
    assert started.stdout
    return started.stdout.readline().strip()


def files(location: LocalLocation) -> list[str]:
    """Everything below the location, temporary files too."""
    return sorted(str(path.relative_to(location.path)) for path in location.path.rglob("*") if not path.is_dir())


def read(location: LocalLocation, name: str) -> bytes | None:
    return location.read(name, limit=1 << 20)


def test_nothing_is_made_before_the_first_write(location: LocalLocation) -> None:
    assert read(location, "a") is None
    assert location.list("") == location.list("data") == []
    location.remove("a")
    assert not location.path.exists()


def test_put_never_overwrites(location: LocalLocation) -> None:
    location.put("a", [b"first"])
    with pytest.raises(StorageError, match=r"cannot write .*here/a: File exists"):
        location.put("a", [b"second"])
    assert read(location, "a") == b"first"


def test_an_object_shows_only_when_it_is_whole(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> list[bytes | None]:
        return [read(location, entry.name) for entry in location.list("")]

    def chunks() -> Iterator[bytes]:
        yield b"ne"
        assert seen() == [b"old"]
        yield b"w"

    def synced(descriptor: int) -> None:
        during.append(seen())

    during: list[list[bytes | None]] = []
    location.replace("a", [b"old"])
    location.replace("a", chunks())
    assert seen() == [b"new"]
    monkeypatch.setattr(os, "fsync", synced)
    location.replace("a", [b"newer"])
    assert during == [[b"new"], [b"newer"]]


def test_a_list_has_neither_links_nor_half_written_files(location: LocalLocation) -> None:
    location.put("b", [b"b"])
    (location.path / "link").symlink_to(location.path / "b")
    (location.path / "a2.tmp-0123").write_text("half a write")
    assert location.list("") == [Entry("b", 1)]


def test_an_unlistable_folder_is_not_empty(location: LocalLocation) -> None:
    location.put("a", [b""])
    with pytest.raises(StorageError, match=r"cannot list .*here/a: Not a directory"):
        location.list("a")


def test_a_listing_survives_objects_removed_meanwhile(location: LocalLocation) -> None:
    code = """
print("begun", flush=True)
for i in range(3000):
    location.put(f"folder/b{i}", [b"x"])
    location.remove(f"folder/b{i}")
"""
    location.put("folder/a", [b"1"])
    with process(location, code) as other:
        go(other)
        assert said(other) == "begun"
        while other.poll() is None:
            assert location.list("folder")[0] == Entry("a", 1)


def test_files_of_dead_writers_are_swept_after_an_hour(location: LocalLocation) -> None:
    for name in ("a", "a.tmp-00", "b.tmp-11"):
        (location.path / "folder").mkdir(parents=True, exist_ok=True)
        (location.path / "folder" / name).write_text("half")
        old = name != "b.tmp-11"
        os.utime(location.path / "folder" / name, (0, 0) if old else None)
    location.remove_leftovers("folder")
    location.remove_leftovers("absent")
    assert files(location) == ["folder/a", "folder/b.tmp-11"]


def test_names_that_stay_are_names() -> None:
    for name in ("a", "0", "a.b-c_d", "data/s000000001-a000001.json", "a..b", "a/b/c"):
        assert check_name(name) == name


def test_a_lock_dies_with_its_holder_despite_a_forked_child(location: LocalLocation) -> None:
    """Data workers outlive a killed parent for a while; they must not keep its run locked."""
    code = """
lock = location.lock("a.lock")
child = os.fork()
if not child:
    signal.pause()
print(child, flush=True)
signal.pause()
"""
    with process(location, code) as holder:
        go(holder)
        child = int(said(holder))
        try:
            assert location.lock("a.lock") is None
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            os.kill(child, 0)
            lock = location.lock("a.lock")
            assert lock is not None
            lock.release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_no_verb_goes_through_a_link(location: LocalLocation) -> None:
    target = location.path.parent / "target"
    target.write_text("outside")
    location.path.mkdir()
    (location.path / "a").symlink_to(target)
    (location.path / "up").symlink_to(target.parent)
    for name in ("a", "up/target"):
        verbs: list[Callable[[], Any]] = [
            lambda name=name: location.put(name, [b"x"]),
            lambda name=name: location.replace(name, [b"x"]),
            lambda name=name: location.journal(name),
            lambda name=name: location.read(name, limit=9),
            lambda name=name: location.read_into(name, 0, [memoryview(bytearray(1))]),
            lambda name=name: location.remove(name),
            lambda name=name: location.list(name),
            lambda name=name: location.remove_leftovers(name),
            lambda name=name: location.lock(name),
        ]
        for verb in verbs:
            with pytest.raises(StorageError, match="is a link"):
                verb()
    assert target.read_text() == "outside"


def test_a_put_that_fails_half_way_leaves_no_file(location: LocalLocation) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise KeyError

    with pytest.raises(KeyError):
        location.put("a", chunks())
    with pytest.raises(KeyError):
        location.replace("a", chunks())
    assert files(location) == []


def test_a_failing_disk_is_reported_and_keeps_the_old_object(location: LocalLocation) -> None:
    location.put("old", [b"old"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the file system's own refusal, half way through
    try:
        for verb in (
            lambda: location.put("new", [bytes(1 << 19)] * 3),
            lambda: location.replace("old", [bytes(1 << 19)] * 3),
        ):
            with pytest.raises(StorageError, match=r"cannot write .*: File too large"):
                verb()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(location) == ["old"]
    assert read(location, "old") == b"old"


def test_an_object_is_synced_and_then_its_folder(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def number(name: str) -> int:
        return (location.path / name).stat().st_ino

    location.put("first", [b""])
    monkeypatch.setattr(os, "fsync", noted)
    location.put("data/a", [b"x"])
    assert synced == [number("."), number("data/a"), number("data")]
    synced.clear()
    location.replace("data/b", [b"x"])
    assert synced == [number("data/b"), number("data")]
    synced.clear()
    location.replace("data/b", [b"y"])
    assert synced == [number("data/b"), number("data")]
    synced.clear()
    location.replace("data/b", [b"y"], durable=False)
    assert synced == []


def test_one_folder_that_cannot_be_listed_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/run.json", "closed/x", "gone/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()

    def scandir(path: str, scan: Callable[[str], Any] = os.scandir) -> Any:
        codes = {"closed": errno.EACCES, "gone": errno.ENOENT}
        if code := codes.get(os.path.basename(path)):
            raise OSError(code, os.strerror(code), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [*find_folders(str(tmp_path), "run.json")] == ["a", "closed"]
    with pytest.raises(StorageError, match=r"cannot list .*closed: Permission denied"):
        find_folders(str(tmp_path / "closed"), "run.json")
    with pytest.raises(StorageError, match=r"cannot list .*absent"):
        find_folders(str(tmp_path / "absent"), "run.json")


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}"])
def test_a_folder_may_be_named_as_a_url(form: str, tmp_path: Path) -> None:
    assert open_location(form.format(tmp_path)).url == str(tmp_path)

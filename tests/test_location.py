"""What every location promises, kept by a disk, by memory and by real servers."""

import itertools
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from servers import Server

from runner.errors import StorageError
from runner.storage import backend, find_folders, open_location, remote
from runner.storage.location import Entry, Location

KINDS = ["disk", "memory", "s3", "gcs", "azure", "sftp"]
OUTSIDE = ["", ".", "..", "../x", "/x", "a/../b", "a//b", "a/", ".a", "A", "a b", "a\n", "a\0", "a*"]


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Server:
    """A place of its own for every test."""
    if request.param == "disk":
        return Server(str(tmp_path / "here"), {})
    if request.param == "memory":
        return Server(f"memory://{secrets.token_hex(8)}", {})
    running = request.getfixturevalue(request.param)
    return Server(f"{running.url}/{secrets.token_hex(8)}", running.options)


@pytest.fixture
def location(server: Server) -> Location:
    return open_location(server.url, server.options)


def again(server: Server) -> Location:
    """The same place, as another process would open it."""
    return open_location(server.url, server.options)


def read(location: Location, name: str) -> bytes | None:
    return location.read(name, limit=1 << 20)


def test_an_absent_object_is_none_or_empty(location: Location) -> None:
    assert read(location, "a") is None
    assert read(location, "deep/er/a") is None
    assert location.list("") == location.list("data") == []
    location.remove("a")
    location.remove_leftovers("data")


def test_put_writes_all_chunks_and_returns_the_size(location: Location, server: Server) -> None:
    assert location.put("data/deep/a.bin", [b"12", bytearray(b"345"), memoryview(b"6"), b""]) == 6
    assert location.put("empty", []) == 0
    for reader in (location, again(server)):
        assert read(reader, "data/deep/a.bin") == b"123456"
        assert read(reader, "empty") == b""
        assert reader.list("data/deep") == [Entry("a.bin", 6)]
        assert reader.list("") == [Entry("empty", 0)]


def test_a_reused_buffer_is_taken_as_it_was(location: Location) -> None:
    def chunks() -> Iterator[memoryview]:
        buffer = bytearray(2)
        for byte in b"abc":
            buffer[:] = bytes([byte] * 2)
            yield memoryview(buffer)

    location.put("a", chunks())
    assert read(location, "a") == b"aabbcc"


def test_many_bytes_take_the_way_over_a_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MEMORY_BYTES", 10)
    location = again(server)
    assert location.put("data/a", [b"0123456789", b"a", b"b"]) == 12
    location.replace("data/a", [b"x" * 6, b"y" * 6])
    assert read(location, "data/a") == b"x" * 6 + b"y" * 6
    assert location.list("data") == [Entry("a", 12)]


def test_replace_writes_over_what_is_there(location: Location) -> None:
    location.replace("a", [b"a long first version"])
    location.replace("a", [b"se", b"cond"], durable=False)
    assert read(location, "a") == b"second"
    assert location.list("") == [Entry("a", 6)]


def test_chunks_that_break_off_leave_nothing_of_theirs(location: Location) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise KeyError

    location.replace("old", [b"old"])
    for write in (location.put, location.replace):
        for name in ("new", "old") if write == location.replace else ("new",):
            with pytest.raises(KeyError):
                write(name, chunks())
    assert location.list("") == [Entry("old", 3)]
    assert read(location, "old") == b"old"
    assert read(location, "new") is None


def test_a_reader_sees_the_old_object_or_the_new_one(location: Location, server: Server) -> None:
    sizes = [bytes([i]) * 40_000 * i for i in range(1, 9)]
    location.replace("a", [sizes[0]])
    done = threading.Event()

    def write() -> None:
        for data in itertools.takewhile(lambda _: not done.is_set(), itertools.cycle(sizes)):
            location.replace("a", [data])

    reader, seen = again(server), set()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(seen) < 4:
            data = read(reader, "a")
            assert data
            assert data == sizes[data[0] - 1]
            assert [entry.name for entry in reader.list("")] == ["a"]
            seen.add(data[0])
    finally:
        done.set()
        writer.join()


def test_an_object_larger_than_the_limit_is_refused(location: Location) -> None:
    location.put("a", [b"12345"])
    assert location.read("a", limit=5) == b"12345"
    with pytest.raises(StorageError, match="more than the 4 bytes"):
        location.read("a", limit=4)


def test_read_into_fills_the_buffer_from_the_offset(location: Location) -> None:
    location.put("a", [b"0123456789"])
    buffer = bytearray(4)
    for offset, expected in ((0, b"0123"), (3, b"3456"), (6, b"6789")):
        location.read_into("a", offset, [memoryview(buffer)])
        assert buffer == expected
    location.read_into("a", 10, [memoryview(bytearray())])


def test_read_into_fills_more_buffers_than_one_call_takes(location: Location) -> None:
    data = bytes(range(251)) * 40
    location.put("a", [data])
    sizes = [0, 1, 0, 2, 3, *[1] * 5000, 700, 0]
    buffers = [bytearray(size) for size in sizes]
    location.read_into("a", 5, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data[5 : 5 + sum(sizes)]


@pytest.mark.parametrize("offset", [7, 10, 1000])
def test_read_into_past_the_end_is_an_error(location: Location, offset: int) -> None:
    location.put("a", [b"0123456789"])
    with pytest.raises(StorageError, match=r"cannot read .*/a: "):
        location.read_into("a", offset, [memoryview(bytearray(4))])


def test_read_into_an_object_that_is_not_there_is_an_error(location: Location) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*/a: "):
        location.read_into("a", 0, [memoryview(bytearray(4))])


def test_a_list_has_the_objects_of_one_folder_in_order_of_name(location: Location) -> None:
    for name in ("b", "a10", "a2", "folder/deep", "folder/er/deeper", "folder2/x"):
        location.put(name, [name.encode()])
    assert location.list("") == [Entry("a10", 3), Entry("a2", 2), Entry("b", 1)]
    assert location.list("folder") == [Entry("deep", 11)]
    assert location.list("absent") == []


def test_a_list_is_never_an_old_one(location: Location, server: Server) -> None:
    other = again(server)
    assert location.list("x") == other.list("x") == []
    for i in range(3):
        other.put(f"x/{i}", [b"."])
        assert [entry.name for entry in location.list("x")] == [str(j) for j in range(i + 1)]
    other.remove("x/1")
    assert [entry.name for entry in location.list("x")] == ["0", "2"]


def test_remove_removes_and_takes_absence_for_done(location: Location) -> None:
    for name in ("folder/a", "folder/b"):
        location.put(name, [b""])
    location.remove("folder/a")
    location.remove("folder/a")
    assert location.list("folder") == [Entry("b", 0)]
    assert read(location, "folder/a") is None


def test_a_journal_holds_what_was_synced(location: Location, server: Server) -> None:
    journal = location.journal("metrics/a.jsonl")
    journal.append(b"one\n")
    journal.sync()
    assert read(again(server), "metrics/a.jsonl") == b"one\n"
    journal.append(b"two\n")
    journal.append(b"three\n")
    journal.sync()
    journal.sync()
    journal.close()
    assert read(again(server), "metrics/a.jsonl") == b"one\ntwo\nthree\n"


def test_a_journal_is_appended_to_while_it_is_synced(location: Location) -> None:
    journal = location.journal("a")
    lines = [f"{i}\n".encode() for i in range(500)]

    def append() -> None:
        for line in lines:
            journal.append(line)
            time.sleep(0.0001)

    appending = threading.Thread(target=append)
    appending.start()
    while appending.is_alive():
        journal.sync()
    journal.sync()
    journal.close()
    assert read(location, "a") == b"".join(lines)


def test_a_lock_excludes_others_and_dies_with_its_holder(location: Location, server: Server) -> None:
    code = """
import json, sys
from runner.storage import open_location
location = open_location(sys.argv[1], json.loads(sys.argv[2]))
print("taken" if location.lock("a.lock") else "refused", flush=True)
sys.stdin.readline()
"""
    command = [sys.executable, "-c", code, server.url, json.dumps(server.options)]

    def start() -> "subprocess.Popen[str]":
        root = Path(__file__).parent.parent
        return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    lock = location.lock("a.lock")
    assert lock is not None
    with start() as other:
        assert other.communicate("\n")[0] == "refused\n"
    lock.release()
    with start() as other:
        assert other.stdout
        assert other.stdout.readline() == "taken\n"
        assert location.lock("a.lock") is None
        other.kill()
        other.wait()
        lock = location.lock("a.lock")
        assert lock is not None
        lock.release()


def test_files_of_dead_writers_are_hidden_and_swept_in_an_hour(location: Location, server: Server) -> None:
    location.put("folder/a", [b"whole"])
    folder = Path(urlsplit(server.url).path) / "folder"
    if server.url.startswith(("/", "sftp:")):
        for name, age in (("a.tmp-00", 4000), ("b.tmp-11", 3000)):
            (folder / name).write_text("half")
            os.utime(folder / name, (time.time() - age, time.time() - age))
        assert location.list("folder") == [Entry("a", 5)]
    location.remove_leftovers("folder")
    location.remove_leftovers("absent")
    assert location.list("folder") == [Entry("a", 5)]
    if folder.is_dir():
        assert sorted(os.listdir(folder)) == ["a", "b.tmp-11"]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_that_leave_the_location_are_refused(location: Location, name: str) -> None:
    verbs: list[Callable[[], Any]] = [
        lambda: location.put(name, [b""]),
        lambda: location.replace(name, [b""]),
        lambda: location.journal(name),
        lambda: location.read(name, limit=9),
        lambda: location.read_into(name, 0, [memoryview(b"")]),
        lambda: location.remove(name),
        lambda: location.lock(name),
        lambda: location.list(name or ".."),
        lambda: location.remove_leftovers(name or ".."),
    ]
    for verb in verbs:
        with pytest.raises(StorageError, match="not a name of an object"):
            verb()


def test_many_threads_write_and_read_at_once(location: Location) -> None:
    def work(number: int) -> None:
        for i in range(5):
            location.put(f"data/{number}-{i}", [b"%d" % number * 1000])
            assert f"{number}-{i}" in [entry.name for entry in location.list("data")]
            assert read(location, f"data/{number}-{i}") == b"%d" % number * 1000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(location.list("data")) == 40


def test_a_forked_process_has_connections_of_its_own(
    location: Location, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "TRIES", 1)  # a second one would hide that two processes spoke over one connection
    monkeypatch.setattr(backend, "DEADLINE", 10)
    location.put("a", [b"parent"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if not child:
        status = 1
        try:
            assert read(location, "a") == b"parent"
            location.put("b", [b"child"])
            status = 0
        finally:
            os._exit(status)
    assert location.list("")[0] == Entry("a", 6)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    location.put("c", [b"parent"])
    if not server.url.startswith("memory:"):
        assert [entry.name for entry in location.list("")] == ["a", "b", "c"]


def test_folders_are_found_by_their_contents(server: Server, location: Location) -> None:
    for name in ("b/run.json", "a/deep/run.json", "a/deep/in/run.json", "c/other.json", "b2/run.json.old"):
        location.put(name, [b"{}"])
    assert [*find_folders(server.url, "run.json", server.options, own=["x"])] == ["a/deep", "a/deep/in", "b"]
    assert [*find_folders(server.url, "run.json", server.options, own=["in"])] == ["a/deep", "b"]
    assert [*find_folders(f"{server.url}/b", "run.json", server.options)] == ["."]

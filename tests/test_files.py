"""Reading data files from any fsspec path."""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from runner.errors import DataError, StorageError
from runner.storage.files import (
    chunks,
    exists,
    expand,
    is_compressed,
    list_files,
    local_path,
    open_file,
    read,
    read_range,
    resolve,
    stat,
    write,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.txt, b.txt, c.md and deep/d.txt, each holding its own name."""
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "data"


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The same files in a store that is no disk."""
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/test_files", recursive=True)
    yield "memory://test_files"
    system.rm("/test_files", recursive=True)


def contents(pattern: str) -> list[str]:
    return [read(path).decode() for path in expand(pattern)]


def test_a_file_names_itself(folder: Path) -> None:
    assert contents(f"{folder}/b.txt") == ["b.txt"]


def test_a_folder_names_all_files_below_it_sorted(folder: Path) -> None:
    assert contents(str(folder)) == contents(f"{folder}/") == ["a.txt", "b.txt", "c.md", "deep/d.txt"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "deep/d.txt"]),
        ("?.md", ["c.md"]),
        ("[ac].txt", ["a.txt"]),
        ("*/*.txt", ["deep/d.txt"]),
    ],
)
def test_a_glob_names_what_matches(folder: Path, pattern: str, found: list[str]) -> None:
    assert contents(f"{folder}/{pattern}") == found


def test_any_store_of_fsspec_will_do(memory: str, folder: Path) -> None:
    assert contents(memory) == ["a.txt", "b.txt", "c.md", "deep/d.txt"]
    assert contents(f"{memory}/**/*.txt") == ["a.txt", "b.txt", "deep/d.txt"]
    assert contents(f"file://{folder}/*.md") == ["c.md"]


def test_paths_say_which_store_they_are_in(memory: str, folder: Path) -> None:
    assert expand(f"{memory}/*.md") == ["memory:///test_files/c.md"]
    assert expand(f"{folder}/*.md") == [f"file://{folder}/c.md"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_a_compressed_file_is_read_unpacked(tmp_path: Path, suffix: str, pack: object) -> None:
    assert callable(pack)
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"text"))
    assert read(f"{tmp_path}/a.txt{suffix}") == b"text"


def test_bytes_are_read_as_they_are(tmp_path: Path) -> None:
    every = bytes(range(256)) + b"\r\n\n\x1a"
    (tmp_path / "a.bin").write_bytes(every)
    assert read(f"{tmp_path}/a.bin") == every


@pytest.mark.parametrize("pattern", ["absent", "absent/*.txt", "*.pdf", "empty"])
def test_no_file_at_all_is_an_error_with_the_remedy(folder: Path, pattern: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError) as refused:
        expand(f"{folder}/{pattern}")
    told = f"no file matches '{folder}/{pattern}'; give a file, a folder or a glob (any fsspec path)"
    assert str(refused.value) == told


def test_an_unreadable_file_is_reported_with_its_path(folder: Path) -> None:
    (folder / "a.gz").write_text("not compressed")
    for name, told in (("absent", "FileNotFoundError"), ("deep", "IsADirectoryError"), ("a.gz", "BadGzipFile")):
        with pytest.raises(DataError, match=rf"^cannot read {folder}/{name}: {told}"):
            read(f"{folder}/{name}")


def test_an_unknown_store_is_reported_with_the_path() -> None:
    for verb in (read, expand):
        with pytest.raises(DataError, match="cannot read nosuch://a: ValueError: Protocol not known: nosuch"):
            verb("nosuch://a")


def test_an_error_type_of_a_store_is_reported_with_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentials(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentials("none found")

    for verb in ("info", "pipe_file", "cat_file"):
        monkeypatch.setattr(MemoryFileSystem, verb, refuse)
    with pytest.raises(DataError, match="cannot read memory://a: NoCredentials: none found"):
        exists("memory://a")
    with pytest.raises(StorageError, match="cannot write memory://a: NoCredentials: none found"):
        write("memory://a", b"x")


def test_a_damaged_compressed_file_is_reported_with_its_path(tmp_path: Path) -> None:
    good = gzip.compress(b"text" * 1000)
    for bad in (good[:-10], good[:12] + b"\xff" + good[13:], good[:5]):
        (tmp_path / "a.gz").write_bytes(bad)
        with pytest.raises(DataError, match=rf"^cannot read {tmp_path}/a.gz"):
            read(f"{tmp_path}/a.gz")


def test_a_glob_passes_over_folders(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below/b").write_text("b")
    (tmp_path / "a").write_text("a")
    assert [read(name) for name in expand(f"{tmp_path}/*")] == [b"a"]
    assert [read(name) for name in expand(f"{tmp_path}/**")] == [b"a", b"b"]


def test_inside_an_archive_paths_keep_the_way_to_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a.txt", "one")
    for chain in (f"zip://*.txt::{tmp_path}/all.zip", f"zip://a.txt::simplecache::file://{tmp_path}/all.zip"):
        assert contents(chain) == ["one"]


def test_a_listing_has_sizes_and_marks(memory: str, folder: Path) -> None:
    for where in (memory, str(folder)):
        found = list_files(f"{where}/*.txt")
        assert [*found] == expand(f"{where}/*.txt")
        assert [about.size for about in found.values()] == [5, 5]
        assert all(about.mark for about in found.values())
        assert found == {url: stat(url) for url in found}


def test_a_store_that_does_not_tell_sizes_is_refused(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", lambda *_: {"type": "file", "size": None})
    with pytest.raises(DataError, match=r"memory://test_files/a\.txt: its store does not tell how large it is"):
        stat(f"{memory}/a.txt")


def test_a_range_comes_whole_or_not_at_all(memory: str, folder: Path) -> None:
    for where in (memory, str(folder)):
        assert read_range(f"{where}/a.txt", 1, 4) == b".tx"
        assert read_range(f"{where}/a.txt", 2, 2) == b""
        with pytest.raises(DataError, match=r"a\.txt: expected 6 bytes from byte 3 on, found 2"):
            read_range(f"{where}/a.txt", 3, 9)
        with pytest.raises(DataError, match=r"cannot read .*absent: FileNotFoundError"):
            read_range(f"{where}/absent", 0, 1)


def test_a_file_comes_in_pieces_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"abcdefg"))
    assert [*chunks(f"{tmp_path}/a.gz", 3)] == [b"abc", b"def", b"g"]
    assert is_compressed("a.gz")
    assert not is_compressed("a.txt")


def test_a_file_is_open_to_seek_and_errors_name_it(memory: str, folder: Path) -> None:
    for where in (memory, str(folder)):
        with open_file(f"{where}/b.txt") as file:
            file.seek(2)
            assert file.read() == b"txt"
        with pytest.raises(DataError, match=r"b\.txt: ValueError: odd"), open_file(f"{where}/b.txt"):
            raise ValueError("odd")


def test_writing_replaces_the_whole_file(memory: str, folder: Path) -> None:
    for where in (memory, str(folder)):
        for data in (b"a longer text", b"short"):
            write(f"{where}/A new.txt", data)
            assert read(f"{where}/A new.txt") == data
        assert exists(f"{where}/A new.txt")
        assert not exists(f"{where}/absent")
        assert len(expand(where)) == 5  # nothing is left behind
    with pytest.raises(StorageError, match=r"cannot write .*/absent/a: FileNotFoundError"):
        write(f"{folder}/absent/a", b"")


def test_a_path_becomes_the_url_that_expand_gives(memory: str, folder: Path) -> None:
    assert [resolve(f"{memory}/c.md")] == expand(f"{memory}/*.md")
    assert [resolve(f"{folder}/c.md")] == expand(f"{folder}/*.md")
    assert local_path(f"file://{folder}/c.md") == f"{folder}/c.md"
    assert local_path(f"{memory}/c.md") is None

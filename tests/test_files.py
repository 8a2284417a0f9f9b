"""Reading data files from any fsspec path."""

import bz2
import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from runner.errors import DataError
from runner.storage.files import expand, read


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


def test_what_cannot_be_read_is_told_with_its_path(folder: Path) -> None:
    (folder / "a.gz").write_text("not compressed")
    for name, told in (("absent", "FileNotFoundError"), ("deep", "IsADirectoryError"), ("a.gz", "BadGzipFile")):
        with pytest.raises(DataError, match=rf"^cannot read {folder}/{name}: {told}"):
            read(f"{folder}/{name}")


def test_an_unknown_store_is_told_with_the_path() -> None:
    for verb in (read, expand):
        with pytest.raises(DataError, match="cannot read nosuch://a: ValueError: Protocol not known: nosuch"):
            verb("nosuch://a")


def test_a_compressed_file_that_is_cut_or_damaged_is_told_with_its_path(tmp_path: Path) -> None:
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

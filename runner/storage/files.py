"""A user's data files at any fsspec path: local, http, s3, inside an archive.

No file system or open file is kept between calls: instances are not fork-safe, and fsspec caches them for each process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from runner.errors import DataError, RunnerError, StorageError
from runner.storage.local import replace_file, sync_folder

# Attributes that change with a file, under the names of various stores; the most reliable first.
_MARKS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes, and a ``mark`` that changes with the file: an ETag or a time; empty if the store has neither."""

    size: int
    mark: str


def expand(pattern: str) -> list[str]:
    """The sorted URLs of the files of a glob (``**`` crosses folders), a folder or a file. Raises DataError."""
    return [url for url, _ in _find(pattern)]


def list_files(pattern: str) -> dict[str, Stat]:
    """The files of ``expand`` with size and mark, from the listing if it has the sizes."""
    return {url: stat(url) if info.get("size") is None else _stat(info) for url, info in _find(pattern)}


def stat(path: str) -> Stat:
    """Size and mark of one file. Raises DataError, also for a store that does not know the size."""
    with _store(path) as (system, name):
        info = system.info(name)
    if info.get("size") is None:
        raise DataError(f"{path}: its store does not know the size; copy it to another store")
    return _stat(info)


def exists(path: str) -> bool:
    """Whether the file exists. Raises DataError for a store that cannot be reached."""
    with _store(path) as (system, name):
        try:
            system.info(name)
        except FileNotFoundError:
            return False
    return True


def resolve(path: str) -> str:
    """The full URL of a path, as ``expand`` spells it."""
    with _store(path) as (system, name):
        return _url(system, name, path)


def local_path(path: str) -> str | None:
    """The path of a file on this machine; None for other stores."""
    with _store(path) as (system, name):
        return name if isinstance(system, LocalFileSystem) else None


def is_compressed(path: str) -> bool:
    """Whether the file is compressed, by its suffix (.gz, .xz, .zst ...)."""
    return infer_compression(path) is not None


def read(path: str) -> bytes:
    """The bytes of one file, decompressed by its suffix. Raises DataError."""
    return b"".join(chunks(path, -1))


def chunks(path: str, size: int) -> Iterator[bytes]:
    """The bytes of one file, decompressed by its suffix, ``size`` at a time; the last chunk may be shorter."""
    with _store(path), fsspec.open(path, "rb", compression="infer") as file:
        while chunk := file.read(size):
            yield chunk


def read_range(path: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop), not decompressed. Raises DataError if the store returns fewer or more."""
    if start == stop:
        return b""
    with _store(path) as (system, name):
        data: bytes = system.cat_file(name, start=start, end=stop)
    if len(data) != stop - start:
        raise DataError(
            f"{path}: expected {stop - start} bytes from byte {start} on, found {len(data)}. It was changed or cut, or "
            "its server ignores ranges; restore it, or copy it to another store"
        )
    return data


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file to read and seek in, not decompressed. Errors of reading within the block become DataError."""
    with _store(path) as (system, name), system.open(name, "rb") as file:
        yield file


def write(path: str, data: bytes) -> None:
    """Write a file atomically: a reader sees either the old or the new one. Raises StorageError."""
    with _store(path, "write", StorageError) as (system, name):
        if isinstance(system, LocalFileSystem):
            replace_file(Path(name), [data])
            sync_folder(Path(name).parent, strict=False)
        else:
            system.pipe_file(name, data)


def _find(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    with _store(pattern) as (system, path):
        is_glob = any(character in path for character in "*?[")
        matches = system.glob(path, detail=True) if is_glob else system.find(path, detail=True)
        files = sorted((str(name), info) for name, info in matches.items() if info["type"] == "file")
        if not files:
            raise DataError(f"no file matches {pattern!r}; give a file, a folder or a glob (any fsspec path)")
        return [(_url(system, name, pattern), info) for name, info in files]


def _url(system: Any, name: str, pattern: str) -> str:
    """The URL of a file that matches ``pattern``, with the same chain (``zip://*.txt::s3://bucket/all.zip``)."""
    url = str(system.unstrip_protocol(name))
    links = pattern.split("::")
    number = next((number for number, link in enumerate(links) if "://" in link), len(links) - 1)
    return "::".join([*links[:number], url, *links[number + 1 :]])


def _stat(info: dict[str, Any]) -> Stat:
    mark = next((info[key] for key in _MARKS if info.get(key)), "")
    # The same time may come as a datetime from one call and as seconds from another.
    return Stat(int(info["size"]), str(mark.timestamp() if isinstance(mark, datetime) else mark))


@contextmanager
def _store(path: str, verb: str = "read", kind: type[RunnerError] = DataError) -> Iterator[tuple[Any, str]]:
    """The file system of a path, and the path in it. Within the block, errors of any backend become ``kind``."""
    try:
        yield fsspec.core.url_to_fs(path)
    except (RunnerError, MemoryError):
        raise
    except Exception as error:  # each backend has its own classes, for missing credentials as for an answer in HTML
        raise kind(f"cannot {verb} {path}: {type(error).__name__}: {error}") from error

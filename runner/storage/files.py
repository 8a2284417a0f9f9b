"""A user's data files behind any fsspec path: local, http, s3, inside an archive.

No file system or open file outlives a call: fsspec's instances are not fork-safe, and it keeps those of each process
itself.
"""

import os
import secrets
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
from runner.storage.local import sync_folder

# Attributes that change when a file does, under the names that various stores give them; the best first.
_MARKS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes, and a ``mark`` that changes when the file does: an ETag or a time, empty where there is none."""

    size: int
    mark: str


def expand(pattern: str) -> list[str]:
    """The paths that a glob (``**`` crosses folders), a folder or a single file names, sorted.

    Raises DataError when there is none.
    """
    with _Explained(pattern):
        return [url for url, _ in _find(pattern)]


def list_files(pattern: str) -> dict[str, Stat]:
    """The files of ``expand`` with their sizes, from the store's listing if it has them."""
    with _Explained(pattern):
        found = _find(pattern)
    return {url: stat(url) if about.get("size") is None else _stat(about) for url, about in found}


def stat(path: str) -> Stat:
    """Size and mark of one file. Raises DataError, also for a store that does not tell sizes."""
    with _Explained(path):
        system, name = fsspec.core.url_to_fs(path)
        about = system.info(name)
    if about.get("size") is None:
        raise DataError(f"{path}: its store does not tell how large it is; copy it to one that does")
    return _stat(about)


def exists(path: str) -> bool:
    """Whether there is such a file; a store that cannot be asked is a DataError, not a no."""
    with _Explained(path):
        system, name = fsspec.core.url_to_fs(path)
        try:
            system.info(name)
        except FileNotFoundError:
            return False
    return True


def resolve(path: str) -> str:
    """The full URL of a path, as ``expand`` spells it."""
    with _Explained(path):
        system, name = fsspec.core.url_to_fs(path)
        return _url(system, name, path)


def local_path(path: str) -> str | None:
    """Where the file lies on this machine, or None for other stores."""
    with _Explained(path):
        system, name = fsspec.core.url_to_fs(path)
    return name if isinstance(system, LocalFileSystem) else None


def is_compressed(path: str) -> bool:
    """Whether the suffix says so (.gz, .xz, .zst ...)."""
    return infer_compression(path) is not None


def read(path: str) -> bytes:
    """The bytes of one file, decompressed if its suffix says so. Raises DataError."""
    return b"".join(chunks(path, -1))


def chunks(path: str, size: int) -> Iterator[bytes]:
    """The bytes of one file, decompressed if its suffix says so, ``size`` at a time (the last piece: fewer)."""
    with _Explained(path), fsspec.open(path, "rb", compression="infer") as file:
        while piece := file.read(size):
            yield piece


def read_range(path: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) as they are stored. Raises DataError if the store returns fewer or more."""
    if start == stop:
        return b""
    with _Explained(path):
        system, name = fsspec.core.url_to_fs(path)
        data: bytes = system.cat_file(name, start=start, end=stop)
    if len(data) != stop - start:
        raise DataError(
            f"{path}: expected {stop - start} bytes from byte {start} on, found {len(data)}. It was changed or cut, or "
            "its server does not answer for ranges; restore it, or copy it to another store"
        )
    return data


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file to read and seek in, as it is stored; what reading raises within the block becomes a DataError too."""
    with _Explained(path):
        system, name = fsspec.core.url_to_fs(path)
        with system.open(name, "rb") as file:
            yield file


def write(path: str, data: bytes) -> None:
    """Write a file atomically: a reader sees either the old or the new one. Raises StorageError."""
    with _Explained(path, "write", StorageError):
        system, name = fsspec.core.url_to_fs(path)
        if isinstance(system, LocalFileSystem):
            _replace(Path(name), data)
        else:
            system.pipe_file(name, data)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent, ours=False)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _find(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    system, path = fsspec.core.url_to_fs(pattern)
    is_glob = any(character in path for character in "*?[")
    found = system.glob(path, detail=True) if is_glob else system.find(path, detail=True)
    files = sorted((str(name), about) for name, about in found.items() if about["type"] == "file")
    if not files:
        raise DataError(f"no file matches {pattern!r}; give a file, a folder or a glob (any fsspec path)")
    return [(_url(system, name, pattern), about) for name, about in files]


def _url(system: Any, name: str, pattern: str) -> str:
    """The URL of a file that ``pattern`` led to, by the same chain (``zip://*.txt::s3://bucket/all.zip``)."""
    url = str(system.unstrip_protocol(name))
    links = pattern.split("::")
    place = next((place for place, link in enumerate(links) if "://" in link), len(links) - 1)
    return "::".join([*links[:place], url, *links[place + 1 :]])


def _stat(about: dict[str, Any]) -> Stat:
    mark = next((about[key] for key in _MARKS if about.get(key)), "")
    # A store may give a date as such in one answer and as seconds in the next.
    return Stat(int(about["size"]), str(mark.timestamp() if isinstance(mark, datetime) else mark))


class _Explained:
    """Within the block, errors of fsspec and its backends become an error of the runner that names the path."""

    def __init__(self, path: str, verb: str = "read", kind: type[RunnerError] = DataError) -> None:
        self.path, self.verb, self.kind = path, verb, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Any, because each backend has its own, for credentials that it does not find as for an answer in HTML.
        if isinstance(error, Exception) and not isinstance(error, RunnerError | MemoryError):
            raise self.kind(f"cannot {self.verb} {self.path}: {type(error).__name__}: {error}") from error

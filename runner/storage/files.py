"""Reading a user's data files from any fsspec path: local, http, s3, inside an archive."""

import zlib
from lzma import LZMAError

import fsspec

from runner.errors import DataError


def expand(pattern: str) -> list[str]:
    """The paths that a glob (``**`` crosses folders), a folder or a single file names, sorted.

    Raises DataError when there is none.
    """
    with _Explained(pattern):
        system, path = fsspec.core.url_to_fs(pattern)
        is_glob = any(character in path for character in "*?[")
        found = system.glob(path, detail=True) if is_glob else system.find(path, detail=True)
    files = sorted(str(name) for name, about in found.items() if about["type"] == "file")
    if not files:
        raise DataError(f"no file matches {pattern!r}; give a file, a folder or a glob (any fsspec path)")
    return [str(system.unstrip_protocol(name)) for name in files]


def read(path: str) -> bytes:
    """The bytes of one file, decompressed if its suffix says so (.gz, .xz, .zst ...). Raises DataError."""
    with _Explained(path), fsspec.open(path, "rb", compression="infer") as file:
        data: bytes = file.read()
    return data


class _Explained:
    """Turns what fsspec and its backends raise into a DataError that names the path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, EOFError, ImportError, ValueError, zlib.error, LZMAError)):
            raise DataError(f"cannot read {self.path}: {type(error).__name__}: {error}") from error

"""A location on any store that fsspec knows; ``backend.STORES`` says how each kind is written."""

import contextlib
import copy
import io
import itertools
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from runner.errors import StorageError
from runner.hashing import sha256_digest
from runner.storage.backend import Backend, write_timeout
from runner.storage.local import LEFTOVER_SECONDS, TEMPORARY, LocalLocation
from runner.storage.location import Buffer, BufferedJournal, Entry, Lock, check_name

MEMORY_BYTES = 64 << 20  # larger uploads go through a temporary file


class RemoteLocation:
    """A folder of a remote store. Connects to nothing before the first method call.

    ``options`` are for fsspec's file system (credentials, endpoints) and are never printed or stored. Raises
    ConfigError for a URL that cannot be used.
    """

    beat_seconds = 5.0  # each beat uploads an object
    part_bytes = 32 << 20  # below MEMORY_BYTES: the parts under way take 128 MB of memory
    parallel_puts = 4

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._backend = Backend(url, options)
        self.url = self._backend.url

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        path = self._path(name)
        with _spool(chunks) as (content, size):
            write = _upload if self._backend.kind.atomic else _write_and_rename
            self._backend.run("write", name, lambda system: write(system, path, content, size), size=size)
        return size

    def replace(self, name: str, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
        self.put(name, chunks)  # atomic on every kind of store

    def journal(self, name: str) -> BufferedJournal:
        return BufferedJournal(self, check_name(name))

    def read(self, name: str, *, limit: int) -> bytes | None:
        path = self._path(name)
        data = self._backend.run("read", name, lambda system: self._read(system, path, limit + 1), size=limit)
        if data is not None and len(data) > limit:
            raise StorageError(f"cannot read {self.url}/{name}: more than the {limit} bytes such an object may have")
        return data

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        size = sum(map(len, buffers))
        path, end = self._path(name), offset + size
        if not size:
            return
        data = self._backend.run("read", name, lambda system: system.cat_file(path, start=offset, end=end), size=size)
        if len(data) != size:
            raise StorageError(f"cannot read {self.url}/{name}: it ends at byte {offset + len(data)}, {end} are needed")
        rest = memoryview(data)
        for buffer in buffers:
            buffer[:], rest = rest[: len(buffer)], rest[len(buffer) :]

    def list(self, folder: str) -> list[Entry]:
        infos = self._entries(folder and check_name(folder)).items()
        entries = [Entry(leaf, int(info["size"])) for leaf, info in infos if info["type"] == "file"]
        return sorted((entry for entry in entries if TEMPORARY not in entry.name), key=lambda entry: entry.name)

    def scan(self, folder: str) -> dict[str, bool]:
        """The names in a folder, and which are folders."""
        return {leaf: info["type"] == "directory" for leaf, info in self._entries(folder).items()}

    def below(self, folder: str) -> "RemoteLocation":
        """A folder in this folder that is known to exist, over the same connections."""
        other = copy.copy(self)
        other._backend = self._backend.below(folder) if folder else self._backend
        other.url = other._backend.url
        return other

    def remove(self, name: str) -> None:
        path = self._path(name)

        def operation(system: Any) -> None:
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(path)

        self._backend.run("remove", name, operation)

    def remove_leftovers(self, folder: str) -> None:
        path = self._backend.path(folder and check_name(folder))

        def remove_old(system: Any) -> None:
            for leaf, info in self._ls(system, path).items():
                if TEMPORARY in leaf and info["type"] == "file":
                    with contextlib.suppress(FileNotFoundError):
                        modified = system.modified(info["name"])
                        aware = modified if modified.tzinfo else modified.replace(tzinfo=timezone.utc)
                        if (datetime.now(timezone.utc) - aware).total_seconds() > LEFTOVER_SECONDS:
                            system.rm_file(info["name"])

        def abort(system: Any) -> None:
            with contextlib.suppress(Exception):  # a writer need not have the right to list uploads
                _abort(system, f"{path}/")

        self._backend.run("clean", folder, abort if self._backend.kind.atomic else remove_old)

    @property
    def lock_domain(self) -> str:
        status = _lock_folder().stat()
        return f"{status.st_dev}:{status.st_ino}"

    def lock(self, name: str) -> Lock | None:
        return LocalLocation(_lock_folder()).lock(self._lock_file(name))

    def is_locked(self, name: str) -> bool:
        return LocalLocation(_lock_folder()).is_locked(self._lock_file(name))

    def _lock_file(self, name: str) -> str:
        return sha256_digest(f"{self.url}/{check_name(name)}".encode())[:32]

    def _path(self, name: str) -> str:
        return self._backend.path(check_name(name))

    def _entries(self, folder: str) -> dict[str, dict[str, Any]]:
        path = self._backend.path(folder)
        return self._backend.run("list", folder, lambda system: self._ls(system, path))

    def _ls(self, system: Any, path: str) -> dict[str, dict[str, Any]]:
        """Name -> fsspec's entry of everything directly in a folder; without the marker object of the folder itself."""
        system.invalidate_cache()
        try:
            objects = system.ls(path, detail=True)
        except FileNotFoundError:
            self._backend.check_bucket(system)
            return {}
        names = ((str(info["name"]).rstrip("/").rpartition("/"), info) for info in objects)
        return {leaf: info for (parent, _, leaf), info in names if leaf and parent.strip("/") == path.strip("/")}

    def _read(self, system: Any, path: str, count: int) -> bytes | None:
        try:
            try:
                data: bytes = system.cat_file(path, start=0, end=count)
            except FileNotFoundError:
                raise
            except Exception:
                if system.info(path)["size"]:  # an empty object has no range, which most stores answer with an error
                    raise
                return b""
        except FileNotFoundError:
            self._backend.check_bucket(system)
            return None
        return data


def _upload(system: Any, path: str, content: bytes | Path, size: int) -> None:
    try:
        if isinstance(content, Path):
            system.put_file(str(content), path, **write_timeout(system, size))
        else:
            system.pipe_file(path, content, **write_timeout(system, size))
    except BaseException:
        with contextlib.suppress(Exception):
            _abort(system, path)
        raise


def _abort(system: Any, path: str) -> None:
    """Abort the unfinished uploads of an object, or of all objects directly in a folder (a path that ends in ``/``).

    An S3 store keeps, and charges for, the parts of an upload that was cancelled or whose process was killed.
    """
    if not hasattr(system, "call_s3"):
        return
    bucket, key, _ = system.split_path(path)
    key = f"{key.rstrip('/')}/" if path.endswith("/") else key
    for upload in system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads", []):
        rest = upload["Key"].removeprefix(key)
        if not rest or (key.endswith("/") and "/" not in rest):
            system.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _write_and_rename(system: Any, path: str, content: bytes | Path, size: int) -> None:
    """Write under a temporary name and rename, for stores that show a file while it is being written."""
    temporary = f"{path}{TEMPORARY}{secrets.token_hex(6)}"
    try:
        try:
            _upload(system, temporary, content, size)
        except FileNotFoundError:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            _upload(system, temporary, content, size)
        system.mv(temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):
            system.rm_file(temporary)
        raise


@contextlib.contextmanager
def _spool(chunks: Iterable[Buffer]) -> Iterator[tuple[bytes | Path, int]]:
    """All chunks, as bytes or, beyond ``MEMORY_BYTES``, in a temporary file; with their size in bytes.

    They are collected before the upload starts, because a store may take an interrupted upload for a complete one.
    """
    memory = io.BytesIO()
    remaining = iter(chunks)
    for chunk in remaining:
        memory.write(chunk)
        if memory.tell() > MEMORY_BYTES:
            break
    else:
        yield memory.getvalue(), memory.tell()
        return
    try:
        with tempfile.NamedTemporaryFile(prefix="hydra-runner-") as file:
            for chunk in itertools.chain([memory.getbuffer()], remaining):
                file.write(chunk)
            file.flush()
            yield Path(file.name), file.tell()
    except OSError as error:
        raise StorageError(f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror}") from error


def _lock_folder() -> Path:
    """This user's folder for lock files. Raises StorageError for a folder that another user may have made."""
    path = Path(tempfile.gettempdir()) / f"hydra-runner-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise StorageError(f"cannot make {path}: {error.strerror}") from error
    if path.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StorageError(f"{path} is not this user's alone (owner, mode 0700); remove it or set TMPDIR")
    return path

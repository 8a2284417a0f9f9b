"""A location on a local or mounted disk: durable by fsync, locked by the kernel.

Every change is a short sequence of system calls through ``os``, so that tests can kill a process between any two.
"""

import contextlib
import errno
import fcntl
import io
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from runner.errors import StorageError
from runner.storage.location import Buffer, Entry, Lock, check_name

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
TEMPORARY = ".tmp-"
LEFTOVER_SECONDS = 3600.0


class LocalLocation:
    """A folder of this machine's file system; it is made when the first object is written."""

    part_bytes = 1 << 40  # never split: one file is as fast as several
    parallel_puts = 1
    beat_seconds = 1.0
    lock_domain = ""  # locks are in the folder itself

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.url = str(self.path)
        self._synced: set[Path] = set()  # folders in use, whose entries in their parents are durable

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        with self._errors("write", name):
            path = self._prepare(name)
            size = _write(path, chunks, durable=True)
            sync_folder(path.parent)
            return size

    def replace(self, name: str, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
        with self._errors("write", name):
            path = self._prepare(name) if durable else self._path(name)
            replace_file(path, chunks, durable=durable)
            if durable:
                sync_folder(path.parent)

    def journal(self, name: str) -> "LocalJournal":
        with self._errors("write", name):
            path = self._prepare(name)
            descriptor = os.open(path, _NEW, 0o644)
            sync_folder(path.parent)
        return LocalJournal(descriptor, f"{self.url}/{name}")

    def read(self, name: str, *, limit: int) -> bytes | None:
        with self._errors("read", name):
            try:
                file = _open(self._path(name))
            except FileNotFoundError:
                return None
            with file:
                # read(n) allocates n bytes, and the limit is far above the size of most objects.
                data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        if len(data) > limit:
            raise StorageError(f"cannot read {self.url}/{name}: more than the {limit} bytes such an object may have")
        return data

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        end = offset + sum(map(len, buffers))
        with self._errors("read", name), _open(self._path(name)) as file:
            file.seek(offset)
            if sum(map(file.readinto, buffers)) < end - offset:
                size = os.fstat(file.fileno()).st_size
                raise StorageError(f"cannot read {self.url}/{name}: it ends at byte {size}, {end} are needed")

    def list(self, folder: str) -> list[Entry]:
        with self._errors("list", folder):
            try:
                scan = os.scandir(self._path(folder) if folder else self.path)
            except FileNotFoundError:
                return []
            with scan:
                entries = []
                for entry in scan:
                    with contextlib.suppress(FileNotFoundError):  # removed since the scan began
                        if TEMPORARY not in entry.name and entry.is_file(follow_symlinks=False):
                            entries.append(Entry(entry.name, entry.stat(follow_symlinks=False).st_size))
        return sorted(entries, key=lambda entry: entry.name)

    def scan(self, folder: str) -> dict[str, bool] | None:
        """The names in a folder, and which are folders; None for a folder that cannot be read. Raises StorageError if
        this folder itself cannot.
        """
        try:
            with os.scandir(self.path / folder) as scan:
                return {entry.name: entry.is_dir(follow_symlinks=False) for entry in scan}
        except OSError as error:
            if not folder:
                raise StorageError(f"cannot list {self.url}: {error.strerror}") from error
            return {} if isinstance(error, FileNotFoundError) else None  # removed since the walk began

    def below(self, folder: str) -> "LocalLocation":
        """A folder in this folder."""
        return LocalLocation(self.path / folder)

    def remove(self, name: str) -> None:
        with self._errors("remove", name), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def remove_leftovers(self, folder: str) -> None:
        with self._errors("clean", folder), contextlib.suppress(FileNotFoundError):
            for path in (self._path(folder) if folder else self.path).glob(f"*{TEMPORARY}*"):
                status = path.lstat()
                if time.time() - status.st_mtime > LEFTOVER_SECONDS and not stat.S_ISDIR(status.st_mode):
                    os.unlink(path)

    def lock(self, name: str) -> Lock | None:
        with self._errors("lock", name):
            descriptor = os.open(self._prepare(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                return None
            return Lock(descriptor)

    def is_locked(self, name: str) -> bool:
        with self._errors("lock", name):
            try:
                file = _open(self._path(name))
            except FileNotFoundError:
                return False
            with file:
                try:  # shared: several processes may ask at the same time
                    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    return True
        return False

    def _path(self, name: str) -> Path:
        """The path of an object. Raises StorageError for a link on the way, which may lead out of this folder."""
        path = self.path
        for segment in check_name(name).split("/"):
            path /= segment
            if path.is_symlink():
                raise StorageError(f"{path} is a link; {self.url} must contain the file or folder itself")
        return path

    def sync_parents(self) -> None:
        """Make the entries of this folder and its parents durable: Hydra makes a run's folder without syncing it."""
        with self._errors("sync", ""):
            for folder in (self.path, *self.path.parents):
                if folder.is_mount():
                    break
                sync_folder(folder.parent, strict=False)

    def _prepare(self, name: str) -> Path:
        """The path of an object, in a folder that exists durably. A folder that exists already is synced once, too: its
        maker may have died before syncing it.
        """
        path = self._path(name)
        if path.parent in self._synced and path.parent.is_dir():
            return path
        # Of a run that somebody removed or moved, a write would make a folder again with little in it.
        if missing := [folder for folder in [*self._synced] if not folder.is_dir()]:
            raise FileNotFoundError(errno.ENOENT, f"{min(missing)} was there and is gone; it is not made again")
        unsure = [folder for folder in path.parents if self.path in folder.parents or not folder.is_dir()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in unsure:
            if folder not in self._synced:
                sync_folder(folder.parent)
        self._synced.update(unsure, [path.parent])
        return path

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _storage_error(f"cannot {verb} {self.url}/{name}".rstrip("/"), error) from error


class LocalJournal:
    """A file that grows. Appended data is in the page cache, and so survives the death of this process."""

    def __init__(self, descriptor: int, url: str) -> None:
        self._descriptor = descriptor
        self._url = url
        self._pending = b""
        self._writing = threading.Lock()  # two threads must not write the pending data twice

    def append(self, data: bytes) -> None:
        with self._writing:
            self._pending += data
            try:  # noqa: SIM105  (suppress() takes as long as the write, in each step)
                self._write()
            except OSError:  # the next call writes it
                pass

    def sync(self) -> None:
        try:
            with self._writing:
                self._write()
            os.fsync(self._descriptor)
        except OSError as error:
            raise _storage_error(f"cannot write {self._url}", error) from error

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._descriptor, self._pending) :]


def _storage_error(action: str, error: OSError) -> StorageError:
    """``action`` failed. A file that is too large stays so, unlike a full or absent disk."""
    if error.errno == errno.EFBIG:
        return StorageError(f"{action}: {error.strerror} (see ulimit -f)", kind=StorageError.LASTING)
    return StorageError(f"{action}: {error.strerror or error}")


def _open(path: Path) -> io.BufferedReader:
    """A regular file, open for reading. Raises OSError for anything else: opening a FIFO would block, and reading a
    device may have effects.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, "it is a FIFO, a socket or a device")
    return open(descriptor, "rb")


def _write(path: Path, chunks: Iterable[Buffer], *, durable: bool) -> int:
    """Write a new file and return its size. A failed write removes it, so that it takes no room on a full disk."""
    descriptor = os.open(path, _NEW, 0o644)
    size = 0
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while view.nbytes:
                count = os.write(descriptor, view)
                view = view[count:]
                size += count
        if durable:
            os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return size


def replace_file(path: Path, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
    """Write a file under a temporary name and rename it over ``path``. Its folder is still to be synced."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(6)}")
    _write(temporary, chunks, durable=durable)
    try:
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync_folder(folder: Path, *, strict: bool = True) -> None:
    """Make the entries of a folder durable. Without ``strict``, only errors of the disk (EIO) are raised."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if strict or error.errno == errno.EIO:
            raise

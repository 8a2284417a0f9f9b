"""Objects that grow on this machine and are uploaded as a whole, for stores that cannot append to objects."""

import re
import shutil
import tempfile
import threading
from pathlib import Path

from runner.errors import StorageError
from runner.storage.location import Location


class UploadedJournal:
    """A growing object in memory, uploaded as a whole by each ``sync``. Later data is lost with the process."""

    def __init__(self, location: Location, name: str) -> None:
        self._location = location
        self._name = name
        self._data = bytearray()
        self._synced = -1
        self._appending = threading.Lock()
        self._uploading = threading.Lock()

    def append(self, data: bytes) -> None:
        with self._appending:
            self._data += data

    def sync(self) -> None:
        with self._uploading:
            with self._appending:
                data = bytes(self._data)
            if len(data) != self._synced:
                self._location.replace(self._name, [data])
                self._synced = len(data)

    def close(self) -> None:
        pass


class UploadedFolder:
    """A temporary folder on this machine. Objects are named like its files, in lower case and with ``-`` in place of
    characters that names of objects may not have.
    """

    def __init__(self, location: Location, name: str) -> None:
        self.path = tempfile.mkdtemp(prefix="hydra-runner-")
        self._location = location
        self._name = name
        self._synced: dict[Path, tuple[int, int]] = {}

    def sync(self) -> None:
        for path in sorted(Path(self.path).rglob("*")):
            try:
                about = path.stat()
                # Before reading: what is written meanwhile is for the next time.
                mark = about.st_size, about.st_mtime_ns
                if path.is_file() and self._synced.get(path) != mark:
                    self._upload(path)
                    self._synced[path] = mark
            except OSError as error:
                raise StorageError(f"cannot read {path}: {error.strerror or error}") from error

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _upload(self, path: Path) -> None:
        parts = [_object_name(part) for part in path.relative_to(self.path).parts]
        with path.open("rb") as file:
            self._location.replace("/".join([self._name, *parts]), iter(lambda: file.read(1 << 20), b""))


def _object_name(file: str) -> str:
    return re.sub(r"[^a-z0-9._-]", "-", file.lower()).lstrip("._-") or "x"

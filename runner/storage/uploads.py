"""An object that grows on this machine and is uploaded as a whole, for stores that cannot append to objects."""

import threading

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

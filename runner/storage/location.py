"""The interface to a storage of bytes, with the guarantees that every implementation gives.

A name is a relative path of segments ``[a-z0-9][a-z0-9._-]*`` joined by ``/``, so nothing outside the location can be
named. No other package depends on the implementation.
"""

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runner.activity import doing
from runner.errors import ConfigError, StorageError
from runner.hashing import Buffer as Buffer

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]*")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL_FILES = "outputs/remote"
_USER = re.compile(r"(?<=://)[^/]*@")
_UNSAFE = re.compile(r"[^A-Za-z0-9._/=,+~-]|(?<=/)/|\.\.")
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::|[A-Za-z][A-Za-z0-9+.-]*://.*::")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing: its name within the listed folder and its size in bytes."""

    name: str
    size: int


class Lock:
    """A POSIX record lock, held until released or until the process that took it dies, however it dies. Unlike
    ``flock`` it is not inherited by forked data workers, which may outlive a killed parent by seconds and would keep
    the run locked.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)


class Journal(Protocol):
    """A new object that grows at its end. One thread may append while another makes it durable."""

    def append(self, data: bytes) -> None:
        """Add to the end. On a local disk the data survives the death of this process. Never raises and never waits for
        a network: data that cannot be written now is written with the next call.
        """

    def sync(self) -> None:
        """Make everything so far durable. Raises StorageError, after which it can be called again."""

    def close(self) -> None:
        """Close it. Data that was not synced may be lost."""


class Location(Protocol):
    """A folder of objects, local or remote. Every method may be called from any thread, and raises StorageError if the
    storage fails.

    The only requirement on a storage: once the write of an object has returned, everyone can read it and sees it in
    listings. It need not support exclusive creation, renaming or locks.
    """

    url: str
    part_bytes: int  # larger data is written as several objects of this size
    parallel_puts: int  # the number of objects that are written at the same time
    beat_seconds: float  # the interval of heartbeats: other machines notice a death after three of them

    @property
    def lock_domain(self) -> str:
        """Two processes of a machine see each other's locks if and only if this is equal."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        """Write a new object and return its size; durable, and visible to every reader, once this returns.

        Every name is used once, so a put may be repeated with the same bytes. A put that failed or was killed may leave
        an incomplete object of that name: readers must detect that, by a checksum or a size.
        """

    def replace(self, name: str, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
        """Write an object, or replace an older one atomically: a reader sees either the old or the new one.

        Without ``durable`` a local location neither syncs nor makes a folder: a missing folder is an error.
        """

    def journal(self, name: str) -> Journal:
        """Begin an object that grows. Its name is used once."""

    def read(self, name: str, *, limit: int) -> bytes | None:
        """The bytes of an object of at most ``limit`` bytes; None if there is no such object."""

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from ``offset`` on; an object that ends earlier is an error."""

    def list(self, folder: str) -> list[Entry]:
        """The objects directly in ``folder``, sorted by name, never from a cache; empty if there is no such folder."""

    def remove(self, name: str) -> None:
        """Remove one object; no error if it does not exist."""

    def remove_leftovers(self, folder: str) -> None:
        """Remove temporary files in ``folder`` that are more than an hour old, and all unfinished uploads. Only for the
        process that owns the folder, before it writes there.
        """

    def lock(self, name: str) -> Lock | None:
        """Take a lock among the processes of this machine; None while another process has it. Does not wait."""

    def is_locked(self, name: str) -> bool:
        """Whether another process of this machine has the lock. Changes nothing."""


def check_name(name: str) -> str:
    """``name`` if it stays inside its location, else StorageError: it may come from a manifest of unknown origin."""
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise StorageError(
            f"not a name of an object: {name[:200]!r}; segments are lower-case letters, digits, '.', '_', '-'"
        )
    return name


def protocol(url: str) -> str:
    """The kind of store that a path or URL names, ``file`` for this machine. Raises ConfigError for a chained URL."""
    if _CHAIN.match(url):
        chain = "::".join(link.partition("://")[0] for link in url.split("::"))
        raise ConfigError(f"run.root={chain}://...: runs cannot be stored at a chained URL; give the store's own URL")
    match = _URL.match(url)
    kind = match[1].lower() if match else "file"
    return "file" if kind == "local" else kind


def is_remote(url: str) -> bool:
    """Whether a path or URL names a store other than this machine's disks. Raises ConfigError for a chained URL."""
    return protocol(url) != "file"


def local_root(root: str) -> str:
    """``root`` as a path of this machine, also ``~/...``. Raises ConfigError for a URL of another store, or none."""
    if is_remote(root):
        raise ConfigError(f"run.root={protocol(root)}://...: a path of this machine is needed, like run.root=outputs")
    if not root:
        raise ConfigError("run.root is empty; is the variable for it empty?")
    match = _URL.match(root)
    return os.path.expanduser(root[match.end() :] if match else root)


def local_folder(root: str) -> str:
    """A local root itself; for a remote root a folder of this machine, named after it."""
    if is_remote(root):
        return f"{_LOCAL_FILES}/{_UNSAFE.sub('_', _USER.sub('', root).replace('://', '/'))}"
    return local_root(root)


class BufferedJournal:
    """A journal in memory, of which each ``sync`` writes the whole object. The rest dies with the process."""

    def __init__(self, location: Location, name: str) -> None:
        self._location, self._name = location, name
        self._data = bytearray()
        self._synced_bytes = 0
        self._append_lock = threading.Lock()
        self._sync_lock = threading.Lock()

    def append(self, data: bytes) -> None:
        with self._append_lock:
            self._data += data

    def sync(self) -> None:
        with self._sync_lock:
            with self._append_lock:
                data = bytes(self._data)
            if len(data) != self._synced_bytes:
                self._location.replace(self._name, [data])
                self._synced_bytes = len(data)

    def close(self) -> None:
        pass


class JournalChain:
    """A growing record in several journals, one after the other, so that none grows without end. ``make`` makes a
    journal of a name.

    ``size`` is the number of bytes appended to the last journal since it was begun. One thread may call ``flush`` while
    another calls ``begin`` and ``append``.
    """

    def __init__(self, make: Callable[[str], Journal]) -> None:
        self.size = 0
        self._make = make
        self._open: deque[Journal] = deque()  # the last journal grows; earlier journals wait to be flushed

    @doing("saves")
    def begin(self, name: str, head: bytes) -> None:
        """Start a new journal with ``head``. If this raises StorageError, ``append`` continues with the last one."""
        journal = self._make(name)
        journal.append(head)
        self._open.append(journal)
        self.size = 0

    def append(self, data: bytes) -> None:
        """Add to the last journal; never raises, as ``Journal.append``."""
        self._open[-1].append(data)
        self.size += len(data)

    @doing("saves")
    def flush(self) -> None:
        """Make everything so far durable. Raises StorageError, after which it can be called again."""
        while len(self._open) > 1:
            self._open[0].sync()
            self._open.popleft().close()
        self._open[0].sync()

    def close(self) -> None:
        """Close all journals. Data that was not flushed may be lost."""
        while self._open:
            self._open.popleft().close()

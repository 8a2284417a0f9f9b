"""The one interface between the runner and a place that keeps bytes, with its promises.

A name is a relative path of segments ``[a-z0-9][a-z0-9._-]*`` joined by ``/``; nothing above or beside the location can
be named. Every implementation keeps the promises below, so nothing above this package asks which one it has.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runner.errors import ConfigError, StorageError

Buffer = bytes | bytearray | memoryview

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]*")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::|[A-Za-z][A-Za-z0-9+.-]*://.*::")
_LOCAL = {"file", "local"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing: its name within the listed folder and its size in bytes."""

    name: str
    size: int


class Lock(Protocol):
    """Held until released or until the process that took it dies, however it dies."""

    def release(self) -> None:
        """Give the lock back."""


class Journal(Protocol):
    """A new object that grows at its end. One thread may append while another makes it durable."""

    def append(self, data: bytes) -> None:
        """Add to the end; survives the death of this process where the storage can do that. Never fails and never
        waits for a network: what cannot be written now is tried again later.
        """

    def sync(self) -> None:
        """Make everything so far durable. Raises StorageError; it can be tried again."""

    def close(self) -> None:
        """Let go of it, without a promise for what was not synced."""


class Folder(Protocol):
    """A folder of this machine for a library that writes files of its own (TensorBoard)."""

    path: str

    def sync(self) -> None:
        """Bring every file that changed to the location, whole. Raises StorageError; it can be tried again."""

    def close(self) -> None:
        """Let go of it, without a promise for what was not synced."""


class Location(Protocol):
    """A folder of objects, local or remote. Every verb raises StorageError when the storage refuses, and may be called
    from any thread.

    All that is asked of a storage is this: an object whose write returned can be read and is in every listing after it,
    by anyone. Nothing asks it to create exclusively, to rename or to lock.
    """

    url: str
    part_bytes: int  # what is larger than this is better written as several objects
    parallel: int  # how many of them at a time
    beat_seconds: float  # how often a process that works here shows that it lives

    @property
    def locks(self) -> str:
        """Where the locks are: of two processes of a machine that differ in this, neither sees the other's."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        """Write a new object and return its size; durable, and visible to every reader, once this returns.

        For names that are used once: it may be repeated with the same bytes. A failed put leaves no object that it did
        not complete, or an incomplete one of that same name: readers must be able to tell (a seal, a size).
        """

    def replace(self, name: str, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
        """Write an object whole, over an older one if there is one: a reader sees the one or the other."""

    def journal(self, name: str) -> Journal:
        """Begin an object that grows; its name is used once."""

    def folder(self, name: str) -> Folder:
        """A folder of this machine whose files become objects in folder ``name``."""

    def read(self, name: str, *, limit: int) -> bytes | None:
        """The bytes of an object of at most ``limit`` bytes; None if there is no such object."""

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from ``offset`` on; an object that ends before is an error."""

    def list(self, folder: str) -> list[Entry]:
        """The objects directly in ``folder`` in order of name, never from a cache; empty if there is no such folder."""

    def remove(self, name: str) -> None:
        """Remove one object; one that is not there is as good as removed."""

    def sweep(self, folder: str) -> None:
        """Remove what writes into ``folder`` left behind when they died, an hour or more ago. Never an object."""

    def lock(self, name: str) -> Lock | None:
        """Take the lock of that name among the processes of this machine, or return None while another has it."""

    def locked(self, name: str) -> bool:
        """Whether another process of this machine has the lock of that name. Changes nothing."""


def check_name(name: str) -> str:
    """``name`` if it stays inside its location, else StorageError: names may come from someone else's run directory."""
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise StorageError(f"not a name of an object: {name!r}; segments are lower-case letters, digits, '.', '_', '-'")
    return name


def protocol(url: str) -> str:
    """The kind of store that a path or URL names, ``file`` for this machine. Raises ConfigError for a chained URL."""
    if _CHAIN.match(url):
        chain = "::".join(link.partition("://")[0] for link in url.split("::"))
        raise ConfigError(f"run.root={chain}://...: a chained URL is no place for runs; give the store's own URL")
    found = _URL.match(url)
    kind = found[1].lower() if found else "file"
    return "file" if kind in _LOCAL else kind


def is_remote(url: str) -> bool:
    """Whether a path or URL names a store other than this machine's disks. Raises ConfigError for a chained URL."""
    return protocol(url) != "file"


def local_root(root: str) -> str:
    """``root`` as a path of this machine, also ``~/...``. Raises ConfigError for a URL of another store."""
    if is_remote(root):
        raise ConfigError(f"run.root={protocol(root)}://...: a path of this machine is needed, like run.root=outputs")
    found = _URL.match(root)
    return os.path.expanduser(root[found.end() :] if found else root)

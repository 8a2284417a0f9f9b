"""Where bytes live. Knows nothing of runs or checkpoints."""

from collections.abc import Mapping
from typing import Any

from runner.storage import local
from runner.storage.local import LocalLocation
from runner.storage.location import Location, is_remote, local_root

__all__ = ["LocalLocation", "find_folders", "is_remote", "open_location"]


def open_location(url: str, options: Mapping[str, Any] | None = None) -> Location:
    """The location that a path or URL names; nothing is made or read. Raises ConfigError for a store it cannot use.

    ``options`` are fsspec's for a URL: credentials, endpoints.
    """
    if is_remote(url):
        from runner.storage.remote import RemoteLocation  # imports fsspec, which a run on a disk may not need

        return RemoteLocation(url, options or {})
    return LocalLocation(local_root(url))


def find_folders(url: str, marker: str, options: Mapping[str, Any] | None = None) -> Mapping[str, Location]:
    """The folders under ``url`` that hold an object called ``marker``, by their relative paths, in order; none lies in
    another, and those of a store share their connections.

    Raises StorageError where a disk has no such folder; a store cannot tell one from an empty one.
    """
    if is_remote(url):
        from runner.storage import remote

        return remote.find_folders(url, marker, options or {})
    return local.find_folders(local_root(url), marker)

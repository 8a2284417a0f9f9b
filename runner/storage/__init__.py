"""Where bytes live. Knows nothing of runs or checkpoints."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runner.storage.local import LocalLocation
from runner.storage.location import Location, is_remote, local_root

__all__ = ["LocalLocation", "find_folders", "is_remote", "open_location"]

_LISTERS = 8


def open_location(url: str, options: Mapping[str, Any] | None = None) -> Location:
    """The location at a path or URL, with fsspec's ``options``. Connects to nothing yet. Raises ConfigError."""
    if is_remote(url):
        from runner.storage.remote import RemoteLocation

        return RemoteLocation(url, options or {})
    return LocalLocation(local_root(url))


def find_folders(
    url: str, marker: str, options: Mapping[str, Any] | None = None, *, own: Collection[str] = ()
) -> Mapping[str, Location]:
    """The folders under ``url`` that contain an object called ``marker``: relative path -> location, sorted.

    On a disk the result has folders that this user may not read, too: they may be matches. In a match, folders whose
    names are in ``own`` are not searched. Locations of a remote store share their connections.

    Raises StorageError if a local ``url`` does not exist; a remote one without objects counts as empty.
    """
    root: Any = open_location(url, options)
    matches: list[str] = []
    level = [""]
    with ThreadPoolExecutor(_LISTERS) as pool:
        while level:  # no recursion: folders may be nested deeper than Python's limit
            listings = [*zip(level, (pool.map if is_remote(url) else map)(root.scan, level), strict=True)]
            matches += [folder for folder, names in listings if names is None or marker in names]
            level = [
                f"{folder}/{name}" if folder else name
                for folder, names in listings
                for name, is_folder in (names or {}).items()
                if is_folder and (marker not in names or name not in own)
            ]
    return {folder or ".": root.below(folder) for folder in sorted(matches, key=lambda folder: folder or ".")}

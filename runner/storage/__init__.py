"""Where bytes live. Knows nothing of runs or checkpoints."""

from runner.storage import local
from runner.storage.local import LocalLocation
from runner.storage.location import Location, local_root


def open_location(url: str) -> Location:
    """The location that a path or URL names; nothing is made or read. Raises ConfigError for a store it cannot use."""
    return LocalLocation(local_root(url))


def find_folders(url: str, marker: str) -> list[str]:
    """The folders under ``url`` that hold an object called ``marker``, as relative paths; none lies in another."""
    return local.find_folders(local_root(url), marker)

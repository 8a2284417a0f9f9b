"""Where bytes live. Knows nothing of runs or checkpoints."""

from runner.storage.local import LocalLocation
from runner.storage.location import Location, local_root


def open_location(url: str) -> Location:
    """The location that a path or URL names; nothing is made or read. Raises ConfigError for a store it cannot use."""
    return LocalLocation(local_root(url))

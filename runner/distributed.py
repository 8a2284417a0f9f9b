"""Which of how many processes this is. Reads the environment of a launcher; imports nothing of torch."""

import os
from dataclasses import dataclass

from runner.errors import ConfigError


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``; a global batch is dealt out by ``rank``."""

    rank: int = 0
    size: int = 1


def world() -> World:
    """The world this process was started in.

    Raises ConfigError under a launcher of several processes: they would all train the same run.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != 1:
        raise ConfigError(
            f"WORLD_SIZE={size}: this version trains a run in one process. "
            "Start it without torchrun, or unset WORLD_SIZE; a sweep (-m) runs several runs."
        )
    return World()

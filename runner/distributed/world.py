"""Which of how many processes this is. Reads the environment of a launcher; imports nothing of torch."""

import os
from dataclasses import dataclass

from runner.errors import ConfigError


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``; a global batch is dealt out by ``rank``. ``local_rank`` counts on one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of a world find each other: a store at ``host`` and ``port``.

    ``kept`` says that the launcher keeps it, over the lives of all processes; else rank 0 does. ``restart`` counts the
    lives, so that nobody takes a message of the last one for its own.
    """

    host: str
    port: int
    kept: bool
    restart: int


def world() -> World:
    """The world this process was started in. Raises ConfigError for an environment that names no such world."""
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size}: a rank is below the size of its world. {_REMEDY}")
    return World(rank, size, _number("LOCAL_RANK", rank))


def meeting() -> Meeting:
    """Where to meet the others. Raises ConfigError where the environment does not say it."""
    host = os.environ.get("MASTER_ADDR")
    if not host or "MASTER_PORT" not in os.environ or "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE={world().size} without RANK, MASTER_ADDR and MASTER_PORT. {_REMEDY}")
    return Meeting(
        host,
        _number("MASTER_PORT", 0),
        kept=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart=_number("TORCHELASTIC_RESTART_COUNT", 0),
    )


_REMEDY = "Start it with torchrun, which sets all of them, or unset WORLD_SIZE for one process."


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}={value} is not a number. {_REMEDY}")
    return int(value)

"""Which of how many processes this is. Reads the environment of a launcher; imports nothing of torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from runner.errors import ConfigError

_PORTS = range(15_000, 29_000)  # one for each job of Slurm, in turn; below those that systems give to connections
_REMEDY = "Start it with torchrun or srun, which set all of them, or unset WORLD_SIZE for one process."


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``; a global batch is dealt out by ``rank``. ``local_rank`` counts on one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the processes of a world find each other: a store at ``host`` and ``port``.

    ``kept`` says that the launcher keeps it, over the lives of all processes; else rank 0 does. ``restart`` counts the
    lives, so that nobody takes a message of the last one for its own.
    """

    host: str
    port: int
    served_by_launcher: bool
    restart: int


def world() -> World:
    """The world this process was started in. Raises ConfigError for an environment that names no such world."""
    said = _environment()
    size, rank = _number(said, "WORLD_SIZE", 1), _number(said, "RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size}: a rank is below the size of its world. {_REMEDY}")
    return World(rank, size, _number(said, "LOCAL_RANK", rank))


def rendezvous() -> Rendezvous:
    """Where to meet the others. Raises ConfigError where the environment does not say it."""
    said = _environment()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not said.get(name)]
    if missing:
        raise ConfigError(f"WORLD_SIZE={said.get('WORLD_SIZE')} without {', '.join(missing)}. {_REMEDY}")
    served_by_launcher = said.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = _number(said, "TORCHELASTIC_RESTART_COUNT", 0)
    return Rendezvous(said["MASTER_ADDR"], _number(said, "MASTER_PORT", 0), served_by_launcher, restart)


def _environment() -> Mapping[str, str]:
    """The environment, or what torchrun would have said where Slurm has started the tasks of a step."""
    here = os.environ
    if "WORLD_SIZE" in here or _number(here, "SLURM_STEP_NUM_TASKS", 1) == 1 or "SLURM_PROCID" not in here:
        return here
    job = _number(here, "SLURM_JOB_ID", 0)
    return {
        "RANK": here["SLURM_PROCID"],
        "LOCAL_RANK": here.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": here["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(here.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": str(_PORTS[job % len(_PORTS)]),
        "TORCHELASTIC_RESTART_COUNT": here.get("SLURM_RESTART_COUNT", "0"),
    }


def first_host(hosts: str) -> str:
    """The first of a list as Slurm has it: ``a`` of ``a,b``, ``node07`` of ``node[07-09,12]``."""
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,]*))?", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts


def _number(said: Mapping[str, str], name: str, default: int) -> int:
    value = said.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}={value} is not a number. {_REMEDY}")
    return int(value)

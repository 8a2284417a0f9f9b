"""The place of this process in a run, from the environment that torchrun or Slurm sets. Imports nothing of torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from runner.errors import ConfigError

_PORTS = range(15_000, 29_000)  # a Slurm job takes one by its number; Linux itself hands out ports from 32768 on
_REMEDY = "Start it with torchrun or srun, which set all of them, or unset WORLD_SIZE for one process."


@dataclass(frozen=True, slots=True)
class World:
    """The place of one process: its ``rank`` among ``size`` processes, and its ``local_rank`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The key-value store by which the processes find each other."""

    host: str
    port: int
    launcher_serves: bool  # then the store outlives the processes; else rank 0 serves it
    restart: int  # how often the launcher restarted the processes, which read no messages from before a restart


def world() -> World:
    """The place of this process. Raises ConfigError for environment variables that contradict each other."""
    environ = _environment()
    size, rank = _number(environ, "WORLD_SIZE", 1), _number(environ, "RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size}: a rank is a number below WORLD_SIZE. {_REMEDY}")
    return World(rank, size, _number(environ, "LOCAL_RANK", rank))


def local_size() -> int:
    """The number of processes of this run on this machine; of all its processes if no variable says it."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # for example 4(x2),3
    most = max(map(int, re.findall(r"(?<![(\dx])\d+", tasks)), default=_number(_environment(), "WORLD_SIZE", 1))
    return max(1, _number(os.environ, "LOCAL_WORLD_SIZE", most))


def rendezvous() -> Rendezvous:
    """Where to find the other processes. Raises ConfigError for missing environment variables."""
    environ = _environment()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise ConfigError(f"WORLD_SIZE={environ.get('WORLD_SIZE')} without {', '.join(missing)}. {_REMEDY}")
    launcher_serves = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = _number(environ, "TORCHELASTIC_RESTART_COUNT", 0)
    return Rendezvous(environ["MASTER_ADDR"], _number(environ, "MASTER_PORT", 0), launcher_serves, restart)


def _environment() -> Mapping[str, str]:
    """The environment; for a task that Slurm started, with the variables that torchrun would have set."""
    env = os.environ
    if "WORLD_SIZE" in env or _number(env, "SLURM_STEP_NUM_TASKS", 1) == 1 or "SLURM_PROCID" not in env:
        return env
    job = _number(env, "SLURM_JOB_ID", 0)
    port, host = str(_PORTS[job % len(_PORTS)]), first_host(env.get("SLURM_STEP_NODELIST", ""))
    values = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"]}
    values |= {"LOCAL_RANK": env.get("SLURM_LOCALID", "0"), "MASTER_ADDR": host, "MASTER_PORT": port}
    return values | {"TORCHELASTIC_RESTART_COUNT": env.get("SLURM_RESTART_COUNT", "0")}


def first_host(hosts: str) -> str:
    """The first host of a Slurm node list: ``a`` of ``a,b``, ``node07`` of ``node[07-09,12]``."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,]*))?", hosts)
    return "".join(part or "" for part in match.groups()) if match else hosts


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}={value} is not a number. {_REMEDY}")
    return int(value)

"""The cores and memory that this process may use, which a container, a scheduler or an affinity mask may limit."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_SHARED_MEMORY = "dev/shm"
_UNLIMITED = 1 << 60  # bytes; version 1 of cgroups writes a number near 2^63 where there is no limit


def cores(root: Path = _ROOT) -> float:
    """Cores for this process, by its affinity mask and the quotas of its cgroups; at least 0.1."""
    count = getattr(os, "process_cpu_count", os.cpu_count)() or 1  # the first is new in Python 3.13
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    quotas = [float(count)]
    for group in _cgroups(root):
        with suppress(OSError, ValueError, ZeroDivisionError):  # "max": no quota
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas += [int(quota) / int(period)] if int(quota) > 0 else []
    return max(0.1, min(quotas))


def free_memory(root: Path = _ROOT) -> float:
    """Bytes of memory that are free for this process; infinity if the system does not tell."""
    free = [float("inf")]
    with suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text()
        free.append(1024 * float(text.partition("MemAvailable:")[2].split()[0]))
    for group in _cgroups(root):
        for limit, usage in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with suppress(OSError, ValueError):  # "max": no limit
                most = int((group / f"memory.{limit}").read_text())
                if most < _UNLIMITED:
                    free.append(max(0, most - int((group / f"memory.{usage}").read_text()) + _cache(group)))
    return min(free)


def free_shared_memory(root: Path = _ROOT) -> float:
    """Free bytes of the shared memory in which workers send batches, which is small in containers."""
    try:
        return float(shutil.disk_usage(root / _SHARED_MEMORY).free)
    except OSError:
        return float("inf")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for the data workers of one process. ``fit(n)`` is the largest useful number of workers up to n;
    ``seconds`` are the lengths of the first measurement and of the longest; ``timeout`` is the longest step in seconds.
    """

    cores: float
    free_memory: Callable[[], float] = free_memory
    free_shared_memory: Callable[[], float] = free_shared_memory
    fit: Callable[[int], int] = lambda number: number
    seconds: tuple[float, float] = (0.5, 10.0)
    timeout: float = float("inf")


def _cache(group: Path) -> int:
    """Bytes of a group in the page cache, which the system frees when memory is short."""
    with suppress(OSError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(size)
    return 0


def _cgroups(root: Path) -> list[Path]:
    """The folders of this process's control groups and of their parents, in both versions of cgroups."""
    base, folders = root / "sys/fs/cgroup", []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for top in [base, *(base / each for each in {controllers, *controllers.split(",")} if each)]:
                group = Path(path.lstrip("/"))
                folders += [top / each for each in (group, *group.parents)]
    return list(dict.fromkeys([*folders, base]))  # a container may see its own group as the root

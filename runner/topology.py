"""What the exact results of a run depend on besides its configuration: hardware, library versions, threads.

Recorded with every attempt, so that a resume under other conditions can say what changed.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# A difference in one of these may change float results; the others are recorded for people.
_BITWISE = (
    "python",
    "torch",
    "numpy",
    "machine",
    "cpu_capability",
    "threads",
    "device",
    "processes",
    "parallel",
    "compiled",
    "gpus",
    "cuda",
    "deterministic",
)


def describe(device: torch.device, processes: int, parallel: str, *, compiled: bool) -> dict[str, Any]:
    """The topology of a run's processes, as plain JSON values. Call it after threads and device were set."""
    on_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": processes,
        "parallel": parallel if processes > 1 else None,
        "compiled": compiled,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_cuda else [],
        "cuda": torch.version.cuda if on_cuda else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git": _git_revision(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed since another attempt that floats may depend on, as ``name before -> now``."""
    before = {"processes": 1, "compiled": False, **before}
    return [f"{key} {before.get(key)} -> {now.get(key)}" for key in _BITWISE if before.get(key) != now.get(key)]


def _git_revision() -> str | None:
    """The revision of the working directory's repository, ``-dirty`` with uncommitted changes; None outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()

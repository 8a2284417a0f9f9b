"""The device, the number of threads and the determinism of this process.

And its topology: hardware, library versions and threads, on which exact results depend besides the configuration. It is
recorded with every attempt, so that a resume under other conditions can say what changed.
"""

import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from runner.config.schema import Config
from runner.distributed.world import World
from runner.errors import ConfigError


def set_up_device(config: Config, world: World) -> torch.device:
    """Apply ``runtime.device``, ``num_threads`` and ``deterministic`` to this process, and return its device.

    Raises ConfigError for a device that this machine does not have.
    """
    device = torch.device(choose_device(config.runtime.device, world, torch.cuda.device_count()))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events record on the current device, not on that of a tensor
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    if config.runtime.deterministic:
        # Not use_deterministic_algorithms(): that imports the compiler, which takes a second and a half.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
    else:
        torch.set_deterministic_debug_mode("default")
    if config.runtime.compile:
        from torch._inductor import config as compiler

        if hasattr(compiler, "deterministic"):  # since torch 2.10
            compiler.deterministic = config.runtime.deterministic
    return device


def choose_device(name: str, world: World, visible: int) -> str:
    """The device of this process for ``runtime.device=name``, with ``visible`` CUDA devices.

    Each process of a machine has the device of its local rank, unless the launcher makes a single device visible to it.
    Raises ConfigError.
    """
    try:
        device = torch.device(("cuda" if visible else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device={name}: {error}") from error
    rank = world.local_rank if world.size > 1 else 0
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ConfigError(f"runtime.device={name}: exact resuming is built for cpu and cuda; use one of them")
    if device.index is not None and rank > 0:
        remedy = "with runtime.device=cuda each process has its own"
        raise ConfigError(
            f"runtime.device={name} is one device, and this is process {rank + 1} of its machine; {remedy}"
        )
    index = device.index if device.index is not None else rank if visible > 1 else 0
    if index >= visible:
        raise ConfigError(
            f"runtime.device={name}: this machine shows {visible} CUDA devices to torch {torch.__version__}, and this "
            f"process needs cuda:{index}; start one process for each device, or use runtime.device=auto or cpu"
        )
    return f"cuda:{index}"


_FOR_PEOPLE = {"cpus"}  # facts that do not change float results


def topology(config: Config, device: torch.device, processes: int) -> dict[str, Any]:
    """The topology of a run's processes, as plain JSON values. Call it after threads and device were set."""
    on_cuda, runtime = device.type == "cuda", config.runtime
    parallel = runtime.parallel.name + ("" if runtime.shard is None else f", {runtime.shard} slices")
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
        "compiled": runtime.compile,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_cuda else [],
        "cuda": torch.version.cuda if on_cuda else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def topology_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The changes since another attempt on which float results may depend, as ``name before -> now``."""
    before = {"processes": 1, "compiled": False, **before}
    keys = [key for key in now if key not in _FOR_PEOPLE and before.get(key) != now[key]]
    return [f"{key} {before.get(key)} -> {now[key]}" for key in keys]

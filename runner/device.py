"""The device of this process, its threads, and determinism."""

import os

import torch

from runner.config.schema import Config
from runner.distributed.world import World
from runner.errors import ConfigError


def set_up_device(config: Config, world: World) -> torch.device:
    """Set device, number of threads and determinism for this process, and return the device to train on. Raises
    ConfigError for a device that this machine does not have.
    """
    device = torch.device(choose_device(config.runtime.device, world, torch.cuda.device_count()))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events are those of the current device, wherever a tensor is
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
    """The device of this process for ``runtime.device``, of so many CUDA devices as it sees: each process of a machine
    has its own, by its number there, unless a launcher shows it a single one. Raises ConfigError.
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
        raise ConfigError(
            f"runtime.device={name} is one device, and this is process {rank + 1} of its machine; with "
            "runtime.device=cuda each process has its own"
        )
    index = device.index if device.index is not None else rank if visible > 1 else 0
    if index >= visible:
        raise ConfigError(
            f"runtime.device={name}: this machine shows {visible} CUDA devices to torch {torch.__version__}, and this "
            f"process needs cuda:{index}; start one process for each device, or use runtime.device=auto or cpu"
        )
    return f"cuda:{index}"

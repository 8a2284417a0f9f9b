"""The device of a process, and what is set before anything else."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from defaults import configured as default_config
from omegaconf import OmegaConf

from runner.device import choose_device, set_up_device
from runner.distributed.world import World
from runner.errors import ConfigError


@pytest.fixture(autouse=True)
def _default() -> Iterator[None]:
    """Nothing that is set here reaches another test."""
    threads = torch.get_num_threads()
    yield
    torch.set_deterministic_debug_mode("default")
    torch.set_num_threads(threads)


def configured(*overrides: str) -> Any:
    return default_config(OmegaConf.from_dotlist([*overrides]))


@pytest.mark.parametrize(
    ("name", "world", "visible", "device"),
    [
        ("auto", World(), 0, "cpu"),
        ("auto", World(1, 4, 1), 0, "cpu"),
        ("cpu", World(3, 4, 3), 4, "cpu"),
        ("auto", World(), 4, "cuda:0"),
        ("cuda", World(), 1, "cuda:0"),
        ("cuda:1", World(), 2, "cuda:1"),
        ("cuda", World(0, 1, 3), 4, "cuda:0"),  # LOCAL_RANK is left over from something else
        ("auto", World(6, 8, 2), 4, "cuda:2"),
        ("cuda", World(1, 2, 1), 2, "cuda:1"),
        ("cuda", World(5, 8, 1), 1, "cuda:0"),  # Slurm with gpus_per_task=1 shows each task its own
        ("auto", World(1, 2, 1), 1, "cuda:0"),
        ("cuda:1", World(1, 2, 0), 2, "cuda:1"),  # one process on each of two machines
    ],
)
def test_a_process_has_its_own_device(name: str, world: World, visible: int, device: str) -> None:
    assert choose_device(name, world, visible) == device


@pytest.mark.parametrize(
    ("name", "world", "visible", "message"),
    [
        ("cuda", World(), 0, "this machine shows 0 CUDA devices"),
        ("cuda:2", World(), 2, "shows 2 CUDA devices .* needs cuda:2"),
        ("cuda", World(3, 4, 3), 2, "shows 2 CUDA devices .* needs cuda:3; start one process for each device"),
        ("cuda:1", World(1, 2, 1), 2, "runtime.device=cuda:1 is one device, and this is process 2 of its machine"),
        ("mps", World(), 0, "exact resuming is built for cpu and cuda"),
        ("graphics", World(), 0, "runtime.device=graphics: "),
    ],
)
def test_a_device_that_cannot_be_is_refused(name: str, world: World, visible: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_device(name, world, visible)


def test_the_device_is_set_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the events that say that a copy has arrived are recorded on another device."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    assert set_up_device(configured("runtime.device=cuda:1"), World()) == torch.device("cuda:1")
    assert set_up_device(configured("runtime.device=cuda"), World(1, 2, 1)) == torch.device("cuda:1")
    assert set_up_device(configured("runtime.device=cuda"), World()) == torch.device("cuda:0")
    assert devices == [torch.device("cuda:1"), torch.device("cuda:1"), torch.device("cuda:0")]


def test_the_compiler_is_as_deterministic_as_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as compiler

    if not hasattr(compiler, "deterministic"):
        pytest.skip("this version of torch knows no such setting")
    before = compiler.deterministic
    try:
        for deterministic in (True, False, True):
            set_up_device(configured("runtime.compile=true", f"runtime.deterministic={deterministic}"), World())
            assert compiler.deterministic is deterministic
    finally:
        compiler.deterministic = before

"""The global random generators: seeding them, their state, and a block that leaves them untouched."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch


def seed_all(key: int) -> None:
    """Seed python, numpy (its legacy generator takes 32 bits), torch on the CPU and on every CUDA device."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)  # torch.manual_seed formats a stack trace: 60 times slower
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(key)


class Generators:
    """The global generators as a part of the training state. Restored last: building things draws numbers."""

    def state_dict(self) -> dict[str, Any]:
        """All generator states; tensors and plain values only."""
        kind, keys, position, has_gauss, cached = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
        version, words, gauss = random.getstate()
        return {
            "python": [version, torch.tensor(words), gauss],
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore every generator; CUDA devices that this machine lacks are passed over, and the topology says so."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(saved, device)


@contextmanager
def temporary_seed(key: int) -> Iterator[None]:
    """Run a block under its own seed and give the global generators back untouched."""
    generators = Generators()
    before = generators.state_dict()
    seed_all(key)
    try:
        yield
    finally:
        generators.load_state_dict(before)

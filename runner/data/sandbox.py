"""The global random generators and the number of threads while samples are made, in a worker or in this process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import get_worker_info

_OWN = np.random.MT19937(0)


@contextmanager
def sandboxed(*, draws: bool) -> Iterator[None]:
    """Within the block, make samples as a worker process does, and leave this process's generators unchanged."""
    if get_worker_info() is not None:
        yield
        return
    with one_thread(), private_generators() if draws else nullcontext():
        yield


def seed_host(key: int) -> None:
    """Seed python, numpy and torch on the CPU."""
    seed_others(key)
    torch.default_generator.manual_seed(key)


def seed_others(key: int) -> None:
    """Seed python and numpy."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


def peek(key: int | None = None) -> tuple[int, bytes]:
    """The next numbers of python's and numpy's generators, after seeding them with ``key`` if it is given."""
    if key is not None:
        seed_others(key)
    return random.getrandbits(64), np.random.bytes(8)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, as in a worker process, because float sums depend on the number of threads."""
    threads = torch.get_num_threads()
    if threads != 1:  # setting it costs the convolutions that follow some per cent, even to what it was
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)


@contextmanager
def private_generators() -> Iterator[None]:
    """Separate global generators within the block, restored afterwards."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    generator = get_bit_generator()
    set_bit_generator(_OWN)  # faster by 60 us than to restore the state of the old one
    try:
        yield
    finally:
        random.setstate(python)
        set_bit_generator(generator)
        if numpy["has_gauss"]:  # the change of generators forgets it
            np.random.set_state(numpy)
        torch.set_rng_state(torch_state)

"""The global random generators and the number of threads while samples are read, in a worker or in this process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import get_worker_info

_BIT_GENERATOR = np.random.MT19937(0)  # numpy's, within ``private_generators``


@contextmanager
def sandboxed(*, draws: bool) -> Iterator[None]:
    """Within the block, read samples as a worker process does: on one thread, and, where samples draw random numbers,
    without a change to the global generators of this process.
    """
    if get_worker_info() is not None:
        yield
        return
    with one_thread(), private_generators() if draws else nullcontext():
        yield


def seed_host(key: int) -> None:
    """Seed python, numpy and torch on the CPU. ``rng.seed_all`` seeds the GPUs as well."""
    seed_python_numpy(key)
    torch.default_generator.manual_seed(key)


def seed_python_numpy(key: int) -> None:
    """Seed python's and numpy's global generators."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


def next_numbers() -> tuple[int, bytes]:
    """The next numbers of python's and numpy's generators, which this call advances."""
    return random.getrandbits(64), np.random.bytes(8)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, as in a worker process, because float sums depend on the number of threads."""
    threads = torch.get_num_threads()
    if threads != 1:  # even setting the same number makes later convolutions slower by some per cent
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)


@contextmanager
def private_generators() -> Iterator[None]:
    """Restore the global generators of python, numpy and torch on the CPU after the block."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    generator = get_bit_generator()
    set_bit_generator(_BIT_GENERATOR)  # faster by 60 us than restoring the state of the old one
    try:
        yield
    finally:
        random.setstate(python)
        set_bit_generator(generator)
        if numpy["has_gauss"]:  # changing generators loses the stored gaussian
            np.random.set_state(numpy)
        torch.set_rng_state(torch_state)

"""The global random generators of python, numpy and torch (on the CPU), and the number of threads, while samples are
read.

Samples see the generators in one fixed state, not in that of the training thread. A sample that draws changes the
state, so the states after a batch show which generators have to be seeded for the samples of a data set. A comparison
must cost next to nothing, so it looks at the memory of a generator: the functions of python and numpy copy a state
number by number.
"""

import ctypes
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import get_worker_info

_FIXED = 0x9E3779B97F4A7C15  # the seed of the fixed state, which nobody else uses
_INSTANCE: Any = vars(random)["_inst"]
_MEMORY = ctypes.c_char * (4 * 625)  # a Mersenne Twister of python or numpy: 624 words and a position


def seed_host(key: int) -> None:
    """Seed python, numpy and torch on the CPU. ``rng.seed_all`` seeds the GPUs as well."""
    for generator in _GENERATORS.values():
        generator.seed(key)


def seeding(names: Collection[str]) -> Callable[[int], object]:
    """The function that seeds the generators of these names."""
    seeds: list[Callable[[int], object]] = [_GENERATORS[name].seed for name in names]
    if len(seeds) == 1:
        return seeds[0]

    def seed(key: int) -> None:
        for each in seeds:
            each(key)

    return seed


def states() -> dict[str, Any]:
    """The states of the generators within ``private_generators``, by name, for comparisons."""
    return {name: generator.state() for name, generator in _GENERATORS.items()}


def changed_generators(since: dict[str, Any] | None = None) -> frozenset[str]:
    """The generators whose state differs from ``since``, by default from the fixed state."""
    before = _FIXED_STATES if since is None else since
    return frozenset([name for name, generator in _GENERATORS.items() if generator.state() != before[name]])


@contextmanager
def sandboxed(*, draws: bool) -> Iterator[None]:
    """Read samples as a worker process does: on one thread, and, if they draw, without a trace in the generators."""
    if get_worker_info() is not None:
        yield
        return
    with one_thread(), private_generators() if draws else nullcontext():
        yield


class one_thread:  # noqa: N801
    """Within the block, torch has one thread, as in a worker process: float sums depend on the number of threads.

    A class, as is ``private_generators``: each batch is read in such blocks, and a generator takes twice as long.
    """

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        if self._threads > 1:  # even setting the same number makes later convolutions slower by some per cent
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        if self._threads > 1:
            torch.set_num_threads(self._threads)


class private_generators:  # noqa: N801
    """The generators are in the fixed state within the block, and restored after it. ``look``: see ``_Numpy``."""

    def __init__(self, *, look: bool = True) -> None:
        self._look = look

    def __enter__(self) -> None:
        self._states = _PYTHON.enter(), _NUMPY.enter(look=self._look), _TORCH.enter()

    def __exit__(self, *error: object) -> None:
        python, numpy, of_torch = self._states
        _PYTHON.leave(python)
        _NUMPY.leave(numpy)
        _TORCH.leave(of_torch)


class PythonGenerator:
    """Python's generator, through its ``memory``, or through functions if that is None."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.seed = random.seed
        before = self.state()
        self.seed(_FIXED)
        self.fixed = self.state()
        self.leave(before)

    def state(self) -> Any:
        return random.getstate() if self._memory is None else (self._memory.raw, _INSTANCE.gauss_next)

    def enter(self) -> Any:
        state = self.state()
        self.leave(self.fixed)
        return state

    def leave(self, state: Any) -> None:
        if self._memory is None:
            random.setstate(state)
        else:
            self._memory.raw, _INSTANCE.gauss_next = state


class _Numpy:
    """numpy draws gaussians in pairs, and stores the second one outside of the generator's memory. Only ``get_state``
    shows it, in 30 us. Only a draw stores one, so there is none while the memory is as it was when there was none; as
    ``set_state`` may store one, too, ``look`` where numpy will be seeded. Without one, the state is changed in memory;
    else another generator takes the place of numpy's until ``leave``.
    """

    def __init__(self) -> None:
        self._own = np.random.MT19937(_FIXED & 0xFFFFFFFF)
        self._own_memory = self._memory = _numpy_memory(self._own)
        self.fixed = self._own_memory.raw
        self._generator: Any = None  # the one that numpy uses
        self._generator_memory: Any = None  # None for another kind than MT19937
        self._state_without_gaussian = b""  # the memory when ``get_state`` last showed no gaussian

    def seed(self, key: int) -> None:
        np.random.seed(key & 0xFFFFFFFF)

    def state(self) -> bytes:
        state: bytes = self._memory.raw
        return state

    def enter(self, *, look: bool) -> Any:
        generator: Any = get_bit_generator()
        if generator is not self._generator:
            self._generator, self._state_without_gaussian = generator, b""
            self._generator_memory = _numpy_memory(generator) if type(generator) is np.random.MT19937 else None
        memory, full_state = self._generator_memory, None
        if look or memory is None or memory.raw != self._state_without_gaussian:
            full_state = np.random.get_state(legacy=False)
            if memory is not None and not full_state["has_gauss"]:
                full_state, self._state_without_gaussian = None, memory.raw
        outer, self._memory = self._memory, memory if full_state is None else self._own_memory
        before = self._memory.raw
        if full_state is not None:
            set_bit_generator(self._own)
        self._memory.raw = self.fixed
        return generator, full_state, before, outer

    def leave(self, state: Any) -> None:
        generator, full_state, before, outer = state
        if self._memory.raw != self.fixed:
            np.random.seed(0)  # drops a stored gaussian
        self._memory.raw = before
        if full_state is not None:
            set_bit_generator(generator)
            np.random.set_state(full_state)
        self._memory = outer


class _Torch:
    def __init__(self) -> None:
        self._fixed = torch.Generator().manual_seed(_FIXED).get_state()
        self.fixed = self._fixed.numpy().tobytes()
        self.seed = torch.default_generator.manual_seed

    def state(self) -> bytes:
        return torch.default_generator.get_state().numpy().tobytes()

    def enter(self) -> Any:
        state = torch.default_generator.get_state()
        torch.default_generator.set_state(self._fixed)
        return state

    def leave(self, state: Any) -> None:
        torch.default_generator.set_state(state)


def python_memory() -> Any:
    """The memory of python's generator: the position and 624 words. None where it is not as in CPython."""
    kind = random.Random.__base__
    if kind is None or kind.__basicsize__ < object.__basicsize__ + ctypes.sizeof(_MEMORY):
        return None
    memory = _MEMORY.from_address(id(_INSTANCE) + object.__basicsize__)
    position, *words = np.frombuffer(memory.raw, np.uint32).tolist()
    return memory if (*words, position) == random.getstate()[1] else None


def _numpy_memory(generator: Any) -> Any:
    """The memory of a generator of numpy: 624 words and the position."""
    return _MEMORY.from_address(generator.ctypes.state_address)


_PYTHON, _NUMPY, _TORCH = PythonGenerator(python_memory()), _Numpy(), _Torch()
_GENERATORS: dict[str, Any] = {"python": _PYTHON, "numpy": _NUMPY, "torch": _TORCH}
_FIXED_STATES = {name: generator.fixed for name, generator in _GENERATORS.items()}

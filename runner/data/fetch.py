"""From positions to a batch as a pure function: the same in a worker or in this process, now or after a resume."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate, get_worker_info

from runner.data.order import Order
from runner.data.plan import Plan, Slice
from runner.rng import derive

Collate = Callable[[list[Any]], Any]

_OWN = np.random.MT19937(0)


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Fetched(NamedTuple):
    """A collated micro-batch and the position of its first sample."""

    first: int
    batch: Any


class Fetcher(Dataset[Fetched]):
    """Maps slices of positions to batches.

    Each sample is drawn with python's, numpy's and torch's generators seeded from its position
    (``randomness=sample``), or the whole batch is (``batch``), or none (``off``); collating has a seed of its own.
    ``label`` keeps training and evaluation apart.
    """

    def __init__(self, samples: Samples, plan: Plan, *, label: str, collate: Collate | None = None) -> None:
        self.samples = samples
        self.plan = plan
        self.label = label
        self.collate: Collate = collate or default_collate
        self._order = Order(plan.samples, seed=plan.seed, shuffle=plan.shuffle)
        self._torch_suffices = True  # until a sample is seen to draw from python's or numpy's generator

    def __getitem__(self, piece: Slice) -> Fetched:
        if get_worker_info() is not None:
            return self._fetch(piece)
        with _one_thread(), nullcontext() if self.plan.randomness == "off" else _private_generators():
            return self._fetch(piece)

    def _fetch(self, piece: Slice) -> Fetched:
        rows = self._rows(piece)
        if self.plan.randomness != "off":
            _seed_all(self._key("collate", piece))
        return Fetched(piece.first, self.collate(rows))

    def _rows(self, piece: Slice) -> list[Any]:
        if self.plan.randomness == "off":
            return self._drawn(piece, _seed_nothing)
        if self.plan.randomness == "batch":
            _seed_all(self._key("batch", piece))
            return self._drawn(piece, _seed_nothing)
        if self._torch_suffices:
            # Seeding python's and numpy's generators is most of what seeding costs, and few data sets use them. So they
            # are left alone; where they then turn out to have been used, the samples are drawn again.
            mark = self._key("mark", piece)
            untouched = _peek(mark)
            _seed_others(mark)
            rows = self._drawn(piece, torch.default_generator.manual_seed)
            if _peek() == untouched:
                return rows
            self._torch_suffices = False
        return self._drawn(piece, _seed_all)

    def _drawn(self, piece: Slice, seed: Callable[[int], object]) -> list[Any]:
        """The samples of the slice, each after a call of ``seed`` with the key of its position."""
        rows = []
        for epoch, start, stop in self.plan.spans(piece):
            places = np.arange(start, stop)
            keys = _mix(places.astype(np.uint64) ^ np.uint64(derive(self.label, self.plan.seed, epoch)))
            for key, index in zip(keys.tolist(), self._order(epoch, places).tolist(), strict=True):
                seed(key)
                rows.append(self.samples[index])
        return rows

    def _key(self, purpose: str, piece: Slice) -> int:
        return derive(f"{self.label} {purpose}", self.plan.seed, piece.first)


def _seed_all(key: int) -> None:
    _seed_others(key)
    torch.default_generator.manual_seed(key)


def _seed_others(key: int) -> None:
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


def _seed_nothing(key: int) -> None:
    pass


def _peek(key: int | None = None) -> tuple[int, bytes]:
    """What python's and numpy's generators give next, as they are or seeded with ``key``."""
    if key is not None:
        _seed_others(key)
    return random.getrandbits(64), np.random.bytes(8)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker process: float sums depend on the number of threads."""
    threads = torch.get_num_threads()
    if threads != 1:  # setting it costs the convolutions that follow some per cent, even to what it was
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)


@contextmanager
def _private_generators() -> Iterator[None]:
    """Own global generators, which a worker process has anyway."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    generator = get_bit_generator()
    set_bit_generator(_OWN)  # to set the state of the other one afterwards would take 60 us
    try:
        yield
    finally:
        random.setstate(python)
        set_bit_generator(generator)
        if numpy["has_gauss"]:  # the change of generators forgets it
            np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) for every word."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed

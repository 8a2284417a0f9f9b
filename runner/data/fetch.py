"""From positions to a batch, as a pure function: the same in a worker, in the training process, now or after a
resume.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from runner.data.order import Order
from runner.data.plan import Plan, Slice
from runner.rng import derive

Collate = Callable[[list[Any]], Any]

_WORD = (1 << 64) - 1


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

    def __getitem__(self, piece: Slice) -> Fetched:
        if self.plan.randomness == "off" or get_worker_info() is not None:
            return self._fetch(piece)
        with _private_generators():
            return self._fetch(piece)

    def _fetch(self, piece: Slice) -> Fetched:
        rows: list[Any] = []
        each = self.plan.randomness == "sample"
        key = 0
        for epoch, start, stop in self.plan.spans(piece):
            base = derive(self.label, self.plan.seed, epoch)
            places = np.arange(start, stop)
            for place, index in zip(places.tolist(), self._order(epoch, places).tolist(), strict=True):
                if each or not rows:
                    key = _mix(base ^ place)
                    self._seed(key)
                rows.append(self.samples[index])
        self._seed(_mix(key))
        return Fetched(piece.first, self.collate(rows))

    def _seed(self, key: int) -> None:
        if self.plan.randomness != "off":
            random.seed(key)
            np.random.seed(key & 0xFFFFFFFF)
            torch.default_generator.manual_seed(key)


@contextmanager
def _private_generators() -> Iterator[None]:
    """What a worker process gives for free: own global generators, and one thread, on which float sums depend."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


def _mix(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)

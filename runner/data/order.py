"""The order of an epoch as a pure function of (seed, epoch), in constant memory.

Integer arithmetic only, frozen by a golden test: no upgrade of a library may move a sample. Up to 2^16 samples it is an
argsort of hashes; above, a Feistel network with cycle walking, so that no list of n indices is ever made.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runner.recent import Recent
from runner.seeds import derive

Indices = NDArray[np.int64]
_Words = NDArray[np.uint64]

LARGEST_SORTED = 1 << 16
_ROUNDS = 6


class Order(Protocol):
    """Which sample stands at which place of which epoch."""

    size: int

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""

    def passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """The source that each place draws from, and how often that source was gone through before; both [k]."""


class Permuted:
    """All samples in an order of their own in every epoch; the identity without ``shuffle``."""

    def __init__(self, size: int, *, seed: int, shuffle: bool) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._sorted = Recent[Indices](2)  # two epochs are live while a batch crosses the border between them

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""
        if not self.shuffle:
            return places
        if self.size > LARGEST_SORTED:
            return _feistel(places, self.size, _keys("order", self.seed, epoch))
        return self._sorted.get(epoch, lambda: permutation(self.size, "order", self.seed, epoch))[places]

    def passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """One source, gone through once per epoch."""
        return one_source(epoch, places)


def one_source(epoch: int, places: Indices) -> tuple[Indices, Indices]:
    """What ``Order.passes`` returns where an epoch is one pass."""
    return np.zeros_like(places), np.full_like(places, epoch)


def stretches(*columns: Indices) -> Iterator[slice]:
    """Where no column changes, from the first row to the last."""
    changes = np.any([np.diff(column) != 0 for column in columns], axis=0)
    ends = [*(np.flatnonzero(changes) + 1).tolist(), len(columns[0])]
    return (slice(*pair) for pair in pairwise([0, *ends]) if pair[0] < pair[1])


def groups(*columns: Indices) -> Iterator[Indices]:
    """The rows of each combination of values, ascending by the first column; takes time for the rows, not for rows
    times combinations.
    """
    rows = np.lexsort(columns[::-1])
    return (rows[here] for here in stretches(*(column[rows] for column in columns)))


def permutation(size: int, label: str, *parts: int) -> Indices:
    """The permutation of [0, size) for a labelled tuple, as a list."""
    words, keys = np.arange(size, dtype=np.uint64), _keys(label, *parts)
    return np.argsort(_mix(_mix(words, keys[0]), keys[1]), kind="stable").astype(np.int64)


def _keys(label: str, *parts: int) -> _Words:
    return np.array([derive(label, *parts, i) for i in range(_ROUNDS)], dtype=np.uint64)


def _feistel(places: Indices, size: int, keys: _Words) -> Indices:
    """A permutation of [0, 2^bits) walked until it lands in [0, size), which makes it one of [0, size)."""
    bits = (size - 1).bit_length()
    low = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    words = _encrypt(places.astype(np.uint64), low, masks, keys)
    outside = np.flatnonzero(words >= np.uint64(size))
    while outside.size:
        words[outside] = _encrypt(words[outside], low, masks, keys)
        outside = outside[words[outside] >= np.uint64(size)]
    return words.astype(np.int64)


def _encrypt(words: _Words, low: np.uint64, masks: tuple[np.uint64, np.uint64], keys: _Words) -> _Words:
    left, right = words >> low, words & masks[1]
    for one, two in zip(keys[0::2], keys[1::2], strict=True):
        left = (left ^ _mix(right, one)) & masks[0]
        right = (right ^ _mix(left, two)) & masks[1]
    return (left << low) | right


def _mix(words: _Words, key: np.uint64) -> _Words:
    """The finaliser of MurmurHash3 (Appleby, public domain), keyed; a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        words = words + key
        words = (words ^ (words >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        words = (words ^ (words >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        mixed: _Words = words ^ (words >> np.uint64(33))
    return mixed

"""The order of an epoch as a pure function of (seed, epoch), in constant memory.

Integer arithmetic only, frozen by a golden test: no upgrade of a library may move a sample. Up to 2^16 samples it is an
argsort of hashes; above, a Feistel network with cycle walking, so that no list of n indices is ever made.

An order that reads shards almost sequentially and is still a pure function of the position.

In every epoch the shards are joined in an order of their own and cut into ``count`` streams of equal length. A window
of ``window`` samples of a stream is permuted as a whole, so that a reader needs no more than one window of each stream
at a time. Positions go round the streams, ``chunk`` samples from each: data worker w of W meets the same streams again
and again, if W times the streams of a micro-batch divides their number.

Which samples stand at which positions, in 64 bits that add up over any division of the positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runner.cache import LRUCache
from runner.rng import derive

Indices = NDArray[np.int64]
_Words = NDArray[np.uint64]

LARGEST_SORTED = 1 << 16
_ROUNDS = 6


class Order(Protocol):
    """Which sample stands at which place of which epoch."""

    size: int

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""

    def source_passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """The source that each place draws from, and how often that source was gone through before; both [k]."""


class PermutationOrder:
    """All samples in an order of their own in every epoch; the identity without ``shuffle``."""

    def __init__(self, size: int, *, seed: int, shuffle: bool) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._sorted = LRUCache[Indices](2)  # two epochs are live while a batch crosses the border between them

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""
        if not self.shuffle:
            return places
        if self.size > LARGEST_SORTED:
            return _feistel(places, self.size, _keys("order", self.seed, epoch))
        return self._sorted.get(epoch, lambda: permutation(self.size, "order", self.seed, epoch))[places]

    def source_passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
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
    return np.argsort(_murmur(_murmur(words, keys[0]), keys[1]), kind="stable").astype(np.int64)


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
        left = (left ^ _murmur(right, one)) & masks[0]
        right = (right ^ _murmur(left, two)) & masks[1]
    return (left << low) | right


def _murmur(words: _Words, key: np.uint64) -> _Words:
    """The finaliser of MurmurHash3 (Appleby, public domain), keyed; a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        words = words + key
        words = (words ^ (words >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        words = (words ^ (words >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        mixed: _Words = words ^ (words >> np.uint64(33))
    return mixed


@dataclass(frozen=True, slots=True)
class Interleaving:
    """How many streams, samples per window, and consecutive samples taken from a stream before the next one's turn."""

    count: int
    window: int
    chunk: int

    def workers(self, wanted: int, *, slice_size: int, world: int) -> int:
        """The most workers, up to those wanted, of which each has streams of its own as long as slices begin where a
        chunk does; all of those wanted where slices are no whole number of chunks.
        """
        chunks, rest = divmod(slice_size, self.chunk)
        if rest:
            return wanted
        return next((w for w in range(wanted, 1, -1) if self.count % (w * world * chunks) == 0), min(wanted, 1))


class WindowOrder:
    """Which sample stands where, for samples that lie in ``shards``: so many in each, in order of index."""

    def __init__(self, shards: Sequence[int], streams: Interleaving, *, seed: int) -> None:
        self.seed = seed
        self.streams = streams
        self._shards = np.asarray(shards, dtype=np.int64)
        self._first = np.cumsum(self._shards) - self._shards
        self.size = int(self._shards.sum())
        self._borders = np.arange(streams.count + 1, dtype=np.int64) * self.size // streams.count
        self._joined = LRUCache[tuple[Indices, Indices]](2)
        self._windows = LRUCache[Indices](4 * streams.count)

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""
        stream, offset = self._dealt(places)
        return self._found(epoch, self._borders[stream] + self._permuted(epoch, stream, offset))

    def source_passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """One source, gone through once per epoch."""
        return one_source(epoch, places)

    def _dealt(self, places: Indices) -> tuple[Indices, Indices]:
        """The stream of each place and the offset in it. What is left of the streams after the last whole round comes
        at the end, stream by stream.
        """
        count, chunk = self.streams.count, self.streams.chunk
        rounds = self.size // count // chunk
        turn, within = np.divmod(places, chunk)
        round_, stream = np.divmod(turn, count)
        offset = round_ * chunk + within
        late = places >= rounds * count * chunk
        if late.any():
            left = self._borders - np.arange(count + 1) * rounds * chunk
            rest = places[late] - rounds * count * chunk
            stream[late] = np.searchsorted(left, rest, side="right") - 1
            offset[late] = rounds * chunk + rest - left[stream[late]]
        return stream, offset

    def _permuted(self, epoch: int, stream: Indices, offset: Indices) -> Indices:
        size = self.streams.window
        window, place = np.divmod(offset, size)
        length = np.minimum(size, self._borders[stream + 1] - self._borders[stream] - window * size)
        found: Indices = window * size
        _, first, which = np.unique(stream * (self.size // size + 1) + window, return_index=True, return_inverse=True)
        here = zip(length[first].tolist(), stream[first].tolist(), window[first].tolist(), strict=True)
        orders = [self._window(samples, epoch, *key) for samples, *key in here]
        begins = np.cumsum([0, *(len(order) for order in orders[:-1])])
        found += np.concatenate(orders)[begins[which] + place]
        return found

    def _window(self, samples: int, *key: int) -> Indices:
        return self._windows.get(key, lambda: permutation(samples, "window", self.seed, *key))

    def _found(self, epoch: int, joined: Indices) -> Indices:
        """The samples at offsets of all shards joined in the order of the epoch."""
        order, ends = self._joined.get(epoch, lambda: self._join(epoch))
        at = np.searchsorted(ends, joined, side="right")
        shard = order[at]
        return self._first[shard] + joined - (ends[at] - self._shards[shard])

    def _join(self, epoch: int) -> tuple[Indices, Indices]:
        order = permutation(len(self._shards), "shards", self.seed, epoch)
        return order, np.cumsum(self._shards[order])


Words = NDArray[np.uint64]

_ADDED, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ALL = 2**64 - 1
_27, _30, _31 = (np.uint64(c) for c in (27, 30, 31))


def digest_positions(positions: Indices, indices: Indices) -> int:
    """64 bits of which samples stand at these positions; of two sets of positions it is the sum, modulo 2^64."""
    return int(digest_words(positions, indices).sum(dtype=np.uint64))


def digest_words(positions: Indices, indices: Indices) -> Words:
    """What each position adds to a digest."""
    return splitmix64(splitmix64(indices.astype(np.uint64)) ^ positions.astype(np.uint64))


def digest_pieces(positions: Indices, indices: Indices, ends: Indices) -> Words:
    """The digests of consecutive pieces that end at ``ends``."""
    sums = np.cumsum(digest_words(positions, indices), dtype=np.uint64)[ends - 1]
    found: Words = np.diff(sums, prepend=np.uint64(0))
    return found


def splitmix64_int(word: int) -> int:
    """``splitmix64`` of a single word, for which numpy is slow."""
    word = (word + 0x9E3779B97F4A7C15) & _ALL
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _ALL
    return word ^ (word >> 31)


def splitmix64(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) for every word."""
    words = words + _ADDED  # arrays of integers wrap around without a warning
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    mixed: Words = words ^ (words >> _31)
    return mixed

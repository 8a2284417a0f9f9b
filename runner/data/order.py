"""The order of samples: which sample is at which place of an epoch, as a pure function of (seed, epoch, place).

``Plan.order`` chooses among these, and may stack them; an iterable of the user's has its own order
(``data.iterable``). A *position* counts the samples of a run from its start, a *place* those of an epoch; an *index* is
the argument of ``__getitem__``. ``Plan`` maps positions to places, an order places to indices, and a resume continues
at the first position that was not trained (``data.stream``).

    PermutationOrder    a permutation of all samples; the identity without ``shuffle``
    WeightedOrder       samples as often as their weights say, which may change from epoch to epoch
    WindowOrder         shards read almost sequentially, shuffled within windows
    MixtureOrder        several sources, in proportion to their shares
    BudgetOrder         samples of similar length side by side, cut into batches by a budget of tokens

Integer arithmetic only, frozen by golden tests: an upgrade of a library must not move a sample.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runner.cache import LRUCache
from runner.errors import DataError
from runner.hashing import derive

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]
Word = TypeVar("Word", int, Words)

LARGEST_SORTED = 1 << 16  # samples; the permutation of a larger epoch is never held in memory
_ROUNDS = 6  # Feistel rounds; four make a strong pseudorandom permutation (Luby and Rackoff 1988)
POOL_SAMPLES = 4096  # samples that are sorted by length together


class Order(ABC):
    """Maps the places of an epoch, [0, size), to samples."""

    size: int

    @abstractmethod
    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k]."""

    def source_passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """The source of each place, and the pass over this source, both of shape [k]. With one source, the epoch."""
        return np.zeros_like(places), np.full_like(places, epoch)


class PermutationOrder(Order):
    """A new permutation of all samples in every epoch; the identity without ``shuffle``."""

    def __init__(self, size: int, *, seed: int, shuffle: bool) -> None:
        self.size = size
        self._seed = seed
        self._shuffle = shuffle
        self._sorted = LRUCache[Indices](2)  # a batch may cross from one epoch into the next

    def __call__(self, epoch: int, places: Indices) -> Indices:
        if not self._shuffle:
            return places
        if self.size > LARGEST_SORTED:
            return _feistel(places, self.size, _keys(_ROUNDS, "order", self._seed, epoch))
        return self._sorted.get(epoch, lambda: permutation(self.size, "order", self._seed, epoch))[places]


class WeightedOrder(Order):
    """Samples as often as their weights say, in epochs of as many places as there are samples.

    Systematic sampling over the cumulative weights, permuted: in every epoch a sample has its share of the places,
    rounded down or up, and none if its weight is 0. ``phases`` maps the first epoch of each phase to its integer
    weights [size]. Takes memory in proportion to the samples and phases.
    """

    def __init__(self, order: Order, phases: Mapping[int, Sequence[int]], *, seed: int) -> None:
        self.size = order.size
        self._order = order
        self._seed = seed
        self._first = np.array(sorted(phases), dtype=np.int64)
        self._ends = [np.cumsum(phases[first], dtype=np.int64) for first in sorted(phases)]

    def __call__(self, epoch: int, places: Indices) -> Indices:
        ends = self._ends[int(np.searchsorted(self._first, epoch, side="right")) - 1]
        total = int(ends[-1])
        # The offset is random, so that rounding favours other samples in each epoch.
        start = derive("weights", self._seed, epoch) % total
        points = (self._order(epoch, places) * total + start) // self.size
        return np.searchsorted(ends, points, side="right").astype(np.int64)


@dataclass(frozen=True, slots=True)
class Interleaving:
    """``data.streams``: the number of streams, the samples in a window, and the samples in a stream's turn."""

    count: int
    window: int
    chunk: int

    def max_workers(self, limit: int, *, slice_size: int, world: int) -> int:
        """The most workers up to ``limit`` that share no stream; ``limit`` where slices divide chunks."""
        chunks, rest = divmod(slice_size, self.chunk)
        if rest:
            return limit
        return next((w for w in range(limit, 1, -1) if self.count % (w * world * chunks) == 0), min(limit, 1))


class WindowOrder(Order):
    """The order of samples in shards of ``shards`` samples each, indexed shard by shard.

    In every epoch the shards are concatenated in a new order and cut into ``count`` streams of equal length. Each
    ``window`` samples of a stream are permuted, so a reader holds at most one window of each stream. Positions take
    ``chunk`` samples from each stream in turn, so a data worker meets the same streams again and again.
    """

    def __init__(self, shards: Sequence[int], interleaving: Interleaving, *, seed: int) -> None:
        self._seed = seed
        self._interleaving = interleaving
        self._shards = np.asarray(shards, dtype=np.int64)
        self._first = np.cumsum(self._shards) - self._shards
        self.size = int(self._shards.sum())
        self._borders = np.arange(interleaving.count + 1, dtype=np.int64) * self.size // interleaving.count
        self._concatenated = LRUCache[tuple[Indices, Indices]](2)
        self._windows = LRUCache[Indices](4)  # two windows of all streams, in two epochs

    def __call__(self, epoch: int, places: Indices) -> Indices:
        stream, offset = self._deinterleave(places)
        concatenated = self._borders[stream] + self._permute(epoch, stream, offset)

        def concatenate() -> tuple[Indices, Indices]:
            """The order of the shards, and where each ends when they are concatenated in this order."""
            order = permutation(len(self._shards), "shards", self._seed, epoch)
            return order, np.cumsum(self._shards[order])

        order, ends = self._concatenated.get(epoch, concatenate)
        number = np.searchsorted(ends, concatenated, side="right")
        shard = order[number]
        indices: Indices = self._first[shard] + concatenated - (ends[number] - self._shards[shard])
        return indices

    def _deinterleave(self, places: Indices) -> tuple[Indices, Indices]:
        """The stream of each place, and the offset in it. Samples left after the last whole round come at the end."""
        count, chunk = self._interleaving.count, self._interleaving.chunk
        rounds = self.size // count // chunk
        turn, within = np.divmod(places, chunk)
        round_, stream = np.divmod(turn, count)
        offset = round_ * chunk + within
        late = places >= rounds * count * chunk
        if late.any():
            remainders = self._borders - np.arange(count + 1) * rounds * chunk
            rest = places[late] - rounds * count * chunk
            stream[late] = np.searchsorted(remainders, rest, side="right") - 1
            offset[late] = rounds * chunk + rest - remainders[stream[late]]
        return stream, offset

    def _permute(self, epoch: int, stream: Indices, offset: Indices) -> Indices:
        """Offsets in streams after the permutation of each window."""
        window, within = np.divmod(offset, self._interleaving.window)
        permuted: Indices = window * self._interleaving.window
        for rows in group_rows(window):  # one or two: the streams move on together
            key = epoch, int(window[rows[0]])
            permuted[rows] += self._windows.get(key, partial(self._permutations, *key))[stream[rows], within[rows]]
        return permuted

    def _permutations(self, epoch: int, window: int) -> Indices:
        """``permutation`` of this window of every stream, [streams, samples of a window], in a sixth of the time."""
        streams, places = range(self._interleaving.count), np.arange(self._interleaving.window, dtype=np.uint64)
        keys = np.array([_keys(2, "window", self._seed, epoch, stream, window) for stream in streams])[:, :, np.newaxis]
        words = _murmur(_murmur(places, keys[:, 0]), keys[:, 1])
        lengths = np.diff(self._borders) - window * len(places)
        words[places.astype(np.int64) >= lengths[:, np.newaxis]] = _64_BITS  # a last window is shorter
        return np.argsort(words, axis=1, kind="stable").astype(np.int64)


class MixtureOrder(Order):
    """The order of a mixture of sources, each with an order of its own.

    Positions are cut into blocks of ``sum(shares)``. In each block source s has ``shares[s]`` places, spread by a keyed
    permutation, so the proportions are exact in every block and the place within a source follows from the position
    alone. Every source is repeated at its own pace, each sample exactly once per pass over it.
    """

    def __init__(self, orders: Sequence[Order], shares: Sequence[int], *, seed: int) -> None:
        self.size = sum(order.size for order in orders)
        self._seed = seed
        self._orders = orders
        self._shares = np.asarray(shares, dtype=np.int64)
        self._first = np.cumsum([0, *(order.size for order in orders)])
        self._blocks = LRUCache[tuple[Indices, Indices]](4)  # consecutive places share a block

    def __call__(self, epoch: int, places: Indices) -> Indices:
        source, pass_, place = self._draw(epoch, places)
        indices = np.empty_like(places)
        for rows in group_rows(source, pass_):
            number = int(source[rows[0]])
            indices[rows] = self._first[number] + self._orders[number](int(pass_[rows[0]]), place[rows])
        return indices

    def source_passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        source, pass_, _ = self._draw(epoch, places)
        return source, pass_

    def _draw(self, epoch: int, places: Indices) -> tuple[Indices, Indices, Indices]:
        """(source, pass over it, place in this pass), each of shape [k]."""
        block, slot = np.divmod(epoch * self.size + places, int(self._shares.sum()))
        source, before = np.empty_like(slot), np.empty_like(slot)

        def draw_block(number: int) -> tuple[Indices, Indices]:
            """The source of every slot of a block, and how many slots before it have the same source."""
            order = permutation(int(self._shares.sum()), "mixture", self._seed, number)
            sources = np.searchsorted(np.cumsum(self._shares), order, side="right").astype(np.int64)
            ranks = np.empty_like(sources)
            for rows in group_rows(sources):
                ranks[rows] = np.arange(len(rows))
            return sources, ranks

        for run in equal_runs(block):
            number = int(block[run.start])
            sources, ranks = self._blocks.get(number, partial(draw_block, number))
            source[run], before[run] = sources[slot[run]], ranks[slot[run]]
        pass_, place = np.divmod(block * self._shares[source] + before, np.diff(self._first)[source])
        return source, pass_, place


class BudgetOrder(Order):
    """Samples of similar length side by side, and the ends of the batches that they make.

    Each pool of neighbours in the order underneath is sorted by length and cut into batches; then the batches of the
    pool are shuffled, so that data which is read almost sequentially still is. A batch has at most ``max_tokens``
    tokens, padding included (the longest length times the samples), and at most ``max_samples`` samples. Takes memory
    in proportion to the samples, as their lengths do. Raises DataError for a sample longer than the budget.
    """

    def __init__(
        self, order: Order, lengths: Indices, *, max_tokens: int, max_samples: int, seed: int, shuffle: bool
    ) -> None:
        if len(lengths) != order.size:
            raise DataError(f"data.train has {order.size} samples and {len(lengths)} lengths; give one for each sample")
        if lengths.min() < 0:
            raise DataError(f"sample {int(lengths.argmin())} has a length of {lengths.min()}; lengths count tokens")
        longest = int(lengths.argmax())
        if lengths[longest] > max_tokens:
            length = f"sample {longest} has {lengths[longest]} tokens, more than data.max_tokens={max_tokens}"
            raise DataError(f"{length}; cut or leave out such samples, or raise the budget")
        self.size = order.size
        self._order = order
        self._lengths = lengths
        self._max_tokens = max_tokens
        self._max_samples = max_samples
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = LRUCache[tuple[Indices, Indices]](2)

    def __call__(self, epoch: int, places: Indices) -> Indices:
        return self._order(epoch, self._epoch(epoch)[0][places])

    def source_passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        return self._order.source_passes(epoch, self._epoch(epoch)[0][places])

    def ends(self, epoch: int) -> Indices:
        """The places at which the batches of an epoch end, ascending; the last is ``size``."""
        return self._epoch(epoch)[1]

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """The places of the order underneath in the order of this one, and the ends of the batches."""
        return self._epochs.get(epoch, lambda: self._sort(epoch))

    def _sort(self, epoch: int) -> tuple[Indices, Indices]:
        lengths = self._lengths[self._order(epoch, np.arange(self.size))]
        batches: list[Indices] = []
        for start in range(0, self.size, POOL_SAMPLES):
            pool = start + np.argsort(lengths[start : start + POOL_SAMPLES], kind="stable")
            cut = np.split(pool, self._cuts(lengths[pool]))
            if self._shuffle:
                cut = [cut[i] for i in permutation(len(cut), "batches", self._seed, epoch, start)]
            batches += cut
        return np.concatenate(batches), np.cumsum([len(batch) for batch in batches])

    def _cuts(self, lengths: Indices) -> list[int]:
        """Where to cut ascending lengths so that every batch is as large as the budget allows."""
        cuts: list[int] = []
        start = 0
        counts = np.arange(1, self._max_samples + 1)
        while True:
            ahead = lengths[start : start + self._max_samples]
            start += int(np.searchsorted(ahead * counts[: len(ahead)], self._max_tokens, side="right"))
            if start == len(lengths):
                return cuts
            cuts.append(start)


def equal_runs(column: Indices) -> Iterator[slice]:
    """The slices of consecutive rows with equal values, in order."""
    ends = [*(np.flatnonzero(np.diff(column)) + 1).tolist(), len(column)]
    return (slice(*pair) for pair in pairwise([0, *ends]) if pair[0] < pair[1])


def group_rows(*columns: Indices) -> Iterator[Indices]:
    """The rows of each combination of values, both in ascending order, in time proportional to the rows."""
    rows = np.lexsort(columns[::-1])
    changes = np.any([np.diff(column[rows]) != 0 for column in columns], axis=0)
    return iter(np.split(rows, np.flatnonzero(changes) + 1) if len(rows) else [])


def permutation(size: int, label: str, *parts: int) -> Indices:
    """The permutation of [0, size) for a labelled tuple: the order of its distinct pseudorandom words."""
    words, keys = np.arange(size, dtype=np.uint64), _keys(2, label, *parts)
    return np.argsort(_murmur(_murmur(words, keys[0]), keys[1]), kind="stable").astype(np.int64)


def _keys(count: int, label: str, *parts: int) -> Words:
    return np.array([derive(label, *parts, i) for i in range(count)], dtype=np.uint64)


def _feistel(places: Indices, size: int, keys: Words) -> Indices:
    """A keyed permutation of [0, 2^bits). Values outside [0, size) are permuted again until they are inside."""
    bits = (size - 1).bit_length()
    low = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    words = _encrypt(places.astype(np.uint64), low, masks, keys)
    outside = np.flatnonzero(words >= np.uint64(size))
    while outside.size:
        words[outside] = _encrypt(words[outside], low, masks, keys)
        outside = outside[words[outside] >= np.uint64(size)]
    return words.astype(np.int64)


def _encrypt(words: Words, low: np.uint64, masks: tuple[np.uint64, np.uint64], keys: Words) -> Words:
    left, right = words >> low, words & masks[1]
    for left_key, right_key in zip(keys[0::2], keys[1::2], strict=True):
        left = (left ^ _murmur(right, left_key)) & masks[0]
        right = (right ^ _murmur(left, right_key)) & masks[1]
    return (left << low) | right


def _murmur(words: Words, key: np.uint64 | Words) -> Words:
    """The finaliser of MurmurHash3 (Appleby, public domain), keyed; a bijection of 64-bit words."""
    with np.errstate(over="ignore"):
        words = words + key
        words = (words ^ (words >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        words = (words ^ (words >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        mixed: Words = words ^ (words >> np.uint64(33))
    return mixed


def digest_words(positions: Indices, indices: Indices) -> Words:
    """64 bits for each position and the sample there. The digest of several is their sum, modulo 2^64."""
    return splitmix64(splitmix64(indices.astype(np.uint64)) ^ positions.astype(np.uint64))


_64_BITS = 2**64 - 1


def splitmix64(word: Word) -> Word:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) for a word, or for every word of an array."""
    mixed: Any = (word + 0x9E3779B97F4A7C15) & _64_BITS
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
    result: Word = mixed ^ (mixed >> 31)
    return result

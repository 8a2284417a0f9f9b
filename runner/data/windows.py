"""An order that reads shards almost sequentially and is still a pure function of the position.

In every epoch the shards are joined in an order of their own and cut into ``count`` streams of equal length. A window
of ``window`` samples of a stream is permuted as a whole, so that a reader needs no more than one window of each stream
at a time. Positions go round the streams, ``chunk`` samples from each: data worker w of W meets the same streams again
and again, if W times the streams of a micro-batch divides their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.data.order import Indices, one_source, permutation
from runner.recent import Recent


@dataclass(frozen=True, slots=True)
class Streams:
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


class Windowed:
    """Which sample stands where, for samples that lie in ``shards``: so many in each, in order of index."""

    def __init__(self, shards: Sequence[int], streams: Streams, *, seed: int) -> None:
        self.seed = seed
        self.streams = streams
        self._shards = np.asarray(shards, dtype=np.int64)
        self._first = np.cumsum(self._shards) - self._shards
        self.size = int(self._shards.sum())
        self._borders = np.arange(streams.count + 1, dtype=np.int64) * self.size // streams.count
        self._joined = Recent[tuple[Indices, Indices]](2)
        self._windows = Recent[Indices](4 * streams.count)

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""
        stream, offset = self._dealt(places)
        return self._found(epoch, self._borders[stream] + self._permuted(epoch, stream, offset))

    def passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
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

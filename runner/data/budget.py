"""Batches of variable size by a budget of tokens, planned for a whole epoch from the lengths: a pure function of both.

Within pools of ``_POOL`` samples of the epoch's order, samples are sorted by length and cut into batches whose padded
size (longest times count) keeps the budget; then the batches of the pool are shuffled, so that what the order reads in
sequence still is. The plan takes memory in proportion to the samples, as the lengths do.
"""

import numpy as np
from numpy.typing import NDArray

from runner.data.order import Indices, Order, permutation
from runner.errors import DataError
from runner.recent import Recent

_POOL = 4096


class Budgeted:
    """An order in which samples of like length stand together, and where its batches end.

    No batch has more than ``max_tokens`` tokens, padding included, or ``max_samples`` samples. Raises DataError for a
    sample that is longer than the budget.
    """

    def __init__(
        self, order: Order, lengths: NDArray[np.int64], *, max_tokens: int, max_samples: int, seed: int, shuffle: bool
    ) -> None:
        if len(lengths) != order.size:
            raise DataError(f"data.train has {order.size} samples and {len(lengths)} lengths; give one for each sample")
        if lengths.min() < 0:
            raise DataError(f"sample {int(lengths.argmin())} has a length of {lengths.min()}; lengths count tokens")
        longest = int(lengths.argmax())
        if lengths[longest] > max_tokens:
            raise DataError(
                f"sample {longest} has {lengths[longest]} tokens, more than data.max_tokens={max_tokens}; "
                "cut or leave out such samples, or raise the budget"
            )
        self.size = order.size
        self._order = order
        self._lengths = lengths
        self._max_tokens = max_tokens
        self._max_samples = max_samples
        self._seed = seed
        self._shuffle = shuffle
        self._plans = Recent[tuple[Indices, Indices]](2)

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""
        return self._order(epoch, self._plan(epoch)[0][places])

    def passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """As the order underneath."""
        return self._order.passes(epoch, self._plan(epoch)[0][places])

    def ends(self, epoch: int) -> Indices:
        """The places at which the batches of an epoch end, ascending; the last is ``size``."""
        return self._plan(epoch)[1]

    def _plan(self, epoch: int) -> tuple[Indices, Indices]:
        return self._plans.get(epoch, lambda: self._make(epoch))

    def _make(self, epoch: int) -> tuple[Indices, Indices]:
        """The places of the order underneath in the order of this one, and where batches end."""
        lengths = self._lengths[self._order(epoch, np.arange(self.size))]
        batches: list[Indices] = []
        for start in range(0, self.size, _POOL):
            pool = start + np.argsort(lengths[start : start + _POOL], kind="stable")
            cut = np.split(pool, self._cuts(lengths[pool]))
            if self._shuffle:
                cut = [cut[i] for i in permutation(len(cut), "batches", self._seed, epoch, start)]
            batches += cut
        return np.concatenate(batches), np.cumsum([len(batch) for batch in batches])

    def _cuts(self, lengths: NDArray[np.int64]) -> list[int]:
        """Where to cut ascending lengths so that every piece is as large as the budget allows."""
        cuts: list[int] = []
        start = 0
        counts = np.arange(1, self._max_samples + 1)
        while True:
            ahead = lengths[start : start + self._max_samples]
            start += int(np.searchsorted(ahead * counts[: len(ahead)], self._max_tokens, side="right"))
            if start == len(lengths):
                return cuts
            cuts.append(start)

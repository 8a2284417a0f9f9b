"""Several data sets mixed by weight; which one a position draws from is a pure function, too.

Positions are cut into blocks; in each, every source has the same number of places, which a keyed permutation of the
block spreads. So the shares are exact in every block, and the place in a source follows from the position alone. Every
source is gone through again and again at its own pace, every sample exactly once per pass.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np

from runner.cache import LRUCache
from runner.data.order import Indices, Order, groups, permutation, stretches
from runner.errors import ConfigError

_RESOLUTION = 1000  # weights are rounded to so many parts


class Mixture:
    """Samples of several data sets, for ``data.train``: ``sources`` by name, and the weight of each.

    Index i counts through the sources one after the other.
    """

    def __init__(self, *, sources: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        if not sources or sources.keys() != weights.keys():
            raise ConfigError(
                f"a mixture needs a weight for each source: sources {', '.join(sources) or 'none'}, "
                f"weights {', '.join(weights) or 'none'}"
            )
        self.sources = [*sources.values()]
        self.names = [*sources]
        self.shares = shares([weights[name] for name in sources])
        empty = [name for name, source in sources.items() if len(source) == 0]
        if empty:
            raise ConfigError(f"source {empty[0]} of the mixture is empty; take it out or give it samples")
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        source, within = self._find(index)
        return self.sources[source][within]

    def locate(self, index: int) -> str:
        """Where a sample lies, for people."""
        source, within = self._find(index)
        locate = getattr(self.sources[source], "locate", None)
        return f"source {self.names[source]}, {locate(within) if locate else f'sample {within}'}"

    @property
    def fingerprint(self) -> str:
        """The fingerprints of the sources that have one."""
        return " ".join(str(getattr(source, "fingerprint", "")) for source in self.sources).strip()

    def hold(self, windows: int, window: int) -> None:
        """Pass on how many windows of consecutive samples are read in turn."""
        for source in self.sources:
            if hasattr(source, "hold"):
                source.hold(windows, window)

    def _find(self, index: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._ends, index, side="right"))
        if index < 0 or source == len(self.sources):
            raise IndexError(f"sample {index} of {len(self)}")
        return source, index - int(self._ends[source]) + len(self.sources[source])


class MixtureOrder:
    """The order of a mixture: a block of ``sum(shares)`` positions has ``shares[s]`` from source s."""

    def __init__(self, orders: Sequence[Order], shares: Sequence[int], *, seed: int) -> None:
        self.size = sum(order.size for order in orders)
        self.seed = seed
        self._orders = orders
        self._shares = np.asarray(shares, dtype=np.int64)
        self._first = np.cumsum([0, *(order.size for order in orders)])
        self._blocks = LRUCache[tuple[Indices, Indices]](4)

    def __call__(self, epoch: int, places: Indices) -> Indices:
        """Sample indices of shape [k] for places of shape [k] in [0, size)."""
        source, passed, place = self._drawn(epoch, places)
        found = np.empty_like(places)
        for here in groups(source, passed):
            one, epoch = int(source[here[0]]), int(passed[here[0]])
            found[here] = self._first[one] + self._orders[one](epoch, place[here])
        return found

    def source_passes(self, epoch: int, places: Indices) -> tuple[Indices, Indices]:
        """The source that each place draws from, and how often that source was gone through before."""
        source, passed, _ = self._drawn(epoch, places)
        return source, passed

    def _drawn(self, epoch: int, places: Indices) -> tuple[Indices, Indices, Indices]:
        """(source, pass, place in the pass), each of shape [k]."""
        block, slot = np.divmod(epoch * self.size + places, int(self._shares.sum()))
        source, before = np.empty_like(slot), np.empty_like(slot)
        for here in stretches(block):
            key = int(block[here.start])
            sources, ranks = self._blocks.get(key, lambda key=key: self._block(key))  # type: ignore[misc]
            source[here], before[here] = sources[slot[here]], ranks[slot[here]]
        sizes = np.diff(self._first)
        passed, place = np.divmod(block * self._shares[source] + before, sizes[source])
        return source, passed, place

    def _block(self, block: int) -> tuple[Indices, Indices]:
        """The source of every slot of a block, and how many slots before it have the same source."""
        order = permutation(int(self._shares.sum()), "mixture", self.seed, block)
        sources = np.searchsorted(np.cumsum(self._shares), order, side="right").astype(np.int64)
        ranks = np.empty_like(sources)
        for source in range(len(self._shares)):
            here = np.flatnonzero(sources == source)
            ranks[here] = np.arange(len(here))
        return sources, ranks


def shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole parts of a thousand (largest remainders), in lowest terms. Raises ConfigError for one that is
    not positive or too small.
    """
    total = sum(weights)
    if not all(weight > 0 for weight in weights) or not total < float("inf"):
        raise ConfigError(f"the weights of a mixture are positive numbers, not {', '.join(map(str, weights))}")
    exact = [weight / total * _RESOLUTION for weight in weights]
    whole = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: _RESOLUTION - sum(whole)]:
        whole[i] += 1
    if not all(whole):
        raise ConfigError(
            f"a weight of {min(weights)} in {total} is less than one part in {_RESOLUTION}; leave that source out"
        )
    return [part // gcd(*whole) for part in whole]

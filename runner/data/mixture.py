"""Data sets made of others: a mixture of several, and a subset of one."""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from runner.data.fetch import Samples, sample_name
from runner.errors import ConfigError

_RESOLUTION = 1000  # weights are rounded to thousandths


class Mixture:
    """The samples of all ``sources``, indexed source by source, with a relative weight for each, for ``data.train``.
    ``order.MixtureOrder`` decides which source a position draws from.

    Example: ``Mixture(sources={"web": web, "books": books}, weights={"web": 3, "books": 1})`` draws three of four
    samples from ``web``. Raises ConfigError for an empty source and for weights that do not match the sources.
    """

    def __init__(self, *, sources: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        if not sources or sources.keys() != weights.keys():
            raise ConfigError(
                f"a mixture needs a weight for each source: sources {', '.join(sources) or 'none'}, "
                f"weights {', '.join(weights) or 'none'}"
            )
        self.sources = [*sources.values()]
        self.names = [*sources]
        self.shares = integer_shares([weights[name] for name in sources])
        empty = [name for name, source in sources.items() if len(source) == 0]
        if empty:
            raise ConfigError(f"source {empty[0]} of the mixture is empty; take it out or give it samples")
        self.fingerprint = " ".join(str(getattr(source, "fingerprint", "")) for source in self.sources).strip()
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        source, within = self._find(index)
        return self.sources[source][within]

    def locate(self, index: int) -> str:
        """Where a sample is stored, for messages."""
        source, within = self._find(index)
        return f"source {self.names[source]}, {sample_name(self.sources[source], within)}"

    def hold(self, windows: int, window: int) -> None:
        """Tell the sources how many windows of consecutive samples are read in turn."""
        for source in self.sources:
            if hasattr(source, "hold"):
                source.hold(windows, window)

    def _find(self, index: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._ends, index, side="right"))
        if index < 0 or source == len(self.sources):
            raise IndexError(f"sample {index} of {len(self)}")
        return source, index - int(self._ends[source]) + len(self.sources[source])


class Subset:
    """The samples at ``indices`` of a map-style data set, without its shards or the sources of a mixture."""

    def __init__(self, samples: Samples, indices: ArrayLike) -> None:
        self._samples = samples
        self._indices = np.asarray(indices)
        self.fingerprint = str(getattr(samples, "fingerprint", ""))
        if (lengths := getattr(samples, "lengths", None)) is not None:
            self.lengths = np.asarray(lengths)[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._samples[int(self._indices[index])]

    def locate(self, index: int) -> str:
        """Where a sample is stored, for messages."""
        return sample_name(self._samples, int(self._indices[index]))


def head(samples: Samples, count: int) -> Subset:
    """The first ``count`` samples, or all if there are fewer."""
    return Subset(samples, range(min(count, len(samples))))


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Weights in thousandths, by largest remainders, in lowest terms. Raises ConfigError if one becomes 0."""
    total = sum(weights)
    if not all(weight > 0 for weight in weights) or not total < float("inf"):
        raise ConfigError(f"the weights of a mixture are positive numbers, not {', '.join(map(str, weights))}")
    exact = [weight / total * _RESOLUTION for weight in weights]
    whole = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: _RESOLUTION - sum(whole)]:
        whole[i] += 1
    if not all(whole):
        raise ConfigError(f"a weight of {min(weights)} in {total} is less than one part in {_RESOLUTION}; leave it out")
    return [part // gcd(*whole) for part in whole]

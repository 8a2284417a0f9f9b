"""Cross-validation: the parts of a data set for training and validation, one fold of which is held out."""

import numpy as np

from runner.data.fetch import Samples
from runner.data.mixture import Subset
from runner.data.order import PermutationOrder
from runner.errors import ConfigError


class Fold(Subset):
    """The samples of ``source`` that are in the fold (``split=validation``), or in none but the others (``train``).

    Each sample is in one of the ``folds``, a pure function of its index and the ``seed``; their sizes differ by 1.
    """

    def __init__(self, source: Samples, *, folds: int, fold: int, split: str, seed: int = 0) -> None:
        if split not in ("train", "validation"):
            raise ConfigError(f"a fold has no split {split!r}; there are train and validation")
        if not 0 <= fold < folds or not 2 <= folds <= len(source):
            raise ConfigError(
                f"there is no fold {fold} of {folds} of {len(source)} samples: folds are numbered from 0, and are at "
                "least 2 and at most one for each sample"
            )
        size = len(source)
        order = PermutationOrder(size, seed=seed, shuffle=True)(0, np.arange(size))
        inside = np.arange(size) * folds // size == fold
        super().__init__(source, np.sort(order[inside if split == "validation" else ~inside]))
        self.fingerprint += f" {split} {fold}/{folds} {seed}"

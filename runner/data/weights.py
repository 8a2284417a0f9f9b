"""``data.weights``: how often each sample is drawn, as a function of the data and the epoch alone."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from runner.errors import DataError

_TOTAL = 1 << 61  # sum of integer weights times samples, so that products with a place fit into 63 bits


def balanced(samples: Any, *, labels: str = "targets") -> Any:
    """Weights [samples] with which every class is drawn equally often.

    ``labels`` names an attribute of the data set with the class of each sample (``targets`` in torchvision), or a
    column of a Hugging Face data set. Raises DataError without it.
    """
    classes = getattr(samples, labels, None)
    if classes is None and labels in (getattr(samples, "column_names", None) or ()):
        classes = samples[labels]
    if classes is None or len(classes) != len(samples):
        raise DataError(
            f"data.weights: {type(samples).__qualname__} has no {labels} with a class for each of its {len(samples)} "
            "samples; name the attribute or the column by data.weights.labels"
        )
    _, number, counts = np.unique(np.asarray(classes), return_inverse=True, return_counts=True)
    return 1 / counts[number]


def integer_weights(weights: Any, size: int) -> dict[int, tuple[int, ...]]:
    """Weights [size], or a mapping of the first epoch in which they hold to weights, as integers. Raises DataError."""
    phases = weights if isinstance(weights, Mapping) else {0: weights}
    if 0 not in phases or not all(isinstance(epoch, int) and epoch >= 0 for epoch in phases):
        raise DataError(f"data.weights have the epochs {', '.join(map(str, phases)) or 'none'}: expected 0 and later")
    return {epoch: _integers(np.asarray(phases[epoch], dtype=np.float64), size) for epoch in sorted(phases)}


def _integers(weights: Any, size: int) -> tuple[int, ...]:
    if weights.shape != (size,):
        raise DataError(f"data.weights have the shape {[*weights.shape]}; expected one for each of {size} samples")
    total = math.fsum(weights.tolist())  # exact, so that every machine has the same integers
    if not (np.isfinite(weights).all() and (weights >= 0).all() and 0 < total < math.inf):
        raise DataError("data.weights are numbers from 0 on, finite, and not all 0")
    scaled = np.floor(weights / total * (_TOTAL // size)).astype(np.int64)
    return tuple(np.where(weights > 0, np.maximum(scaled, 1), 0).tolist())

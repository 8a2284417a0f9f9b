"""Which samples stand at which positions, in 64 bits that add up over any division of the positions."""

import numpy as np
from numpy.typing import NDArray

from runner.data.order import Indices

Words = NDArray[np.uint64]

_ADDED, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ALL = 2**64 - 1
_27, _30, _31 = (np.uint64(c) for c in (27, 30, 31))


def digest(positions: Indices, indices: Indices) -> int:
    """64 bits of which samples stand at these positions; of two sets of positions it is the sum, modulo 2^64."""
    return int(digest_words(positions, indices).sum(dtype=np.uint64))


def digest_words(positions: Indices, indices: Indices) -> Words:
    """What each position adds to a digest."""
    return mix(mix(indices.astype(np.uint64)) ^ positions.astype(np.uint64))


def digests(positions: Indices, indices: Indices, ends: Indices) -> Words:
    """The digests of consecutive pieces that end at ``ends``."""
    sums = np.cumsum(digest_words(positions, indices), dtype=np.uint64)[ends - 1]
    found: Words = np.diff(sums, prepend=np.uint64(0))
    return found


def mix_one(word: int) -> int:
    """``mix`` of a single word, for which numpy is slow."""
    word = (word + 0x9E3779B97F4A7C15) & _ALL
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _ALL
    return word ^ (word >> 31)


def mix(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) for every word."""
    words = words + _ADDED  # arrays of integers wrap around without a warning
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    mixed: Words = words ^ (words >> _31)
    return mixed

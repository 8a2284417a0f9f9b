"""Sequences of known lengths, concatenated and cut into rows: arithmetic only, nothing is read."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Tokens = NDArray[np.integer]


class Layout:
    """Row i is the tokens [i * length, i * length + length + 1) of all sequences joined, as ``str.join`` does it with
    ``separator`` if there is one. Rows overlap by one token, the target of a row's last; the rest at the end is
    dropped.
    """

    def __init__(self, lengths: ArrayLike, *, length: int, separator: int | None = None) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.length = length
        self.separator = separator
        widths = self.lengths + (separator is not None)
        widths[-1:] = self.lengths[-1:]
        self.begins = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
        self.rows = max(0, int(self.begins[-1]) - 1) // length

    def row(self, index: int, read: Callable[[int, int, int], Tokens]) -> list[Tokens]:
        """The parts of a row; ``read(sequence, start, stop)`` gives tokens of one sequence."""
        parts = []
        for number, start, stop in self.spans(index):
            size = int(self.lengths[number])
            if start < size:
                parts.append(read(number, start, min(stop, size)))
            if stop > size:
                parts.append(np.array([self.separator]))
        return parts

    def spans(self, index: int) -> Iterator[tuple[int, int, int]]:
        """The parts of a row as (sequence, start, stop). A separator counts as one more token of its sequence."""
        at = index * self.length
        end = at + self.length + 1
        number = int(self.begins.searchsorted(at, side="right")) - 1
        while at < end:
            begin, following = self.begins[number : number + 2].tolist()
            if at < following:
                yield number, at - begin, min(end, following) - begin
            at = following
            number += 1

    def counts(self, borders: Sequence[int]) -> list[int]:
        """The number of rows that begin in sequences [b0, b1), [b1, b2) ..., for ``borders`` b0 = 0 <= b1 <= b2 ..."""
        rows = np.minimum(-(-self.begins[np.asarray(borders)] // self.length), self.rows)
        found: list[int] = np.diff(rows).tolist()
        return found

"""One shard."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One file: where it lies, its size in bytes and mark (see ``files.Stat``) when scanned, and its records.

    ``starts`` has shape [2, blocks]: the number of each block's first record within the shard, and the byte where the
    block begins. A block ends where the next one, or the file, does.
    """

    url: str
    size: int
    mark: str
    records: int
    starts: NDArray[np.int64]

    def block_of(self, record: int) -> int:
        """The block that a record lies in."""
        return int(self.starts[0].searchsorted(record, side="right")) - 1

    def span(self, block: int) -> tuple[int, int, int, int]:
        """First record, end record, first byte and end byte of a block."""
        first, start = self.starts[:, block].tolist()
        last = block + 1 == self.starts.shape[1]
        end, stop = (self.records, self.size) if last else self.starts[:, block + 1].tolist()
        return first, end, start, stop

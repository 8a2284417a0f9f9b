"""What a format is: it finds the records of a shard once, in a scan, and then reads one block of them at a time."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

BLOCK_BYTES = 1 << 20  # about as much as a store gives in the time that it takes to answer at all


class Block(NamedTuple):
    """Whole records from byte ``start`` on; one without records only tells how far the scan has come."""

    start: int
    records: int


class Scanner(Protocol):
    """Finds records. Holds no state."""

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """Scan a shard of ``size`` bytes, in bounded memory; blocks end where the next one (or the file) does."""


class Format(Scanner, Protocol):
    """Finds records and reads them. Holds no state."""

    def read(self, path: str, start: int, stop: int) -> Sequence[Any]:
        """The raw records of the block at the bytes [start, stop)."""

    def decode(self, raw: Any) -> Any:
        """One record as the data set gives it. Raises ValueError for what is none."""

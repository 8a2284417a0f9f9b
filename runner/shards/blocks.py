"""The interface of a format: it finds the records of a shard in a scan, and later reads one block of them at a time."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

BLOCK_BYTES = 1 << 20  # about as much as a store sends in the time of its latency


class Block(NamedTuple):
    """Whole records from byte ``start`` on. A block without records only reports the progress of the scan."""

    start: int
    records: int


class Scanner(Protocol):
    """Finds records. Holds no state."""

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """Scan a shard of ``size`` bytes, in bounded memory. A block ends where the next begins, or with the file."""


class Format(Scanner, Protocol):
    """Finds records and reads them. Holds no state."""

    def read(self, path: str, start: int, stop: int) -> Sequence[Any]:
        """The raw records of the block at the bytes [start, stop)."""

    def decode(self, raw: Any) -> Any:
        """A record as the data set returns it. Raises ValueError for an invalid one."""

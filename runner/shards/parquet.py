"""Parquet files, through pyarrow (the extra ``parquet``): row groups are the blocks, rows the records."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from runner.errors import ConfigError
from runner.shards.blocks import Block
from runner.storage import files


class Parquet:
    """A record is a row, as a dict. Counts come from the footer alone."""

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """The row groups that have rows."""
        with _opened(path) as file:
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                yield Block(_start(about), about.num_rows)

    def read(self, path: str, start: int, stop: int) -> "_Rows":
        """The rows of the group that begins at byte ``start``; none where none does."""
        with _opened(path) as file:
            groups = [g for g in range(file.metadata.num_row_groups) if file.metadata.row_group(g).num_rows]
            group = [g for g in groups if _start(file.metadata.row_group(g)) == start]
            # One thread: pyarrow's pool does not survive a fork.
            return _Rows(file.read_row_groups(group, use_threads=False))

    def decode(self, raw: Any) -> dict[str, Any]:
        """The row as python values."""
        row: dict[str, Any] = raw.to_pylist()[0]
        return row


class _Rows(Sequence[Any]):
    """The rows of a table, still as columns: python values take many times the room."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(index, 1)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install 'hydra-runner[parquet]'") from error
    with files.open_file(path) as file, ParquetFile(file) as opened:
        yield opened


def _start(group: Any) -> int:
    """The first byte of a row group. Its own ``file_offset`` is often left at 0 by those who write."""
    columns = [group.column(number) for number in range(group.num_columns)]
    offsets = [(c.dictionary_page_offset if c.has_dictionary_page else None) or c.data_page_offset for c in columns]
    return int(min(offsets, default=0))

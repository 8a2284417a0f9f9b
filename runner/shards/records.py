"""Records of jsonl, text, tar and parquet shards, by number."""

from collections.abc import Callable
from functools import partial
from typing import Any

from runner.cache import LRUCache
from runner.errors import ConfigError, DataError
from runner.shards import formats
from runner.shards.scan import CHANGED, open_manifest

_BLOCKS_HELD = 4
_Block = tuple[int, int, Any]  # number of the first record, number after the last record, block of the format
_NO_BLOCK: _Block = (0, 0, None)


class Records:
    """A map-style data set of all records in shards, which are given by ``path`` (any fsspec file, folder or glob) or
    by the ``manifest`` of a scan.

    ``format`` is one of jsonl, text, tar, parquet; by default the suffixes decide. ``decode`` is applied to every
    record. Shards are read in whole blocks, and the blocks used last stay in memory. Raises ConfigError for arguments
    that contradict each other, DataError for shards that cannot be read::

        Records(path="s3://bucket/train/*.jsonl", decode=lambda record: record["text"])
    """

    def __init__(
        self,
        *,
        path: str | list[str] | None = None,
        manifest: str | None = None,
        format: str | None = None,  # noqa: A002 -- the word that configurations use
        decode: Callable[[Any], Any] | None = None,
    ) -> None:
        _refuse_tokens(format)
        self.manifest = open_manifest(path=path, manifest=manifest, kind=format)
        _refuse_tokens(self.manifest.kind)
        self.counts = self.manifest.counts  # records per shard, in the order of their numbers
        self.fingerprint = self.manifest.fingerprint  # changes with the data, but not with the folder that holds it
        self.decode = decode
        self._format = formats.READERS[self.manifest.kind]
        self._blocks: LRUCache[_Block] = LRUCache(_BLOCKS_HELD)
        self._last: _Block = _NO_BLOCK

    def __len__(self) -> int:
        return int(self.manifest.firsts[-1])

    def __getitem__(self, index: int) -> Any:
        first, end, block = self._last
        if not first <= index < end:  # neighbours are often asked for one after the other
            number, record = self._find(index)
            key = number, self.manifest.shards[number].block_of(record)
            first, end, block = self._last = self._blocks.get(key, partial(self._read, *key))
        try:
            raw = self._format.record(block, index - first)
        except ValueError as error:
            message = f"{self.locate(index)}: not a record of {self.manifest.kind}: {error}"
            raise DataError(f"{message}; correct the shard and scan it again") from error
        return raw if self.decode is None else self.decode(raw)

    def locate(self, index: int) -> str:
        """Shard, record and block of a record, for messages."""
        number, record = self._find(index)
        shard = self.manifest.shards[number]
        return f"{shard.url}, record {record}, in the block at byte {shard.span(shard.block_of(record))[2]}"

    def hold(self, windows: int, window: int) -> None:
        """Keep enough blocks in memory to read ``windows`` windows of ``window`` consecutive records in turn."""
        blocks = sum(shard.starts.shape[1] for shard in self.manifest.shards)
        per_window = 1 + -(-window * blocks // len(self))
        self._blocks.capacity = max(2, windows * per_window)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": _NO_BLOCK}

    def _find(self, index: int) -> tuple[int, int]:
        """Number of the shard, and of the record in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index}: there are {len(self)}, from 0 on")
        number = int(self.manifest.firsts.searchsorted(index, side="right")) - 1
        return number, index - int(self.manifest.firsts[number])

    def _read(self, number: int, block: int) -> _Block:
        shard = self.manifest.unchanged(number)
        first, end, start, stop = shard.span(block)
        content = self._format.read(shard.url, start, stop)
        if len(content) != end - first:
            raise DataError(
                f"{shard.url}, bytes {start} to {stop}: expected {end - first} records, found {len(content)}. {CHANGED}"
            )
        start_of_shard = int(self.manifest.firsts[number])
        return start_of_shard + first, start_of_shard + end, content


def _refuse_tokens(kind: str | None) -> None:
    if kind == "tokens":
        raise ConfigError("Records reads jsonl, text, tar and parquet; for flat arrays of tokens use Tokens")

"""Rows of equal length from flat arrays of tokens."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from runner.cache import LRUCache
from runner.errors import ConfigError, DataError
from runner.hashing import json_digest
from runner.shards.scan import SHARDS_CHECKED, check_size, open_manifest
from runner.storage import files

_MAPS_HELD = 64  # open memory maps, each of which has a file descriptor
# torch has few operations on the wider unsigned types
_WIDENED = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}


class Tokens:
    """A map-style data set of rows from flat arrays of tokens: sample i is the tokens
    [i * length, (i + 1) * length + 1). Neighbours overlap by one token, the target of a row's last position.

    The arrays are .bin files of ``dtype`` (default: uint16), .npy files, or any files read as bytes (uint8). With
    ``pack`` all shards are joined, with ``separator`` between them if it is given; otherwise the last, incomplete row
    of each shard is dropped. Local files are memory-mapped; from other stores only the bytes of a sample are read.
    Tensors have shape [length + 1] and the dtype of the tokens; uint16 and uint32 become int32 and int64. Raises
    ConfigError and DataError.
    """

    def __init__(
        self,
        *,
        path: str | list[str] | None = None,
        manifest: str | None = None,
        length: int,
        dtype: str | None = None,
        pack: bool = True,
        separator: int | None = None,
    ) -> None:
        self.manifest = open_manifest(path=path, manifest=manifest, kind="tokens", dtype=dtype)
        assert self.manifest.dtype is not None, "a manifest of tokens has a dtype"
        self.length = checked_length(length)
        self.pack = pack
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._widened = np.dtype(_WIDENED.get(self.manifest.dtype, self.manifest.dtype))
        limits = np.iinfo(self._dtype)
        if separator is not None and (not pack or not limits.min <= separator <= limits.max):
            raise ConfigError(
                f"separator={separator} stands between joined shards of {self._dtype.name}: it needs pack=true and "
                f"a token from {limits.min} to {limits.max}"
            )
        self._layout = RowLayout(self.manifest.counts, length=length, separator=separator)
        whole = [max(0, tokens - 1) // length for tokens in self.manifest.counts]  # rows of each shard
        self.counts = self._layout.counts(range(len(whole) + 1)) if pack else whole
        self.fingerprint = json_digest([self.manifest.fingerprint, length, pack, separator])
        self._firsts = np.cumsum([0, *self.counts], dtype=np.int64)
        if not len(self):
            size = f"{len(whole)} shards ({self.manifest.shards[0].url} ...) hold {sum(self.manifest.counts)} tokens"
            raise DataError(f"{size}: too few for one sample of {length + 1}; give more, or a smaller length")
        self._maps: LRUCache[NDArray[np.integer] | None] = LRUCache(_MAPS_HELD)
        self._checked: LRUCache[None] = LRUCache(SHARDS_CHECKED)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Tensor:
        parts = self._layout.row(index, self._read) if self.pack else [self._read(*self._alone(index))]
        return torch.from_numpy(np.concatenate(parts, dtype=self._widened, casting="unsafe"))

    def locate(self, index: int) -> str:
        """Shards and tokens of a sample, for messages."""
        spans, shards = self._layout.spans(index) if self.pack else [self._alone(index)], self.manifest.shards
        return " and ".join(f"{shards[number].url}, tokens {start} to {stop}" for number, start, stop in spans)

    def _alone(self, index: int) -> tuple[int, int, int]:
        """Shard, start and stop of a sample if shards are not joined."""
        check_index(index, len(self))
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        start = (index - int(self._firsts[number])) * self.length
        return number, start, start + self.length + 1

    def _read(self, number: int, start: int, stop: int) -> NDArray[np.integer]:
        shard = self.manifest.shards[number]
        check_size(shard, self._checked)
        begin, width = int(shard.starts[1, 0]), self._dtype.itemsize

        def memory_map() -> NDArray[np.integer] | None:
            local = files.local_path(shard.url)
            shape = (shard.records,)
            return None if local is None else np.asarray(np.memmap(local, self._dtype, "r", begin, shape))

        mapped = self._maps.get(number, memory_map)
        if mapped is not None:
            return mapped[start:stop]
        return np.frombuffer(files.read_range(shard.url, begin + start * width, begin + stop * width), self._dtype)


def checked_length(length: int) -> int:
    """Return ``length`` if rows can have it. Raises ConfigError."""
    if length < 1:
        raise ConfigError(f"length={length}: a sample has at least one token and its target")
    return length


def check_index(index: int, size: int) -> None:
    """Raise IndexError unless 0 <= index < size."""
    if not 0 <= index < size:
        raise IndexError(f"sample {index}: there are {size}, from 0 on")


class RowLayout:
    """Rows of ``length`` + 1 tokens over sequences of given ``lengths`` that are joined, as by ``str.join``, with
    ``separator``. Arithmetic only: nothing is read.

    Row i is the tokens [i * length, (i + 1) * length + 1) of the joined sequence, so rows overlap by one token. An
    incomplete row at the end is dropped.
    """

    def __init__(self, lengths: ArrayLike, *, length: int, separator: int | None = None) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.length = length
        self.separator = separator
        widths = self.lengths + (separator is not None)
        widths[-1:] = self.lengths[-1:]
        self.begins = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
        self.rows = max(0, int(self.begins[-1]) - 1) // length

    def row(self, index: int, read: Callable[[int, int, int], NDArray[np.integer]]) -> list[NDArray[np.integer]]:
        """The parts of a row; ``read(sequence, start, stop)`` returns tokens of one sequence."""
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
        check_index(index, self.rows)
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
        counts: list[int] = np.diff(rows).tolist()
        return counts

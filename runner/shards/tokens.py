"""Rows of equal length from flat arrays of tokens."""

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from runner.cache import LRUCache
from runner.errors import ConfigError, DataError
from runner.hashing import json_digest
from runner.shards.scan import open_manifest
from runner.storage import files

_NO_MAP = (-1, None)
_MAPS_HELD = 64  # open memory maps, each of which has a file descriptor
# torch has few operations on the wider unsigned types
_WIDENED = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}


class TokenRows(ABC):
    """Rows of ``length`` + 1 tokens over sequences of given ``lengths`` that are joined, as by ``str.join``, with
    ``separator``. Raises ConfigError for an impossible ``length``.

    Row i is the tokens [i * length, (i + 1) * length + 1) of the joined sequence, so rows overlap by one token, the
    target of a row's last position. An incomplete row at the end is dropped.
    """

    def __init__(self, lengths: ArrayLike, *, length: int, separator: int | None, dtype: str = "int64") -> None:
        if length < 1:
            raise ConfigError(f"length={length}: a sample has at least one token and its target")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._length = length
        self._separator = separator
        self._dtype = np.dtype(dtype)  # of the rows
        widths = self._lengths + (separator is not None)
        widths[-1:] = self._lengths[-1:]  # no separator at the end
        self._begins = array("q", np.concatenate([[0], np.cumsum(widths)]).astype(np.int64).tobytes())
        self._rows = max(0, self._begins[-1] - 1) // length

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Tensor:
        parts = []
        for number, start, stop in self._spans(index):
            size = int(self._lengths[number])
            if start < size:
                parts.append(self._read(number, start, min(stop, size)))
            if stop > size:
                parts.append(np.array([self._separator]))
        if len(parts) == 1:
            return torch.from_numpy(parts[0].astype(self._dtype))
        return torch.from_numpy(np.concatenate(parts, dtype=self._dtype, casting="unsafe"))

    def locate(self, index: int) -> str:
        """Sequences and tokens of a sample, for messages."""
        return " and ".join(f"{self._name(number)}, tokens {a} to {b}" for number, a, b in self._spans(index))

    @abstractmethod
    def _read(self, number: int, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens of one sequence."""

    @abstractmethod
    def _name(self, number: int) -> str:
        """Where a sequence is stored."""

    def _spans(self, index: int) -> list[tuple[int, int, int]]:
        """The parts of a row as (sequence, start, stop). A separator counts as one more token of its sequence."""
        if not 0 <= index < self._rows:
            raise IndexError(f"sample {index}: there are {self._rows}, from 0 on")
        at = index * self._length
        end = at + self._length + 1
        number = bisect_right(self._begins, at) - 1
        spans = []
        while at < end:
            begin, following = self._begins[number], self._begins[number + 1]
            if at < following:
                spans.append((number, at - begin, min(end, following) - begin))
            at = following
            number += 1
        return spans

    def _counts(self, borders: NDArray[np.int64]) -> list[int]:
        """The number of rows that begin in sequences [b0, b1), [b1, b2) ..., for ``borders`` b0 = 0 <= b1 <= b2 ..."""
        rows = np.minimum(-(-np.asarray(self._begins)[borders] // self._length), self._rows)
        counts: list[int] = np.diff(rows).tolist()
        return counts


class Tokens(TokenRows):
    """A map-style data set of rows from flat arrays of tokens, which are joined, with ``separator`` between them if it
    is given. Sample i is the tokens [i * length, (i + 1) * length + 1): neighbours overlap by one token.

    The arrays are .bin files of ``dtype`` (default: uint16), .npy files, or any files read as bytes (uint8). Local
    files are memory-mapped; from other stores only the bytes of a sample are read. Tensors have shape [length + 1] and
    the dtype of the tokens; uint16 and uint32 become int32 and int64. Raises ConfigError and DataError.
    """

    def __init__(
        self,
        *,
        path: str | list[str] | None = None,
        manifest: str | None = None,
        length: int,
        dtype: str | None = None,
        separator: int | None = None,
    ) -> None:
        self.manifest = open_manifest(path=path, manifest=manifest, kind="tokens", dtype=dtype)
        assert self.manifest.dtype is not None, "a manifest of tokens has a dtype"
        self._stored = np.dtype(self.manifest.dtype).newbyteorder("<")
        limits = np.iinfo(self._stored)
        if separator is not None and not limits.min <= separator <= limits.max:
            raise ConfigError(f"separator={separator}: expected a token from {limits.min} to {limits.max}")
        tokens = self.manifest.counts
        dtype = _WIDENED.get(self.manifest.dtype, self.manifest.dtype)
        super().__init__(tokens, length=length, separator=separator, dtype=dtype)
        self.counts = self._counts(np.arange(len(tokens) + 1))
        self.fingerprint = json_digest([self.manifest.fingerprint, length, True, separator])  # True: a former option
        if not len(self):
            size = f"{len(tokens)} shards ({self.manifest.shards[0].url} ...) hold {sum(tokens)} tokens"
            raise DataError(f"{size}: too few for one sample of {length + 1}; give more, or a smaller length")
        self._maps: LRUCache[NDArray[np.integer] | None] = LRUCache(_MAPS_HELD)
        self._last: tuple[int, NDArray[np.integer] | None] = _NO_MAP

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": _NO_MAP}

    def _read(self, number: int, start: int, stop: int) -> NDArray[np.integer]:
        if number != self._last[0]:  # neighbours are often asked for one after the other
            self._last = number, self._maps.get(number, partial(self._map, number))
        tokens = self._last[1]
        if tokens is not None:
            return tokens[start:stop]
        shard, width = self.manifest.shards[number], self._stored.itemsize
        begin = int(shard.starts[1, 0])
        return np.frombuffer(files.read_range(shard.url, begin + start * width, begin + stop * width), self._stored)

    def _map(self, number: int) -> NDArray[np.integer] | None:
        """The tokens of a local shard; None in another store."""
        shard = self.manifest.unchanged(number)
        local = files.local_path(shard.url)
        begin = int(shard.starts[1, 0])
        return None if local is None else np.asarray(np.memmap(local, self._stored, "r", begin, (shard.records,)))

    def _name(self, number: int) -> str:
        return self.manifest.shards[number].url

"""Rows of equal length from flat arrays of tokens."""

import json
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runner.errors import ConfigError, DataError
from runner.recent import Recent
from runner.shards.layout import Layout
from runner.shards.records import Sizes, opened
from runner.shards.shard import Shard
from runner.storage import files

_MAPS_HELD = 64  # open memory maps, each of which has a file descriptor
# torch can do little with the wider unsigned ones
_WIDENED = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}


class Tokens:
    """Sample i is the tokens [i * length, i * length + length + 1): neighbours overlap by one, the target of the last.

    The arrays are .bin files of ``dtype`` (uint16 unless given), .npy files, or any files as bytes (uint8). With
    ``pack`` all shards are joined, with ``separator`` between them if given; without, the rest of each is dropped.
    Local files are mapped into memory; of others only the bytes of a sample are read. Tensors have shape
    [length + 1] and the dtype of the tokens, uint16 and uint32 widened to int32 and int64.
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
        self.manifest = opened(path=path, manifest=manifest, kind="tokens", dtype=dtype)
        assert self.manifest.dtype is not None, "a manifest of tokens has one"
        self.length = checked_length(length)
        self.pack = pack
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._widened = np.dtype(_WIDENED.get(self.manifest.dtype, self.manifest.dtype))
        self._layout = Layout(self.manifest.counts, length=length, separator=self._checked_separator(separator))
        self.counts: list[int] = self._counts()
        self._firsts = np.cumsum([0, *self.counts], dtype=np.int64)
        if not len(self):
            raise DataError(
                f"{self.manifest.shards[0].url} and the other shards, {len(self.manifest.shards)} in all, hold "
                f"{self.tokens} tokens: too few for one sample of {length + 1}; give more, or a smaller length"
            )
        self._maps: Recent[NDArray[np.integer] | None] = Recent(_MAPS_HELD)
        self._sizes = Sizes()

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return int(self.manifest.firsts[-1])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Tensor:
        if self.pack:
            check_index(index, len(self))
            parts = self._layout.row(index, self._read)
        else:
            parts = [self._read(*self._alone(index))]
        return torch.from_numpy(np.concatenate(parts, dtype=self._widened, casting="unsafe"))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stay the same while the samples do, wherever their folder lies."""
        facts = [self.manifest.fingerprint, self.length, self.pack, self._layout.separator]
        return blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def locate(self, index: int) -> str:
        """Where a sample lies, for people."""
        check_index(index, len(self))
        spans = self._layout.spans(index) if self.pack else [self._alone(index)]
        return " and ".join(
            f"{self.manifest.shards[number].url}, tokens {start} to {stop}" for number, start, stop in spans
        )

    def _counts(self) -> list[int]:
        if self.pack:
            return self._layout.counts(range(len(self.manifest.shards) + 1))
        return [max(0, tokens - 1) // self.length for tokens in self.manifest.counts]

    def _alone(self, index: int) -> tuple[int, int, int]:
        """Shard, start and stop of a sample that lies in one shard."""
        check_index(index, len(self))
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        start = (index - int(self._firsts[number])) * self.length
        return number, start, start + self.length + 1

    def _read(self, number: int, start: int, stop: int) -> NDArray[np.integer]:
        shard = self.manifest.shards[number]
        self._sizes.check(shard)
        mapped = self._maps.get(number, lambda: self._map(shard))
        if mapped is not None:
            return mapped[start:stop]
        begin, width = int(shard.starts[1, 0]), self._dtype.itemsize
        return np.frombuffer(files.read_range(shard.url, begin + start * width, begin + stop * width), self._dtype)

    def _map(self, shard: Shard) -> NDArray[np.integer] | None:
        """A local shard in memory, None for others."""
        local = files.local_path(shard.url)
        if local is None:
            return None
        return np.asarray(
            np.memmap(local, self._dtype, mode="r", offset=int(shard.starts[1, 0]), shape=(shard.records,))
        )

    def _checked_separator(self, separator: int | None) -> int | None:
        if separator is not None:
            limits = np.iinfo(self._dtype)
            if not self.pack or not limits.min <= separator <= limits.max:
                raise ConfigError(
                    f"separator={separator} stands between joined shards of {self._dtype.name}: it needs pack=true and "
                    f"a token from {limits.min} to {limits.max}"
                )
        return separator


def checked_length(length: int) -> int:
    """``length`` if rows can have it. Raises ConfigError."""
    if length < 1:
        raise ConfigError(f"length={length}: a sample has at least one token and its target")
    return length


def check_index(index: int, size: int) -> None:
    """Raises IndexError."""
    if not 0 <= index < size:
        raise IndexError(f"sample {index}: there are {size}, from 0 on")

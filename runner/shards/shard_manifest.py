"""The manifest of shards: sizes, record counts, and the offsets of blocks.

As a file it is JSON. A shard below the manifest's folder is named relative to it, so that the folder can be moved or
copied to another store as a whole. Anyone may have written the file, so every key is checked before it is used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from posixpath import commonprefix
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.errors import DataError, printable
from runner.shards.formats import DTYPES, KINDS
from runner.storage import files

VERSION = 1

_LARGEST = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One file: its URL, its size in bytes and mark (see ``files.Stat``) at the time of the scan, and its records.

    ``starts`` has shape [2, blocks]: the number of each block's first record within the shard, and the offset in bytes
    at which the block begins. A block ends where the next block begins, or at the end of the file.
    """

    url: str
    size: int
    mark: str
    records: int
    starts: NDArray[np.int64]

    def block_of(self, record: int) -> int:
        """The number of the block that contains a record."""
        return int(self.starts[0].searchsorted(record, side="right")) - 1

    def span(self, block: int) -> tuple[int, int, int, int]:
        """First record, end record, first byte and end byte of a block."""
        first, start = self.starts[:, block].tolist()
        last = block + 1 == self.starts.shape[1]
        end, stop = (self.records, self.size) if last else self.starts[:, block + 1].tolist()
        return first, end, start, stop


@dataclass(frozen=True, eq=False)
class Manifest:
    """Shards in the order of their records. ``kind`` is one of ``formats.KINDS``; only ``tokens`` have a ``dtype``."""

    kind: str
    dtype: str | None
    shards: tuple[Shard, ...]

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """Shape [shards + 1]: the number of each shard's first record, then the number of all records."""
        return np.cumsum([0, *(shard.records for shard in self.shards)], dtype=np.int64)

    @property
    def counts(self) -> list[int]:
        """Records per shard."""
        return [shard.records for shard in self.shards]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of names, sizes and counts; independent of the folder that holds the shards."""
        urls = [shard.url for shard in self.shards]
        folder = commonprefix([url.rpartition("/")[0] + "/" for url in urls]).rpartition("/")[0] + "/"
        facts = [[s.url.removeprefix(folder), s.size, s.records] for s in self.shards]
        return blake2b(json.dumps([self.kind, self.dtype, facts]).encode(), digest_size=8).hexdigest()


def save(path: str, manifest: Manifest, *, command: str | None = None) -> None:
    """Write a manifest atomically. With a ``command`` it is incomplete, and running the command completes it."""
    folder = files.resolve(path).rpartition("/")[0] + "/"
    head = {"format": VERSION, "kind": manifest.kind, "dtype": manifest.dtype, "complete": command is None}
    if command is not None:
        head["again"] = command
    shards = ",\n".join(json.dumps(_encoded(shard, folder)) for shard in manifest.shards)
    files.write(path, f'{json.dumps(head)[:-1]}, "shards": [\n{shards}\n]}}\n'.encode())


def load(path: str, *, partial: bool = False) -> Manifest:
    """Read a manifest; an incomplete manifest only if ``partial``. Raises DataError."""
    data = files.read_range(path, 0, files.stat(path).size)
    try:
        manifest, command = _parse(data, files.resolve(path).rpartition("/")[0])
    except _Invalid as error:
        raise DataError(
            f"{path} is not a manifest of shards: {printable(error)}. Make one with python -m runner.shards PATTERN "
            "--out shards.json"
        ) from None
    if partial:
        return manifest
    if command is not None:
        raise DataError(
            f"{path} is incomplete: its scan was interrupted. Run it again, it goes on where it stopped: "
            f"{printable(command)}"
        )
    require_records(manifest.shards, path)
    return manifest


def require_records(shards: Sequence[Shard], where: str) -> None:
    """Raise DataError unless the shards contain at least one record."""
    if not any(shard.records for shard in shards):
        raise DataError(f"{where}: no record in {len(shards)} shards; give files that contain some")


def _encoded(shard: Shard, folder: str) -> dict[str, object]:
    records, offsets = shard.starts.tolist()
    return {
        "name": shard.url.removeprefix(folder),
        "size": shard.size,
        "mark": shard.mark,
        "records": shard.records,
        "starts": {"records": records, "bytes": offsets},
    }


class _Invalid(Exception):
    """A key whose value is not allowed."""


def _parse(data: bytes, folder: str) -> tuple[Manifest, str | None]:
    """The manifest in ``data``, with names relative to ``folder``, and the command that completes it (None: it is
    complete). Raises _Invalid.
    """
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Invalid(f"it is not JSON ({error})") from None
    _expect(isinstance(root, dict), "the root", "an object", root)
    _expect(type(root.get("format")) is int and root["format"] == VERSION, "format", str(VERSION), root.get("format"))
    kind, dtype = root.get("kind"), root.get("dtype")
    _expect(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
    _expect(dtype in DTYPES if kind == "tokens" else dtype is None, "dtype", "a dtype of tokens, else null", dtype)
    complete, command, items = root.get("complete"), root.get("again"), root.get("shards")
    _expect(isinstance(complete, bool), "complete", "true or false", complete)
    _expect(complete or isinstance(command, str), "again", "the command that completes it", command)
    _expect(isinstance(items, list), "shards", "a list", items)
    shards = tuple(_shard(item, f"shards[{number}]", folder) for number, item in enumerate(items))
    _expect(len({shard.url for shard in shards}) == len(shards), "shards", "each shard once", "a name twice")
    _expect(sum(s.records for s in shards) < _LARGEST, "shards", "fewer than 2^62 records", "more")
    if kind == "tokens":
        _check_tokens(shards, np.dtype(dtype).itemsize)
    return Manifest(kind, dtype, shards), None if complete else command


def _shard(item: Any, key: str, folder: str) -> Shard:
    _expect(isinstance(item, dict), key, "an object", item)
    name, mark, starts = item.get("name"), item.get("mark"), item.get("starts")
    _expect(isinstance(name, str) and name != "", f"{key}.name", "a path", name)
    _expect(isinstance(mark, str), f"{key}.mark", "a string", mark)
    size, records = _count(item.get("size"), f"{key}.size"), _count(item.get("records"), f"{key}.records")
    _expect(isinstance(starts, dict), f"{key}.starts", "an object", starts)
    firsts = _increasing(starts.get("records"), f"{key}.starts.records", records)
    offsets = _increasing(starts.get("bytes"), f"{key}.starts.bytes", size)
    _expect(len(firsts) == len(offsets), f"{key}.starts", "as many records as bytes", f"{len(firsts)}, {len(offsets)}")
    _expect(firsts[:1].tolist() == [0][:records], f"{key}.starts.records", "0 first", firsts[:1].tolist())
    absolute = "://" in name or name.startswith("/")
    return Shard(name if absolute else f"{folder}/{name}", size, mark, records, np.stack([firsts, offsets]))


def _check_tokens(shards: tuple[Shard, ...], width: int) -> None:
    for number, shard in enumerate(shards):
        start = shard.starts[1, :1].sum()
        fits = shard.starts.shape[1] <= 1 and (not shard.records or start + shard.records * width == shard.size)
        _expect(fits, f"shards[{number}]", f"tokens of {width} bytes from one start to the end", shard.records)


def _count(value: Any, key: str) -> int:
    _expect(type(value) is int and 0 <= value < _LARGEST, key, "a number from 0 to 2^62", value)
    return int(value)


def _increasing(value: Any, key: str, end: int) -> NDArray[np.int64]:
    """A list of integers in [0, end), each greater than the one before."""
    _expect(isinstance(value, list) and all(type(item) is int for item in value), key, "a list of numbers", value)
    _expect(not value or (min(value) >= 0 and max(value) < end), key, f"numbers from 0 to {end - 1}", value)
    numbers = np.array(value, dtype=np.int64)
    _expect(bool((np.diff(numbers) > 0).all()), key, "increasing numbers", value)
    return numbers


def _expect(condition: object, key: str, expected: str, value: object) -> None:
    if not condition:
        text = repr(value)
        raise _Invalid(f"{key}: expected {expected}, found {text if len(text) <= 60 else text[:60] + '...'}")

"""The manifest of shards: sizes, record counts, and where blocks begin.

As a file it is JSON. A shard below the manifest's folder is named relative to it, so that the folder can be moved or
copied to another store as a whole.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from posixpath import commonprefix

import numpy as np
from numpy.typing import NDArray

from runner.errors import DataError, printable
from runner.shards.parsing import Fault, parse
from runner.shards.shard import Shard
from runner.storage import files

VERSION = 1


@dataclass(frozen=True, eq=False)
class Manifest:
    """Shards in the order of their records. ``dtype`` is that of tokens, None for other kinds."""

    kind: str
    dtype: str | None
    shards: tuple[Shard, ...]

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """Shape [shards + 1]: the number of each shard's first record, and of all records."""
        return np.cumsum([0, *(shard.records for shard in self.shards)], dtype=np.int64)

    @property
    def counts(self) -> list[int]:
        """Records per shard."""
        return [shard.records for shard in self.shards]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of names, sizes and counts; independent of where the folder of the shards is."""
        urls = [shard.url for shard in self.shards]
        above = commonprefix([url.rpartition("/")[0] + "/" for url in urls]).rpartition("/")[0] + "/"
        facts = [[s.url.removeprefix(above), s.size, s.records] for s in self.shards]
        return blake2b(json.dumps([self.kind, self.dtype, facts]).encode(), digest_size=8).hexdigest()


def save(path: str, manifest: Manifest, *, again: str | None = None) -> None:
    """Write a manifest atomically. ``again``: it is incomplete, and this command completes it."""
    folder = files.resolve(path).rpartition("/")[0] + "/"
    head = {"format": VERSION, "kind": manifest.kind, "dtype": manifest.dtype, "complete": again is None}
    if again is not None:
        head["again"] = again
    shards = ",\n".join(json.dumps(_written(shard, folder)) for shard in manifest.shards)
    files.write(path, f'{json.dumps(head)[:-1]}, "shards": [\n{shards}\n]}}\n'.encode())


def load(path: str, *, partial: bool = False) -> Manifest:
    """Read a manifest; an incomplete one only if ``partial``. Raises DataError."""
    data = files.read_range(path, 0, files.stat(path).size)
    try:
        parsed = parse(data, files.resolve(path).rpartition("/")[0], VERSION)
    except Fault as fault:
        raise DataError(
            f"{path} is no manifest of shards: {printable(fault)}. Make one with python -m runner.shards PATTERN "
            "--out shards.json"
        ) from None
    if parsed.again is not None and not partial:
        raise DataError(
            f"{path} is incomplete: its scan was cut. Run it again, it goes on where it stopped: "
            f"{printable(parsed.again)}"
        )
    shards = parsed.shards if partial else checked(parsed.shards, path)
    return Manifest(parsed.kind, parsed.dtype, shards)


def _written(shard: Shard, folder: str) -> dict[str, object]:
    records, offsets = shard.starts.tolist()
    return {
        "name": shard.url.removeprefix(folder),
        "size": shard.size,
        "mark": shard.mark,
        "records": shard.records,
        "starts": {"records": records, "bytes": offsets},
    }


def checked(shards: Sequence[Shard], where: str) -> tuple[Shard, ...]:
    """``shards`` if they contain at least one record. Raises DataError."""
    if not any(shard.records for shard in shards):
        raise DataError(f"{where}: no record in {len(shards)} shards; give files that hold some")
    return tuple(shards)

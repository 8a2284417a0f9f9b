"""Scans of shards for their records, and the manifests in which they are kept: sizes, record counts, offsets of blocks.

A manifest is a JSON file. A shard below its folder is named relative to it, so that the folder can be moved or copied
to another store as a whole. Anyone may have written the file, so every key is checked before it is used.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing.pool import ThreadPool
from posixpath import commonprefix
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.errors import ConfigError, DataError, Interrupted, printable
from runner.hashing import json_digest
from runner.shards import formats
from runner.storage import files

VERSION = 1
CHANGED = (
    "It was changed after it was scanned. Restore it; or scan again into a new manifest for new runs: a run that began "
    "with the old one must keep it"
)
_LARGEST = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One file: its URL, its size in bytes and mark (see ``files.Stat``) when it was scanned, and its records.

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
    _checked: set[int] = field(default_factory=set, init=False, repr=False)

    def unchanged(self, number: int) -> Shard:
        """Shard ``number``. Raises DataError if its size at the first use is not that of the scan."""
        shard = self.shards[number]
        if number not in self._checked:
            if (size := files.stat(shard.url).size) != shard.size:
                raise DataError(f"{shard.url}: expected {shard.size} bytes, found {size}. {CHANGED}")
            self._checked.add(number)
        return shard

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
        return json_digest([self.kind, self.dtype, facts])


def save(path: str, manifest: Manifest, *, command: str | None = None) -> None:
    """Write a manifest atomically. With a ``command`` it is incomplete, and running the command completes it."""
    folder = files.resolve(path).rpartition("/")[0] + "/"
    head = {"format": VERSION, "kind": manifest.kind, "dtype": manifest.dtype, "complete": command is None}
    if command is not None:
        head["again"] = command

    def encoded(shard: Shard) -> str:
        starts = dict(zip(("records", "bytes"), shard.starts.tolist(), strict=True))
        name = shard.url.removeprefix(folder)
        values = {"name": name, "size": shard.size, "mark": shard.mark, "records": shard.records, "starts": starts}
        return json.dumps(values)

    shards = ",\n".join(map(encoded, manifest.shards))
    files.write(path, f'{json.dumps(head)[:-1]}, "shards": [\n{shards}\n]}}\n'.encode())


def load(path: str, *, partial: bool = False) -> Manifest:
    """Read a manifest; an incomplete manifest only if ``partial``. Raises DataError."""
    data = files.read_range(path, 0, files.stat(path).size)
    try:
        manifest, command = _parse(data, files.resolve(path).rpartition("/")[0])
    except _Invalid as error:
        remedy = "Make one with python -m runner.shards PATTERN --out shards.json"
        raise DataError(f"{path} is not a manifest of shards: {printable(error)}. {remedy}") from None
    if partial:
        return manifest
    if command is not None:
        again = "Run it again, it continues where it stopped"
        raise DataError(f"{path} is incomplete: its scan was interrupted. {again}: {printable(command)}")
    _require_records(manifest.shards, path)
    return manifest


def _require_records(shards: Sequence[Shard], where: str) -> None:
    if not any(shard.records for shard in shards):
        raise DataError(f"{where}: no record in {len(shards)} shards; give files that contain some")


class _Invalid(Exception):
    """The value of a key is not allowed."""


def _parse(data: bytes, folder: str) -> tuple[Manifest, str | None]:
    """The manifest in ``data``, with names relative to ``folder``, and the command that completes it, if any."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Invalid(f"it is not JSON ({error})") from None
    _expect(isinstance(root, dict), "the root", "an object", root)
    _expect(type(root.get("format")) is int and root["format"] == VERSION, "format", str(VERSION), root.get("format"))
    kind, dtype = root.get("kind"), root.get("dtype")
    _expect(kind in formats.KINDS, "kind", f"one of {', '.join(formats.KINDS)}", kind)
    _expect(
        dtype in formats.DTYPES if kind == "tokens" else dtype is None, "dtype", "a dtype of tokens, else null", dtype
    )
    complete, command, items = root.get("complete"), root.get("again"), root.get("shards")
    _expect(isinstance(complete, bool), "complete", "true or false", complete)
    _expect(complete or isinstance(command, str), "again", "the command that completes it", command)
    _expect(isinstance(items, list), "shards", "a list", items)
    shards = tuple(_shard(item, f"shards[{number}]", folder) for number, item in enumerate(items))
    _expect(len({shard.url for shard in shards}) == len(shards), "shards", "each shard once", "a name twice")
    _expect(sum(s.records for s in shards) < _LARGEST, "shards", "fewer than 2^62 records", "more")
    for number, shard in enumerate(shards if kind == "tokens" else ()):
        start, width = shard.starts[1, :1].sum(), np.dtype(dtype).itemsize
        fits = shard.starts.shape[1] <= 1 and (not shard.records or start + shard.records * width == shard.size)
        _expect(fits, f"shards[{number}]", f"tokens of {width} bytes from one start to the end", shard.records)
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
    # A shard without records has no blocks, and in any other the first block begins with record 0.
    _expect(firsts[:1].tolist() == [0][:records], f"{key}.starts.records", "0 first", firsts[:1].tolist())
    absolute = "://" in name or name.startswith("/")
    return Shard(name if absolute else f"{folder}/{name}", size, mark, records, np.stack([firsts, offsets]))


def _count(value: Any, key: str) -> int:
    _expect(type(value) is int and 0 <= value < _LARGEST, key, "a number from 0 to 2^62", value)
    return int(value)


def _increasing(value: Any, key: str, end: int) -> NDArray[np.int64]:
    """A list of integers in [0, end), each greater than its predecessor."""
    _expect(isinstance(value, list) and all(type(item) is int for item in value), key, "a list of numbers", value)
    _expect(not value or (min(value) >= 0 and max(value) < end), key, f"numbers from 0 to {end - 1}", value)
    numbers = np.array(value, dtype=np.int64)
    _expect(bool((np.diff(numbers) > 0).all()), key, "increasing numbers", value)
    return numbers


def _expect(condition: object, key: str, expected: str, value: object) -> None:
    if not condition:
        text = repr(value)
        raise _Invalid(f"{key}: expected {expected}, found {text if len(text) <= 60 else text[:60] + '...'}")


class Scan:
    """A scan of the shards at ``paths``, and its results so far.

    ``exclude`` is the URL of a file that is not a shard: the manifest. Hidden files are not shards either.
    """

    def __init__(
        self, paths: str | Sequence[str], *, kind: str | None = None, dtype: str | None = None, exclude: str = ""
    ) -> None:
        patterns = [paths] if isinstance(paths, str) else paths
        self._where = ", ".join(patterns)
        self._stats = {
            url: stat
            for pattern in patterns
            for url, stat in files.list_files(pattern).items()
            # a killed scan may have left a temporary file beside the manifest
            if url != exclude and not url.startswith(f"{exclude or url}.tmp-") and url.rpartition("/")[2][:1] != "."
        }
        if not self._stats:
            raise DataError(f"{self._where}: there are only hidden files; give a glob that matches the shards")
        self.kind = kind or formats.kind_of([*self._stats])
        self.dtype = formats.dtype_of([*self._stats], dtype) if self.kind == "tokens" else None
        tokens = self.dtype and partial(formats.token_blocks, dtype=self.dtype)
        self._blocks = tokens or formats.READERS[self.kind].blocks
        self._shards: dict[str, Shard] = {}  # scanned so far
        self._stop = threading.Event()

    def keep(self, earlier: Manifest) -> int:
        """Reuse the results of an earlier scan for shards that have not changed; returns the number of these shards."""
        if (earlier.kind, earlier.dtype) == (self.kind, self.dtype):
            stats = ((shard, files.Stat(shard.size, shard.mark)) for shard in earlier.shards)
            self._shards = {shard.url: shard for shard, stat in stats if self._stats.get(shard.url) == stat}
        return len(self._shards)

    @property
    def missing(self) -> dict[str, int]:
        """The sizes in bytes of the shards that are not scanned yet, by their URLs."""
        return {url: stat.size for url, stat in self._stats.items() if url not in self._shards}

    @property
    def partial(self) -> Manifest:
        """The manifest of the shards scanned so far, in the order of the listing."""
        return Manifest(self.kind, self.dtype, tuple(self._shards[url] for url in self._stats if url in self._shards))

    def run(
        self,
        *,
        jobs: int = 4,
        progress: Callable[[int], object] = lambda size: None,
        save: Callable[[], object] = lambda: None,
    ) -> Manifest:
        """Scan the missing shards; returns the complete manifest. Calls ``progress`` with numbers of bytes, and
        ``save`` after each shard. Raises DataError if there is no record.
        """
        missing = self.missing
        pool = ThreadPool(max(1, min(jobs, len(missing))))
        try:
            for shard in pool.imap_unordered(partial(self._scan, progress=progress), missing):
                self._shards[shard.url] = shard
                save()
        except BaseException:
            self._stop.set()
            pool.terminate()
            raise
        pool.close()
        pool.join()  # a process that forks later must have no other threads
        _require_records(self.partial.shards, self._where)
        return self.partial

    def _scan(self, url: str, *, progress: Callable[[int], object]) -> Shard:
        """Scan a shard, in one of the threads."""
        stat = self._stats[url]
        records = position = 0
        starts: list[tuple[int, int]] = []
        for start, count in self._blocks(url, stat.size):
            if self._stop.is_set():
                raise Interrupted("stopped")
            if count:
                starts.append((records, start))
            records += count
            progress(start - position)
            position = start
        if (now := files.stat(url).size) != stat.size:
            raise DataError(f"{url} changed while it was scanned: {stat.size} bytes, now {now}; scan it again")
        progress(stat.size - position)
        return Shard(url, stat.size, stat.mark, records, np.array(starts, dtype=np.int64).reshape(-1, 2).T)


def open_manifest(
    *, path: str | list[str] | None, manifest: str | None, kind: str | None, dtype: str | None = None
) -> Manifest:
    """Scan the shards at ``path``, or load the ``manifest`` of an earlier scan. Raises ConfigError, DataError."""
    if (path is None) == (manifest is None):
        raise ConfigError("give either path=... (shards, scanned now) or manifest=... (of python -m runner.shards)")
    if kind is not None and kind not in formats.KINDS:
        raise ConfigError(f"format={kind!r} is unknown; known formats: {', '.join(formats.KINDS)}")
    if manifest is None:
        assert path is not None
        return Scan(path, kind=kind, dtype=dtype).run()
    result = load(manifest)
    if kind not in (None, result.kind) or dtype not in (None, result.dtype):
        expected, actual = " ".join(filter(None, (kind, dtype))), " ".join(filter(None, (result.kind, result.dtype)))
        raise ConfigError(f"{manifest} lists shards of {actual}, but the configuration says {expected}")
    return result

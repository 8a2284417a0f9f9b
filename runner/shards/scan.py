"""Scan shards for their records: one pass over each shard, several shards at a time in threads."""

import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np

from runner.errors import DataError
from runner.shards import formats
from runner.shards.shard_manifest import Manifest, Shard, require_records
from runner.storage import files


def scan(paths: str | Sequence[str], *, kind: str | None = None, dtype: str | None = None, jobs: int = 4) -> Manifest:
    """Scan the shards that paths, folders and globs name; returns their manifest."""
    work = Scan(paths, kind=kind, dtype=dtype)
    work.run(jobs=jobs)
    return work.manifest


class Scan:
    """A scan of the shards at ``paths``, and its results so far.

    ``exclude`` is the URL of a file that is not a shard: the manifest. Hidden files are not shards either.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        kind: str | None = None,
        dtype: str | None = None,
        exclude: str | None = None,
    ) -> None:
        self._where = paths if isinstance(paths, str) else ", ".join(paths)
        self._stats = _listed([paths] if isinstance(paths, str) else paths, exclude)
        if not self._stats:
            raise DataError(f"{self._where}: there are only hidden files; give a glob that matches the shards")
        self.kind = kind or formats.kind_of([*self._stats])
        self.dtype = formats.dtype_of([*self._stats], dtype) if self.kind == "tokens" else None
        self._format = formats.scanner(self.kind, self.dtype)
        self._done: dict[str, Shard] = {}
        self._stop = threading.Event()

    def keep(self, earlier: Manifest) -> int:
        """Reuse the results of an earlier scan for shards that have not changed; returns the number of these shards."""
        if (earlier.kind, earlier.dtype) == (self.kind, self.dtype):
            for shard in earlier.shards:
                stat = self._stats.get(shard.url)
                if stat is not None and (stat.size, stat.mark) == (shard.size, shard.mark):
                    self._done[shard.url] = shard
        return len(self._done)

    @property
    def missing(self) -> int:
        """The number of shards that are not scanned yet."""
        return len(self._stats) - len(self._done)

    @property
    def missing_bytes(self) -> int:
        """The size in bytes of the shards that are not scanned yet."""
        return sum(stat.size for url, stat in self._stats.items() if url not in self._done)

    @property
    def partial(self) -> Manifest:
        """The manifest of the shards scanned so far, in the order of the listing."""
        return Manifest(self.kind, self.dtype, tuple(self._done[url] for url in self._stats if url in self._done))

    @property
    def manifest(self) -> Manifest:
        """The complete manifest. Raises DataError if it contains no record."""
        assert not self.missing, "run() comes first"
        require_records(self.partial.shards, self._where)
        return self.partial

    def run(self, *, jobs: int = 4, progress: Callable[[int], object] = int, save: Callable[[], object] = bool) -> None:
        """Scan the missing shards. ``progress`` is called with numbers of scanned bytes, ``save`` after each shard. An
        error or Ctrl-C stops all threads.
        """
        todo = deque(url for url in self._stats if url not in self._done)
        results: SimpleQueue[int | Shard | BaseException] = SimpleQueue()
        threads = [
            threading.Thread(target=self._work, args=(todo, results), daemon=True) for _ in range(min(jobs, len(todo)))
        ]
        try:
            for thread in threads:
                thread.start()
            while self.missing:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                if isinstance(result, int):
                    progress(result)
                else:
                    self._done[result.url] = result
                    save()
        finally:
            self._stop.set()
        for thread in threads:  # a process that forks later must have no other threads
            thread.join()

    def _work(self, todo: "deque[str]", results: "SimpleQueue[int | Shard | BaseException]") -> None:
        while not self._stop.is_set():
            try:
                url = todo.popleft()
            except IndexError:
                return
            try:
                shard = self._scanned(url, results.put)
            except BaseException as error:
                results.put(error)
                return
            if shard is not None:
                results.put(shard)

    def _scanned(self, url: str, progress: Callable[[int], None]) -> Shard | None:
        """Scan one shard; None if the scan was stopped. ``progress`` is called with numbers of scanned bytes."""
        stat = self._stats[url]
        records = position = 0
        firsts, offsets = array("q"), array("q")
        for block in self._format.blocks(url, stat.size):
            if self._stop.is_set():
                return None
            if block.records:
                firsts.append(records)
                offsets.append(block.start)
            records += block.records
            progress(block.start - position)
            position = block.start
        if (now := files.stat(url).size) != stat.size:
            raise DataError(f"{url} changed while it was scanned: {stat.size} bytes, now {now}; scan it again")
        progress(stat.size - position)
        return Shard(url, stat.size, stat.mark, records, np.array([firsts, offsets], dtype=np.int64))


def _listed(patterns: Sequence[str], exclude: str | None) -> dict[str, files.Stat]:
    """All shards, each once. A killed scan may have left a temporary file beside the manifest."""
    listed: dict[str, files.Stat] = {}
    for pattern in patterns:
        listed |= files.list_files(pattern)
    return {
        url: stat
        for url, stat in listed.items()
        if not url.rpartition("/")[2].startswith(".")
        and not (exclude and (url == exclude or url.startswith(f"{exclude}.tmp-")))
    }

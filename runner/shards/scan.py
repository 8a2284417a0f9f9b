"""Finding the records of shards, in threads, one pass over each shard."""

import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np

from runner.errors import DataError
from runner.shards import arrays, formats
from runner.shards.manifest import Manifest, checked
from runner.shards.shard import Shard
from runner.storage import files


def _nothing() -> None:
    pass


def scan(paths: str | Sequence[str], *, kind: str | None = None, dtype: str | None = None, jobs: int = 4) -> Manifest:
    """The manifest of the shards that paths, folders and globs name, held in memory."""
    one = Scan(paths, kind=kind, dtype=dtype)
    one.run(jobs=jobs)
    return one.manifest


class Scan:
    """A scan of the shards at ``paths``, and its results so far.

    ``leave_out`` is a file among them that is not a shard: the manifest. Hidden files are not shards either.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        kind: str | None = None,
        dtype: str | None = None,
        leave_out: str | None = None,
    ) -> None:
        self._where = paths if isinstance(paths, str) else ", ".join(paths)
        self._stats = _listed([paths] if isinstance(paths, str) else paths, leave_out)
        if not self._stats:
            raise DataError(f"{self._where}: there are only hidden files; give a glob that matches the shards")
        self.kind = kind or formats.kind_of([*self._stats])
        self.dtype = arrays.dtype_of([*self._stats], dtype) if self.kind == "tokens" else None
        self._format = formats.scanner(self.kind, self.dtype)
        self._done: dict[str, Shard] = {}
        self._stop = threading.Event()

    def keep(self, known: Manifest) -> int:
        """Reuse the results of an earlier scan for shards that have not changed; returns how many."""
        if (known.kind, known.dtype) == (self.kind, self.dtype):
            for shard in known.shards:
                stat = self._stats.get(shard.url)
                if stat is not None and (stat.size, stat.mark) == (shard.size, shard.mark):
                    self._done[shard.url] = shard
        return len(self._done)

    @property
    def missing(self) -> int:
        """Shards not scanned yet."""
        return len(self._stats) - len(self._done)

    @property
    def missing_bytes(self) -> int:
        """Their size."""
        return sum(stat.size for url, stat in self._stats.items() if url not in self._done)

    @property
    def known(self) -> Manifest:
        """What is known so far, in the order of the listing."""
        return Manifest(self.kind, self.dtype, tuple(self._done[url] for url in self._stats if url in self._done))

    @property
    def manifest(self) -> Manifest:
        """The whole. Raises DataError when there is no record in it."""
        assert not self.missing, "run() comes first"
        found = self.known
        return Manifest(found.kind, found.dtype, checked(found.shards, self._where))

    def run(self, *, jobs: int = 4, passed: Callable[[int], object] = int, save: Callable[[], None] = _nothing) -> None:
        """Scan what is missing. ``passed`` is called with numbers of scanned bytes, ``save`` after each shard. An error
        or Ctrl-C stops all threads.
        """
        todo = deque(url for url in self._stats if url not in self._done)
        told: SimpleQueue[int | Shard | BaseException] = SimpleQueue()
        threads = [
            threading.Thread(target=self._work, args=(todo, told), daemon=True) for _ in range(min(jobs, len(todo)))
        ]
        try:
            for thread in threads:
                thread.start()
            while self.missing:
                news = told.get()
                if isinstance(news, BaseException):
                    raise news
                if isinstance(news, int):
                    passed(news)
                else:
                    self._done[news.url] = news
                    save()
        finally:
            self._stop.set()
        for thread in threads:  # they are done; a process must have no others when it forks
            thread.join()

    def _work(self, todo: "deque[str]", told: "SimpleQueue[int | Shard | BaseException]") -> None:
        while not self._stop.is_set():
            try:
                url = todo.popleft()
            except IndexError:
                return
            try:
                shard = self._scanned(url, told.put)
            except BaseException as error:
                told.put(error)
                return
            if shard is not None:
                told.put(shard)

    def _scanned(self, url: str, tell: Callable[[int], None]) -> Shard | None:
        """Scan one shard; None if the scan was stopped. ``tell`` is called with numbers of scanned bytes."""
        stat = self._stats[url]
        records = passed = 0
        firsts, offsets = array("q"), array("q")
        for block in self._format.blocks(url, stat.size):
            if self._stop.is_set():
                return None
            if block.records:
                firsts.append(records)
                offsets.append(block.start)
            records += block.records
            tell(block.start - passed)
            passed = block.start
        if (now := files.stat(url).size) != stat.size:
            raise DataError(f"{url} changed while it was scanned: {stat.size} bytes, now {now}; scan it again")
        tell(stat.size - passed)
        return Shard(url, stat.size, stat.mark, records, np.array([firsts, offsets], dtype=np.int64))


def _listed(patterns: Sequence[str], leave_out: str | None) -> dict[str, files.Stat]:
    """All files, each once. Beside the manifest may lie what a killed scan left of it."""
    found: dict[str, files.Stat] = {}
    for pattern in patterns:
        found |= files.listing(pattern)
    return {
        url: stat
        for url, stat in found.items()
        if not url.rpartition("/")[2].startswith(".")
        and not (leave_out and (url == leave_out or url.startswith(f"{leave_out}.tmp-")))
    }

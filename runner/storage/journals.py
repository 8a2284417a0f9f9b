"""One journal after the other, so that none grows without end."""

from collections import deque

from runner.storage.location import Journal, Location


class Journals:
    """Journals of one writer; ``size`` bytes were appended to the last one since it was begun.

    One thread may call ``flush`` while another appends and begins.
    """

    def __init__(self, location: Location) -> None:
        self.size = 0
        self._location = location
        self._open: deque[Journal] = deque()  # the last one grows; those before it wait for their flush

    def begin(self, name: str, head: bytes) -> None:
        """Go on in a new object that starts with ``head``. Raises StorageError, and then the last one grows on."""
        journal = self._location.journal(name)
        journal.append(head)
        self._open.append(journal)
        self.size = 0

    def append(self, data: bytes) -> None:
        """Add to the last one; never fails, as ``Journal.append``."""
        self._open[-1].append(data)
        self.size += len(data)

    def flush(self) -> None:
        """Make everything so far durable. Raises StorageError, after which it can be called again."""
        while True:
            journal, full = self._open[0], len(self._open) > 1
            journal.sync()
            if not full:
                return
            self._open.popleft().close()

    def close(self) -> None:
        """Let go of them, without a promise for what was not flushed."""
        while self._open:
            self._open.popleft().close()

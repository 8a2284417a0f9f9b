"""A sweep's request to its jobs to stop, sent through the storage that all of them write to.

Signals reach only processes of the same machine. The request is an object under the root of the runs. It exists from
the moment when the sweep receives a signal until the sweep has ended.
"""

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from runner import signals
from runner.errors import StorageError
from runner.storage import open_location
from runner.storage.location import Location

VARIABLE = "HYDRA_RUNNER_SWEEP"  # environment variable of a job: the name of its sweep's request

_LIMIT = 1 << 10
_LISTEN_SECONDS = 0.2
_parents: dict[int, int] = {}  # pid -> pid of its parent at the first call of ``orphaned``


@dataclass(frozen=True, slots=True)
class StopRequest:
    """The stop request of one sweep; every sweep uses a new name."""

    location: Location
    name: str

    @classmethod
    def new(cls, root: str, options: Mapping[str, Any] | None) -> "StopRequest":
        """A request with a new name under the root of the runs. Writes nothing."""
        return cls(open_location(root, options), f"s{secrets.token_hex(8)}")

    @classmethod
    def from_environment(cls, root: str, options: Mapping[str, Any] | None) -> "StopRequest | None":
        """The request that this process has to obey; None if no sweep started it."""
        name = os.environ.get(VARIABLE)
        return cls(open_location(root, options), name) if name else None

    @contextmanager
    def forward_signals(self) -> Iterator[None]:
        """Within the block, write the request once this process has received a stop signal."""

        def forward() -> bool:
            if name := signals.received():
                self.location.replace(self._object, [name.encode()])
            return name is not None

        with _repeating(forward, _LISTEN_SECONDS):
            yield

    def withdraw(self) -> None:
        """Remove the request, after the last job that could obey it has ended."""
        with suppress(StorageError):
            self.location.remove(self._object)

    @contextmanager
    def obey(self) -> Iterator[None]:
        """Within the block, the request stops this process like a signal. So does the death of its parent, because then
        nobody else could stop it.
        """
        orphaned()  # remembers the parent
        with suppress(StorageError):
            self._check()
        with _repeating(self._check, self.location.beat_seconds):
            yield

    @property
    def _object(self) -> str:
        return f"sweeps/{self.name}.stop"

    def _check(self) -> bool:
        stop = orphaned() or self.location.read(self._object, limit=_LIMIT) is not None
        if stop:
            signals.request("SIGTERM")
        return stop


def orphaned() -> bool:
    """Whether the parent that this process had at the first call is gone."""
    return _parents.setdefault(os.getpid(), os.getppid()) != os.getppid()


@contextmanager
def _repeating(action: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Within the block, call ``action`` every ``seconds`` in a thread until it returns True."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            with suppress(StorageError):
                if action():
                    return

    thread = threading.Thread(target=work, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()

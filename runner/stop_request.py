"""A sweep's request to its jobs to stop, sent through the storage that all of them write to.

Signals reach only processes of the same machine. The request is an object under the root of the runs; it exists from
the moment the sweep receives a signal until the sweep has ended.
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
_parent: dict[int, int] = {}  # pid -> pid of its parent when it began its first job


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
        """The request that this process has to obey, if a sweep started it."""
        name = os.environ.get(VARIABLE)
        return cls(open_location(root, options), name) if name else None

    @contextmanager
    def forward_signals(self) -> Iterator[None]:
        """Within the block, a stop signal that this process receives is written as the request."""
        with _repeated(self._pass_on, _LISTEN_SECONDS):
            yield

    def withdraw(self) -> None:
        """Remove the request once no job is left that could obey it."""
        with suppress(StorageError):
            self.location.remove(self._object)

    @contextmanager
    def obey(self) -> Iterator[None]:
        """Within the block, the request stops this process as a signal would. So does the death of the parent process,
        after which nobody could stop this one.
        """
        orphaned()  # notes the parent
        with suppress(StorageError):
            self._obey()
        with _repeated(self._obey, self.location.beat_seconds):
            yield

    @property
    def _object(self) -> str:
        return f"sweeps/{self.name}.stop"

    def _pass_on(self) -> bool:
        name = signals.received()
        if name:
            self.location.replace(self._object, [name.encode()])
        return name is not None

    def _obey(self) -> bool:
        stop = orphaned() or self.location.read(self._object, limit=_LIMIT) is not None
        if stop:
            signals.request("SIGTERM")
        return stop


def orphaned() -> bool:
    """Whether the parent that this process had at the first call is gone."""
    return _parent.setdefault(os.getpid(), os.getppid()) != os.getppid()


@contextmanager
def _repeated(action: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Within the block, call ``action`` every ``seconds`` in a thread until it returns True."""
    ended = threading.Event()

    def work() -> None:
        done = False
        while not done and not ended.wait(seconds):
            with suppress(StorageError):
                done = action()

    thread = threading.Thread(target=work, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()

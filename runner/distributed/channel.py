"""Exchanges of small values over the store in which the processes met: one channel for each thread that has some."""

import json
import time
from collections.abc import Sequence
from typing import Any

from torch._C._distributed_c10d import Store

from runner.distributed.watch import Watch
from runner.distributed.world import World
from runner.errors import RunnerError

_SHORTEST, _LONGEST = 0.0001, 0.02  # seconds between two looks


class OthersFailed(RunnerError):
    """Another process of the run failed, which it tells itself; this one ends with the same status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Channel:
    """Implements ``ranks.Ranks``. Every exchange has a number; what was read by all is removed, so that nothing grows.

    All processes take part in every exchange, in the same order. Raises OthersFailed once one of them has failed.
    """

    def __init__(self, store: Store, world: World, watch: Watch, *, thread: str) -> None:
        self.rank = world.rank
        self.size = world.size
        self._store = store
        self._watch = watch
        self._thread = thread  # for which it is
        self._awaited: int | None = None  # the rank that it waits for
        self._number = 0

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks in order, for rank 0."""
        names = self._names()
        if self.rank:
            self._store.set(names[self.rank], json.dumps(value))
            return None
        return [value, *(self._taken(name, rank) for rank, name in enumerate(names[1:], 1))]

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, for all."""
        name = self._names()[0]
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
            return value
        found = self._read(name, 0)
        if self._store.add(f"{name}/read", 1) == self.size - 1:
            self._store.delete_key(name)
            self._store.delete_key(f"{name}/read")
        return found

    def awaited(self) -> str:
        rank = self.rank if self._awaited is None else self._awaited
        return self._watch.whereabouts(rank, self._thread)

    def _names(self) -> Sequence[str]:
        self._watch.met(self._thread)
        self._number += 1
        return [f"{self._number}/{rank}" for rank in range(self.size)]

    def _taken(self, name: str, rank: int) -> Any:
        found = self._read(name, rank)
        self._store.delete_key(name)
        return found

    def _read(self, name: str, rank: int) -> Any:
        pause, self._awaited = _SHORTEST, rank
        while not self._store.check([name]):
            raise_if_failed(self._watch)
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST)
        self._awaited = None
        return json.loads(self._store.get(name))


def raise_if_failed(watch: Watch) -> None:
    """Raise OthersFailed once a process has failed."""
    if watch.failure is not None:
        raise OthersFailed(watch.failure.message, watch.failure.status)

"""Exchanges of small JSON values between the processes of a run, with one channel per thread that needs them."""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Store

from runner.distributed.watch import MAIN, Watch
from runner.distributed.world import World
from runner.errors import RunnerError

_SHORTEST, _LONGEST = 0.0001, 0.02  # seconds between two looks at the store
_FIRST_BYTES = 256  # of a broadcast over a process group: its length, and as much of the message as fits
_LENGTH_BYTES = 4


class OthersFailed(RunnerError):
    """Another process of the run failed and prints why; this one ends with the same exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Channel:
    """Implements ``ranks.Ranks`` over a key-value store.

    Every exchange has a number, from which its keys are made; keys are removed once all have read them. Raises
    OthersFailed once another process has failed.
    """

    def __init__(self, store: Store, world: World, watch: Watch, *, thread: str) -> None:
        self.rank = world.rank
        self.size = world.size
        self._store = store
        self._watch = watch
        self._thread = thread  # that uses this channel
        self._awaited: int | None = None  # the rank that this one is waiting for
        self._number = 0  # of exchanges so far

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks in order, for rank 0."""
        names = self._names()
        if self.rank:
            self._store.set(names[self.rank], json.dumps(value))
            return None
        return [value, *(self._take(name, rank) for rank, name in enumerate(names[1:], 1))]

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

    def _take(self, name: str, rank: int) -> Any:
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


class GroupChannel(Channel):
    """The channel of the training thread, which exchanges values at every step: it broadcasts over a process group on
    the CPU, which takes a tenth of the time of the store.
    """

    def __init__(self, store: Store, world: World, watch: Watch, group: ProcessGroup) -> None:
        super().__init__(store, world, watch, thread=MAIN)
        self._group = group

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, for all."""
        self._watch.met(MAIN)
        text = json.dumps(value).encode() if self.rank == 0 else b""
        text = len(text).to_bytes(_LENGTH_BYTES, "big") + text
        head = self._broadcast_bytes(text[:_FIRST_BYTES].ljust(_FIRST_BYTES, b"\0"))
        length = int.from_bytes(head[:_LENGTH_BYTES], "big")
        body, rest = head[_LENGTH_BYTES:], length + _LENGTH_BYTES - _FIRST_BYTES
        if rest > 0:
            body += self._broadcast_bytes(text[_FIRST_BYTES:].ljust(rest, b"\0"))
        return json.loads(body[:length])

    def _broadcast_bytes(self, text: bytes) -> bytes:
        """The bytes of rank 0; ``text`` has the same length on all ranks."""
        buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self._group)
        return buffer.numpy().tobytes()


def raise_if_failed(watch: Watch) -> None:
    """Raise OthersFailed once a process has failed."""
    if watch.failure is not None:
        raise OthersFailed(watch.failure.message, watch.failure.status)

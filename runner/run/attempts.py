"""One attempt at a run, which is the life of one process (or team of processes), from the claim to the end.

Attempt numbers only grow. A process that finds a higher number than its own has been superseded.
"""

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from runner import signals
from runner.errors import RunInUse, StorageError, Superseded, redacted
from runner.run import records
from runner.run.heartbeat import Heartbeat, dump, now
from runner.run.records import Name, Record
from runner.storage.location import Location, Lock

_CHANCE = secrets.SystemRandom()  # not the global generator, which is part of the run's state
_PAUSE_SECONDS = 0.005
_REMEDY = (
    "\nWait for it with run.on_conflict=wait, or take the run over with run.on_conflict=steal "
    "(the other stops within seconds)."
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The newest attempt of the run. Holds a lock while its process lives, and writes a heartbeat."""

    location: Location
    name: Name
    _lock: Lock
    _heart: Heartbeat

    @property
    def number(self) -> int:
        """The attempt's number."""
        return self.name.number

    def note(self, step: int) -> None:
        """Put the step into the next heartbeat; costs nothing."""
        self._heart.note(step=step)

    def beat(self, **facts: Any) -> None:
        """Put these facts into all further heartbeats, and write one now."""
        self._heart.note(**facts)
        self._heart.beat()

    def raise_if_superseded(self) -> None:
        """Raise Superseded or RunGone if the heartbeat's thread has found a newer attempt, or has not found this one's
        claim for long; costs nothing.
        """
        self._heart.raise_if_gone()
        self._raise_if(self._heart.superseded)

    def require_newest(self) -> None:
        """Raise Superseded if there is a newer attempt. Asks the storage; raises StorageError, and RunGone."""
        self._raise_if(self.successor())

    def successor(self) -> Record | None:
        """The attempt that superseded this one, if any has. Asks the storage; raises StorageError, and RunGone."""
        self._heart.raise_if_gone()
        return records.successor(self.location, self.name)

    def _raise_if(self, newer: Record | None) -> None:
        if newer is not None:
            raise Superseded(
                f"{newer.owner()} took over {self.location.url}; this process stops. "
                "What it did after its last checkpoint is not used."
            )

    def end(self, outcome: str, **facts: Any) -> None:
        """Record how this attempt ended and release the run."""
        self._heart.stop()
        told = {key: redacted(fact) if isinstance(fact, str) else fact for key, fact in facts.items()}
        record = self._heart.facts() | told | {"outcome": outcome}
        try:
            if self.name in records.names(self.location):  # else the directory of a removed run would be made again
                self.location.replace(f"{self.name}.end.json", [dump(record)])
        finally:
            self._lock.release()

    def withdraw(self) -> None:
        """Undo the claim; only for an attempt that has changed nothing."""
        self._heart.stop()
        _withdraw(self.location, self.name, self._lock)
        self.location.remove(f"{self.name}.beat")


def claim(location: Location, facts: dict[str, Any], *, above: int = 0, steal: bool = False) -> Attempt:
    """Become the newest attempt of the run, with a number greater than ``above``. Raises RunInUse while the newest
    attempt lives; with ``steal``, that one finds itself superseded at its next heartbeat or commit instead.

    The storage need not support exclusive creation. Each claim is an object with a name of its own, and its process
    owns the run if a listing *after* the write shows exactly what a listing before it showed, plus its own claim. Two
    processes cannot both own the run: of two that wrote, the one that lists last sees the other's claim. A process that
    sees another claim withdraws its own and starts over, so abandoned claims do not stay. It gives up for good only if
    it sees a live attempt, so one process wins.
    """
    dead: set[Name] = set()
    for tries in count():
        signals.raise_if_received("during start-up, nothing to commit")
        before = records.names(location)
        if not steal:
            _raise_if_live(location, before, dead, remedy=_REMEDY)
        attempt = _try(location, facts, before, above)
        if attempt is not None:
            return attempt
        time.sleep(_CHANCE.uniform(0, min(_PAUSE_SECONDS * 2 ** min(tries, 16), location.beat_seconds)))
    raise AssertionError("unreachable")


def raise_if_live(location: Location) -> None:
    """Raise RunInUse if the process of the newest attempt lives."""
    _raise_if_live(location, records.names(location), set())


def _raise_if_live(location: Location, found: list[Name], dead: set[Name], *, remedy: str = "") -> None:
    record = records.live(location, found, dead=dead)
    if record is not None:
        raise RunInUse(f"{location.url} is in use by {record.owner()}.{remedy}")


def _try(location: Location, facts: dict[str, Any], before: list[Name], above: int) -> Attempt | None:
    """Claim the next number; None if the claims differ from those of ``before`` by more than this one."""
    name = Name(max([above, *(name.number for name in before)]) + 1, secrets.token_hex(6))
    if name.number > records.HIGHEST:
        raise StorageError(f"{location.url}: no attempt can follow number {name.number - 1}, which no run has reached")
    lock = location.lock(f"{name}.lock")  # before the claim, so that nobody sees a living process's claim unlocked
    assert lock is not None, "nobody else has this name"
    try:
        location.put(f"{name}.json", [dump(_self(location) | facts | {"attempt": name.number})])
        alone = records.names(location) == [*before, name]
    except BaseException:
        with suppress(StorageError):
            _withdraw(location, name, lock)
        raise
    if alone:
        return Attempt(location, name, lock, Heartbeat(location, name))
    _withdraw(location, name, lock)
    return None


def _withdraw(location: Location, name: Name, lock: Lock) -> None:
    try:
        location.remove(f"{name}.json")
        location.remove(f"{name}.lock")
    finally:
        lock.release()


def _self(location: Location) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": records.machine(location),
        "pid": os.getpid(),
        "started": now(),
        "beat": location.beat_seconds,
        "cluster": records.cluster_job(),
    }

"""One attempt at a run, which is the life of one process (or team of processes), from the claim to the end.

Attempt numbers only grow. A process that finds a higher number than its own has been superseded. A thread writes
heartbeats, which show to other machines that the attempt lives, and looks for higher numbers.
"""

import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from typing import Any

from runner import signals
from runner.errors import RunGone, RunInUse, StorageError, Superseded, redacted
from runner.run import attempt_records
from runner.run.attempt_records import AttemptRecord, ClaimName, encode
from runner.storage.location import Location, Lock

log = logging.getLogger("runner")

GONE_SECONDS = 10.0  # within which a run directory that was moved away may come back
_FEW = 25  # attempts: their claims are listed at every beat, those of more attempts less often
_PATIENCE_SECONDS = 0.2
_JOIN_SECONDS = 1.0
_RANDOM = secrets.SystemRandom()  # not the global generator, which is part of the run's state
_PAUSE_SECONDS = 0.005  # before the second try to claim; twice as long before each further one
_REMEDY = (
    "\nWait for it with run.on_conflict=wait, or take the run over with run.on_conflict=steal "
    "(the other stops within seconds)."
)


class Heartbeat:
    """Writes ``attempts/<name>.beat`` every ``location.beat_seconds``, and ignores errors of the storage.

    ``superseded`` is the attempt that took over the run, once there is one. ``gone_since``: since when the claim is
    gone (``time.monotonic``); meanwhile nothing is written, because a heartbeat would create the folder of a removed
    run again. The thread takes no lock but its own, which forked data workers never use: a fork cannot deadlock.
    """

    def __init__(self, location: Location, name: ClaimName) -> None:
        self.superseded: AttemptRecord | None = None
        self._location = location
        self._name = name
        self._facts: dict[str, Any] = {}
        self._sequence = 0
        self.gone_since: float | None = None
        self._warned = False
        self._requests = self._served = 0  # calls of ``beat``
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, **facts: Any) -> None:
        """Put these facts into all further heartbeats; costs nothing."""
        self._facts.update(facts)

    def facts(self) -> dict[str, Any]:
        """All facts noted so far, with the current time."""
        return {**self._facts, "time": now()}

    def beat(self) -> None:
        """Write a heartbeat now. Waits for it only a moment, in case the storage does not answer."""
        with self._changed:
            self._requests = request = self._requests + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._served >= request, timeout=_PATIENCE_SECONDS)

    def raise_if_gone(self) -> None:
        """Raise RunGone if the claim has not been in the run directory for ``GONE_SECONDS``; costs nothing."""
        since = self.gone_since
        if since is None:
            self._warned = False
            return
        gone = f"{self._location.url} was moved, removed or replaced: attempt {self._name.number}, this process, is not"
        if time.monotonic() - since > GONE_SECONDS:
            raise RunGone(
                f"{gone} in it, and has not been for {GONE_SECONDS:.0f} seconds. Nothing was written there since. If "
                "the directory is somewhere else, move it back and run the same command again; else that begins anew."
            )
        if not self._warned:
            log.warning("%s in it. Waiting %.0f seconds for it to come back", gone, GONE_SECONDS)
        self._warned = True

    def stop(self) -> None:
        """End the thread; one that still waits for the storage is abandoned."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stopped:
            request = self._requests
            self._look()
            if self.gone_since is None:
                self._sequence += 1
                beat = encode({"sequence": self._sequence, **self.facts()})
                with suppress(StorageError):
                    self._location.replace(f"{self._name}.beat", [beat], durable=False)
            with self._changed:
                self._served = request
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._stopped or self._requests > self._served, timeout=self._location.beat_seconds
                )

    def _look(self) -> None:
        """Look for a newer attempt, and for the own claim."""
        skip = self.gone_since is None and self._sequence % (1 + self._name.number // _FEW)
        if self.superseded is None and not skip:
            try:
                self.superseded = attempt_records.successor(self._location, self._name)
                self.gone_since = None
            except attempt_records.ClaimGone:
                self.gone_since = self.gone_since or time.monotonic()
            except StorageError:
                pass  # an outage says nothing of the claim


def now() -> str:
    """The current time as records contain it (ISO 8601, UTC)."""
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Attempt:
    """The newest attempt of the run. Holds a lock while its process lives, and writes a heartbeat."""

    location: Location
    name: ClaimName
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

    def successor(self) -> AttemptRecord | None:
        """The attempt that superseded this one, if any has. Asks the storage; raises StorageError, and RunGone."""
        self._heart.raise_if_gone()
        return attempt_records.successor(self.location, self.name)

    def _raise_if(self, newer: AttemptRecord | None) -> None:
        if newer is not None:
            raise Superseded(
                f"{newer.owner()} took over {self.location.url}; this process stops. "
                "What it did after its last checkpoint is not used."
            )

    def end(self, outcome: str, **facts: Any) -> None:
        """Record how this attempt ended and release the run."""
        self._heart.stop()
        shown = {key: redacted(fact) if isinstance(fact, str) else fact for key, fact in facts.items()}
        record = self._heart.facts() | shown | {"outcome": outcome}
        try:
            # Where the claim is gone, the record would create the directory of a removed run again.
            if self.name in attempt_records.names(self.location):
                self.location.replace(f"{self.name}.end.json", [encode(record)])
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
    dead: set[ClaimName] = set()
    for tries in count():
        signals.raise_if_received("during start-up, nothing to commit")
        before = attempt_records.names(location)
        if not steal:
            _raise_if_live(location, before, dead, remedy=_REMEDY)
        attempt = _try(location, facts, before, above)
        if attempt is not None:
            return attempt
        time.sleep(_RANDOM.uniform(0, min(_PAUSE_SECONDS * 2 ** min(tries, 16), location.beat_seconds)))
    raise AssertionError("unreachable")


def raise_if_live(location: Location) -> None:
    """Raise RunInUse if the process of the newest attempt lives."""
    _raise_if_live(location, attempt_records.names(location), set())


def _raise_if_live(location: Location, claims: list[ClaimName], dead: set[ClaimName], *, remedy: str = "") -> None:
    record = attempt_records.live(location, claims, dead=dead)
    if record is not None:
        raise RunInUse(f"{location.url} is in use by {record.owner()}.{remedy}")


def _try(location: Location, facts: dict[str, Any], before: list[ClaimName], above: int) -> Attempt | None:
    """Claim the next number; None if the claims differ from those of ``before`` by more than this one."""
    name = ClaimName(max([above, *(name.number for name in before)]) + 1, secrets.token_hex(6))
    if name.number > attempt_records.HIGHEST:
        raise StorageError(f"{location.url}: no attempt can follow number {name.number - 1}, which no run has reached")
    lock = location.lock(f"{name}.lock")  # before the claim, so that nobody sees a living process's claim unlocked
    assert lock is not None, "nobody else has this name"
    own = {
        "host": socket.gethostname(),
        "machine": attempt_records.machine(location),
        "pid": os.getpid(),
        "started": now(),
        "beat": location.beat_seconds,
        "cluster": attempt_records.cluster_job(),
    }
    try:
        location.put(f"{name}.json", [encode(own | facts | {"attempt": name.number})])
        alone = attempt_records.names(location) == [*before, name]
    except BaseException:
        with suppress(StorageError):
            _withdraw(location, name, lock)
        raise
    if alone:
        return Attempt(location, name, lock, Heartbeat(location, name))
    _withdraw(location, name, lock)
    return None


def _withdraw(location: Location, name: ClaimName, lock: Lock) -> None:
    try:
        location.remove(f"{name}.json")
        location.remove(f"{name}.lock")
    finally:
        lock.release()

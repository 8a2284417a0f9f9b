"""The attempts at a run. An attempt is the life of one process (or team of processes), from its claim to its end.

    attempts/000003-<nonce>.json       the claim: who, where, since when; its number is the fencing token
    attempts/000003-<nonce>.lock       locked by the process as long as it lives
    attempts/000003-<nonce>.beat       where it is: step, last committed step; a hint, never trusted
    attempts/000003-<nonce>.end.json   how it ended; absent after a kill
    attempts/000003-<nonce>.code.json  what code it runs (run.code)

Attempt numbers only grow: a process that finds a number above its own has been superseded. Anyone may have written
these objects. Content that cannot be parsed is ignored, but the name of a claim counts.
"""

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from runner import signals
from runner.errors import RunGone, RunInUse, StorageError, Superseded, printable, redacted
from runner.plain import parse_object
from runner.storage.location import Location, Lock

log = logging.getLogger("runner")

HIGHEST = 10**15 - 1  # the last number for an attempt: names have at most 15 digits
GONE_SECONDS = 10.0  # a run directory that was moved away may come back within this time
_CLAIM = re.compile(r"([0-9]{6,15})-([0-9a-f]{12})\.json")
_LIMIT = 1 << 20  # bytes of a record
_BEAT_SECONDS = (0.1, 5.0)  # bounds for the interval in a claim, which anyone may have written
_MOST_WITH_ONE_NUMBER = 1000  # claims: processes that start at once make few, and a killed process leaves its claim
_SILENT_BEATS = 3  # an attempt whose heartbeat has not changed for so many intervals counts as dead
_SLACK_SECONDS = 0.5  # added to these intervals, in case the storage is slow
_FEW_ATTEMPTS = 25  # their claims are listed at every beat; the claims of more attempts less often
_WRITE_SECONDS = 0.2  # ``Attempt.beat`` delays the training thread by at most this
_JOIN_SECONDS = 1.0  # the heartbeat's thread may hang in the storage
_RANDOM = secrets.SystemRandom()  # not the global generator, which is part of the run's state
_PAUSE_SECONDS = 0.005  # at most so long before the second try to claim; doubled before each further try
_REMEDY = (
    "\nWait for it with run.on_conflict=wait, or take the run over with run.on_conflict=steal "
    "(the other stops within seconds)."
)


class ClaimName(NamedTuple):
    """The name of a claim without its suffix; ordered by number."""

    number: int
    nonce: str

    def __str__(self) -> str:
        return f"attempts/{self.number:06d}-{self.nonce}"


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """The records of one attempt. ``end`` is None if it lives or was killed."""

    location: Location
    name: ClaimName
    claim: dict[str, Any]
    beat: dict[str, Any]
    end: dict[str, Any] | None

    @property
    def number(self) -> int:
        return self.name.number

    def owner(self) -> str:
        """Attempt, pid and host, for a message."""
        return printable(f"attempt {self.number} (pid {self.claim.get('pid')} on {self.claim.get('host')})")

    def alive(self) -> bool | None:
        """Whether its process lives; None if this machine cannot tell without watching its heartbeat."""
        if self.end is not None:
            return False
        if self.location.is_locked(f"{self.name}.lock"):
            return True
        return False if self.claim.get("machine") == machine(self.location) else None

    @property
    def silence_limit(self) -> float:
        """The seconds after which an attempt whose heartbeat has not changed counts as dead."""
        interval = self.claim.get("beat")
        if not isinstance(interval, int | float) or interval != interval:
            interval = self.location.beat_seconds
        return _SILENT_BEATS * min(max(interval, _BEAT_SECONDS[0]), _BEAT_SECONDS[1]) + _SLACK_SECONDS

    def is_alive_by_heartbeat(self, since: float | None = None) -> bool:
        """Whether its process lives. If ``alive`` cannot tell, watches for three beats whether its heartbeat changes,
        from ``since`` (``time.monotonic``, a moment after the record was read) on. Uses only this process's clock,
        because clocks of two machines need not agree. Raises Interrupted after a stop signal.
        """
        until = (since or time.monotonic()) + self.silence_limit
        now, alive, ended = self, self.alive(), False
        while alive is None and now.beat == self.beat and not ended:
            signals.raise_if_received("while watching whether another attempt lives")
            ended = time.monotonic() >= until  # then this is the last look
            if not ended:
                time.sleep(self.silence_limit / 16)  # about five looks at each beat
            again = read(self.location, self.name)
            if again is None:  # it withdrew its claim
                return False
            now, alive = again, again.alive()
        return now.beat != self.beat if alive is None else alive

    def last_sign(self) -> str | None:
        """The time of its last sign of life (ISO 8601, UTC)."""
        return (self.end or self.beat).get("time") or self.claim.get("started")

    def outcome(self) -> str:
        """How it ended, in a word or two."""
        if self.end is not None:
            return printable(self.end.get("outcome"))
        return {True: "running", False: "killed", None: "unknown (another host)"}[self.alive()]

    def ending(self, key: str) -> Any:
        """A value of the record of its end; None while there is no such record."""
        return (self.end or {}).get(key)


def encode(record: dict[str, Any], *, allow_nan: bool = True) -> bytes:
    """A record as it is stored. Raises ValueError for NaN and infinity, unless ``allow_nan``."""
    return json.dumps(record, indent=1, allow_nan=allow_nan).encode() + b"\n"


def names(location: Location) -> list[ClaimName]:
    """The names of all claims, oldest first."""
    matches = (_CLAIM.fullmatch(entry.name) for entry in location.list("attempts"))
    return sorted(ClaimName(int(match[1]), match[2]) for match in matches if match)


def read(location: Location, name: ClaimName) -> AttemptRecord | None:
    """The record of one attempt; None if it has no claim. Content that cannot be parsed counts as empty."""
    claim = location.read(f"{name}.json", limit=_LIMIT)
    if claim is None:
        return None
    beat = parse_object(location.read(f"{name}.beat", limit=_LIMIT) or b"")
    end = parse_object(location.read(f"{name}.end.json", limit=_LIMIT) or b"")
    return AttemptRecord(location, name, parse_object(claim) or {}, beat or {}, end)


def history(location: Location) -> list[AttemptRecord]:
    """All attempts, oldest first."""
    return [record for name in names(location) if (record := read(location, name))]


def newest(location: Location, *, before: int | None = None) -> AttemptRecord | None:
    """The newest attempt, or the newest with a number below ``before``, if there is one.

    If two have the same number, one was killed while it withdrew, and only the other ever trained.
    """
    highest = _newest(location, [name for name in names(location) if before is None or name.number < before])
    records = [record for name in highest if (record := read(location, name))]
    return max(records, key=lambda record: bool(record.end or record.beat), default=None)


def live(location: Location, claims: list[ClaimName], *, dead: set[ClaimName]) -> AttemptRecord | None:
    """The newest attempt among ``claims`` if its process lives, else None.

    Adds dead attempts to ``dead``, and does not look again at attempts that are in it already.
    """
    unknown = [name for name in _newest(location, claims) if name not in dead]
    records = [(name, read(location, name), time.monotonic()) for name in unknown]  # to watch them at the same time
    for name, record, since in records:
        if record is not None and record.is_alive_by_heartbeat(since):
            return record
        dead.add(name)
    return None


def _newest(location: Location, claims: list[ClaimName]) -> list[ClaimName]:
    """The claims with the highest number."""
    highest = max(claims).number if claims else 0
    newest = [name for name in claims if name.number == highest]
    if len(newest) > _MOST_WITH_ONE_NUMBER:
        raise StorageError(f"{location.url}/attempts has {len(newest)} claims of attempt {highest}, which no run makes")
    return newest


def successor(location: Location, mine: ClaimName) -> AttemptRecord | None:
    """The newest attempt with a higher number than the claim ``mine``, if there is one. Raises ClaimGone if ``mine``
    is gone, because then nothing must be written to the run directory any more.

    Looks twice, because a process that finds the run in use withdraws the claim that it has just made.
    """
    claims = set(names(location))
    if mine not in claims:
        raise ClaimGone(f"{location.url} was moved or removed: attempt {mine.number}, this process, is not in it")
    higher = {name for name in claims if name.number > mine.number}
    if higher:
        time.sleep(location.beat_seconds / 2)
        higher &= {*names(location)}
    return read(location, max(higher)) if higher else None


class ClaimGone(StorageError):
    """A claim is not where its process wrote it."""


def machine(location: Location) -> str:
    """A name of this machine such that processes with the same name see each other's locks, until it is rebooted. A
    container, another user, or a job with its own temporary folder that cannot see the same locks has another name.
    """
    boot = namespace = "?"  # elsewhere than on Linux
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace} {location.lock_domain}"


def cluster_job() -> list[str] | None:
    """The cluster's job that this process belongs to, and how often it was queued again; None outside a cluster."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def requeued(before: Any, after: Any) -> bool:
    """Whether the cluster queued the job of one attempt again, and ``after`` is the same job of the next attempt."""
    jobs = (before, after)
    return all(isinstance(job, list) and len(job) == 2 for job in jobs) and before[0] == after[0] and before != after


def now(timespec: str = "milliseconds") -> str:
    """The current time as records contain it (ISO 8601, UTC)."""
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec=timespec)


class Attempt:
    """The newest attempt of the run, which holds ``lock`` while its process lives.

    A thread writes ``attempts/<name>.beat`` every ``location.beat_seconds``, which shows to other machines that the
    attempt lives, and looks for higher numbers; it ignores errors of the storage. ``gone_since``: since when the claim
    is gone (``time.monotonic``); meanwhile nothing is written, because a heartbeat would create the folder of a removed
    run again. The thread takes no lock but its own, which forked data workers never use: a fork cannot deadlock.
    """

    def __init__(self, location: Location, name: ClaimName, lock: Lock) -> None:
        self.location = location
        self.name = name
        self.number = name.number
        self.gone_since: float | None = None
        self._lock = lock
        self._successor: AttemptRecord | None = None  # the attempt that took over the run
        self._facts: dict[str, Any] = {}
        self._sequence = 0
        self._warned = False
        self._requests = self._answer = 0  # the last call of ``beat``, and the last call whose heartbeat is written
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self.keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, **facts: Any) -> None:
        """Put these facts into all further heartbeats; costs nothing."""
        self._facts.update(facts)

    def beat(self, **facts: Any) -> None:
        """Note these facts, and write a heartbeat now. Waits for it only a moment, in case the storage hangs."""
        self.note(**facts)
        with self._changed:
            self._requests = request = self._requests + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._answer >= request, timeout=_WRITE_SECONDS)

    def keep_beating(self) -> None:
        """Write heartbeats, at once where ``beat`` asks for one, until ``stop_beating``; the work of the thread."""
        while not self._stopped:
            request = self._requests
            self._check_superseded()
            if self.gone_since is None:
                self._sequence += 1
                beat = encode({"sequence": self._sequence, **self._facts, "time": now()})
                with suppress(StorageError):
                    self.location.replace(f"{self.name}.beat", [beat], durable=False)
            with self._changed:
                self._answer = request
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._stopped or self._requests > self._answer, timeout=self.location.beat_seconds
                )

    def stop_beating(self) -> None:
        """End the thread, or abandon it if it still waits for the storage."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(_JOIN_SECONDS)

    def _check_superseded(self) -> None:
        """Look for a newer attempt, and for this attempt's own claim."""
        skip = self.gone_since is None and self._sequence % (1 + self.number // _FEW_ATTEMPTS)
        if self._successor is None and not skip:
            try:
                self._successor = successor(self.location, self.name)
                self.gone_since = None
            except ClaimGone:
                self.gone_since = self.gone_since or time.monotonic()
            except StorageError:
                pass  # an outage says nothing about the claim

    def raise_if_superseded(self) -> None:
        """Raise Superseded or RunGone if the thread found a newer attempt, or no claim for long; costs nothing."""
        self._raise_if_gone()
        if self._successor is not None:
            raise Superseded(
                f"{self._successor.owner()} took over {self.location.url}; this process stops. "
                "What it did after its last acknowledged checkpoint is not used."
            )

    def require_newest(self) -> None:
        """Raise Superseded if there is a newer attempt. Asks the storage; raises StorageError, and RunGone."""
        self._raise_if_gone()
        self._successor = self._successor or successor(self.location, self.name)
        self.raise_if_superseded()

    def _raise_if_gone(self) -> None:
        """Raise RunGone if the claim has not been in the run directory for ``GONE_SECONDS``."""
        since = self.gone_since
        if since is None:
            self._warned = False
            return
        gone = f"{self.location.url} was moved, removed or replaced: attempt {self.number}, this process, is not in it"
        if time.monotonic() - since > GONE_SECONDS:
            raise RunGone(
                f"{gone}, and has not been for {GONE_SECONDS:.0f} seconds. Nothing was written there since. If the "
                "directory is somewhere else, move it back and run the same command again; otherwise that command "
                "starts a new run."
            )
        if not self._warned:
            log.warning("%s. Waiting %.0f seconds for it to come back", gone, GONE_SECONDS)
        self._warned = True

    def end(self, outcome: str, **facts: Any) -> None:
        """Record how this attempt ended and release the run."""
        self.stop_beating()
        redacted_facts = {key: redacted(fact) if isinstance(fact, str) else fact for key, fact in facts.items()}
        record = {**self._facts, "time": now(), **redacted_facts, "outcome": outcome}
        try:
            # Where the claim is gone, the record would create the directory of a removed run again.
            if self.name in names(self.location):
                self.location.replace(f"{self.name}.end.json", [encode(record)])
        finally:
            self._lock.release()

    def withdraw(self) -> None:
        """Undo the claim; only for an attempt that has changed nothing."""
        self.stop_beating()
        _withdraw(self.location, self.name, self._lock)
        self.location.remove(f"{self.name}.beat")


def claim(location: Location, facts: dict[str, Any], *, above: int = 0, steal: bool = False) -> Attempt:
    """Become the newest attempt of the run, with a number greater than ``above``. Raises RunInUse while the newest
    attempt lives; with ``steal``, that attempt is superseded instead, which it notices at its next heartbeat or commit.

    The storage need not support exclusive creation. Each claim is an object with a name of its own, and its process
    owns the run if a listing *after* the write shows only the claims of a listing before it, and its own. Two processes
    cannot both own the run: if both wrote, the process that lists last sees the other's claim. A process that sees
    another claim withdraws its own and starts over, so abandoned claims do not stay. It gives up for good only if it
    sees a live attempt, so one process wins.
    """
    dead: set[ClaimName] = set()
    pause = _PAUSE_SECONDS
    while True:
        signals.raise_if_received("during start-up, nothing to commit")
        before = names(location)
        if not steal and (record := live(location, before, dead=dead)):
            raise RunInUse(f"{location.url} is in use by {record.owner()}.{_REMEDY}")
        attempt = _try_claim(location, facts, before, above)
        if attempt is not None:
            return attempt
        # At random, so that processes that have disturbed each other do not meet again.
        time.sleep(_RANDOM.uniform(0, min(pause, location.beat_seconds)))
        pause = min(2 * pause, location.beat_seconds)


def raise_if_live(location: Location) -> None:
    """Raise RunInUse if the process of the newest attempt lives."""
    if record := live(location, names(location), dead=set()):
        raise RunInUse(f"{location.url} is in use by {record.owner()}.")


def _try_claim(location: Location, facts: dict[str, Any], before: list[ClaimName], above: int) -> Attempt | None:
    """Claim the next number; None if there are then other claims than ``before`` and this one."""
    name = ClaimName(max([above, *(name.number for name in before)]) + 1, secrets.token_hex(6))
    if name.number > HIGHEST:
        raise StorageError(f"{location.url}: no attempt can follow number {name.number - 1}, which no run has reached")
    lock = location.lock(f"{name}.lock")  # before the claim, so that nobody sees a living process's claim unlocked
    assert lock is not None, "nobody else has this name"
    own = {
        "host": socket.gethostname(),
        "machine": machine(location),
        "pid": os.getpid(),
        "started": now(),
        "beat": location.beat_seconds,
        "cluster": cluster_job(),
    }
    try:
        location.put(f"{name}.json", [encode(own | facts | {"attempt": name.number})])
        if names(location) == [*before, name]:
            return Attempt(location, name, lock)
    except BaseException:
        with suppress(StorageError):
            _withdraw(location, name, lock)
        raise
    _withdraw(location, name, lock)
    return None


def _withdraw(location: Location, name: ClaimName, lock: Lock) -> None:
    try:
        location.remove(f"{name}.json")
        location.remove(f"{name}.lock")
    finally:
        lock.release()

"""The stored records of a run's attempts, and what follows from them.

    attempts/000003-<nonce>.json       the claim: who, where, since when; its number is the fencing token
    attempts/000003-<nonce>.lock       locked by the process as long as it lives
    attempts/000003-<nonce>.beat       where it is: step, last committed step; a hint, never trusted
    attempts/000003-<nonce>.end.json   how it ended; absent after a kill

Anyone may have written these objects. Content that cannot be parsed is ignored, but the name of a claim counts.
"""

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runner import signals
from runner.errors import StorageError, printable
from runner.plain import parse_object
from runner.storage.location import Location

HIGHEST = 10**15 - 1  # number of an attempt: names have at most 15 digits
_CLAIM = re.compile(r"([0-9]{6,15})-([0-9a-f]{12})\.json")
_LIMIT = 1 << 20
_BEAT_SECONDS = (0.1, 5.0)  # bounds for the value in a claim: all kinds of storage beat within them
_MOST_ALIKE = 1000  # claims of one number: processes that start at once make few, and a killed one leaves its claim
_SILENT_BEATS = 3  # after so many without a change an attempt is dead
_SLACK_SECONDS = 0.5


class ClaimGone(StorageError):
    """A claim is not where its process wrote it."""


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
        """The attempt's number."""
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
    def patience(self) -> float:
        """Seconds after which an attempt whose heartbeat has not changed is dead."""
        return _SILENT_BEATS * self._beat_seconds() + _SLACK_SECONDS

    def watched(self, since: float | None = None) -> bool:
        """Whether its process lives. If ``alive`` cannot tell, watches for three beats whether its heartbeat changes.
        The beats count from ``since`` (``time.monotonic``), a moment after the record was read.

        Uses only this process's clock, because clocks of two machines need not agree. Raises Interrupted after a stop
        signal.
        """
        now, alive, ended = self, self.alive(), False
        until = (since or time.monotonic()) + self.patience
        while alive is None and now.beat == self.beat and not ended:
            signals.raise_if_received("while watching whether another attempt lives")
            ended = time.monotonic() >= until  # and one last look
            if not ended:
                time.sleep(self._beat_seconds() / 4)
            again = read(self.location, self.name)
            if again is None:  # it withdrew its claim
                return False
            now, alive = again, again.alive()
        return now.beat != self.beat if alive is None else alive

    def seen(self) -> str | None:
        """The time of its last sign of life (ISO 8601, UTC)."""
        latest = self.end or self.beat
        return latest.get("time") or self.claim.get("started")

    def outcome(self) -> str:
        """How it ended, in a word or two."""
        if self.end is not None:
            return printable(self.end.get("outcome"))
        return {True: "running", False: "killed", None: "unknown (another host)"}[self.alive()]

    def ending(self, key: str) -> Any:
        """A value of the record of its end; None while there is no such record."""
        return (self.end or {}).get(key)

    def _beat_seconds(self) -> float:
        seconds = self.claim.get("beat")
        if not isinstance(seconds, int | float) or seconds != seconds:
            seconds = self.location.beat_seconds
        return min(max(seconds, _BEAT_SECONDS[0]), _BEAT_SECONDS[1])


def encode(record: dict[str, Any]) -> bytes:
    """A record as it is stored."""
    return json.dumps(record, indent=1).encode() + b"\n"


def names(location: Location) -> list[ClaimName]:
    """The names of all claims, oldest first."""
    matches = (_CLAIM.fullmatch(entry.name) for entry in location.list("attempts"))
    return sorted(ClaimName(int(match[1]), match[2]) for match in matches if match)


def history(location: Location) -> list[AttemptRecord]:
    """All attempts, oldest first."""
    return _read_all(location, names(location))


def newest(location: Location, *, before: int | None = None) -> AttemptRecord | None:
    """The newest attempt, or the newest with a number below ``before``, if there is one.

    If two have the same number, one of them was killed while it withdrew, and only the other ever trained.
    """
    highest = _newest(location, [name for name in names(location) if before is None or name.number < before])
    return max(_read_all(location, highest), key=lambda record: bool(record.end or record.beat), default=None)


def live(location: Location, claims: list[ClaimName], *, dead: set[ClaimName]) -> AttemptRecord | None:
    """The newest attempt among ``claims`` if its process lives, else None.

    Adds dead attempts to ``dead``, and does not look again at attempts that are in it already.
    """
    unknown = [name for name in _newest(location, claims) if name not in dead]
    records = [(name, read(location, name), time.monotonic()) for name in unknown]  # to be watched at the same time
    for name, record, since in records:
        if record is not None and record.watched(since):
            return record
        dead.add(name)
    return None


def successor(location: Location, mine: ClaimName) -> AttemptRecord | None:
    """The newest attempt with a higher number than that of the claim ``mine``, if there is one. Raises
    ClaimGone if that claim is gone, because then nothing must be written to the run directory any more.

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


def read(location: Location, name: ClaimName) -> AttemptRecord | None:
    """The record of one attempt; None if it has no claim. Content that cannot be parsed counts as empty."""
    claim = location.read(f"{name}.json", limit=_LIMIT)
    if claim is None:
        return None
    beat = parse_object(location.read(f"{name}.beat", limit=_LIMIT) or b"")
    end = parse_object(location.read(f"{name}.end.json", limit=_LIMIT) or b"")
    return AttemptRecord(location, name, parse_object(claim) or {}, beat or {}, end)


def machine(location: Location) -> str:
    """A name of this machine such that processes with the same name see each other's locks, until it is rebooted.

    A container, another user, or a job with its own temporary folder counts as another machine if it cannot see the
    same locks.
    """
    return f"{socket.gethostname()} {_boot_id()} {_namespace()} {location.lock_domain}"


def cluster_job() -> list[str] | None:
    """The cluster's job that this process belongs to, and how often it was queued again; None outside a cluster."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def requeued(before: Any, after: Any) -> bool:
    """Whether the cluster queued the job of one attempt again, and ``after`` is the same job of the next attempt."""
    jobs = (before, after)
    return all(isinstance(job, list) and len(job) == 2 for job in jobs) and before[0] == after[0] and before != after


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return "?"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "?"


def _read_all(location: Location, claims: list[ClaimName]) -> list[AttemptRecord]:
    records = (read(location, name) for name in claims)
    return [record for record in records if record is not None]


def _newest(location: Location, claims: list[ClaimName]) -> list[ClaimName]:
    """The claims with the highest number."""
    highest = max(claims).number if claims else 0
    newest = [name for name in claims if name.number == highest]
    if len(newest) > _MOST_ALIKE:
        raise StorageError(f"{location.url}/attempts has {len(newest)} claims of attempt {highest}, which no run makes")
    return newest

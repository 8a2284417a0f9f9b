"""The lives of a run's processes.

    attempts/000003.json       created exclusively: the claim, and the fencing token (its number)
    attempts/000003.lock       locked by the process as long as it lives
    attempts/000003.beat       where it is: step, last committed step, what it resumed from; a hint, never trusted
    attempts/000003.end.json   how it ended; absent after a kill

Attempt numbers only grow. A process that finds a higher number than its own has been superseded.
"""

import json
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from runner.errors import RunInUse, StorageError, printable
from runner.storage.location import Location, Lock

_CLAIM = re.compile(r"([0-9]{6,})\.json")
_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """What is stored of one attempt; ``end`` is None for one that lives or was killed."""

    number: int
    claim: dict[str, Any]
    beat: dict[str, Any]
    end: dict[str, Any] | None

    def owner(self) -> str:
        """Who it is, for a message."""
        return printable(f"attempt {self.number} (pid {self.claim.get('pid')} on {self.claim.get('host')})")

    def alive(self) -> bool | None:
        """Whether its process lives; None where that cannot be known from this host."""
        if self.end is not None:
            return False
        if self.claim.get("host") != socket.gethostname():
            return None
        return bool(self.claim.get("boot") == _boot_id()) and _runs(self.claim.get("pid"), self.claim.get("born"))

    def seen(self) -> str | None:
        """When it last showed itself (ISO 8601, UTC)."""
        latest = self.end or self.beat
        return latest.get("time") or self.claim.get("started")

    def outcome(self) -> str:
        """How it ended, in a word or two."""
        if self.end is not None:
            return printable(self.end.get("outcome"))
        return {True: "running", False: "killed", None: "unknown (another host)"}[self.alive()]


@dataclass(slots=True)
class Attempt:
    """This process's life in a run; holds the lock that says so."""

    number: int
    location: Location
    _lock: Lock
    _beat: dict[str, Any] = field(default_factory=lambda: {"sequence": 0})

    def beat(self, **facts: Any) -> None:
        """Note where this attempt is; cheap, only as durable as the page cache, and no reason to stop training if it
        fails.
        """
        self._beat |= facts | {"sequence": self._beat["sequence"] + 1, "time": _now()}
        with suppress(StorageError):
            self.location.replace(f"{_stem(self.number)}.beat", [_json(self._beat)], durable=False)

    def successor(self) -> Record | None:
        """The attempt that superseded this one, if any has. Lists the storage."""
        newest = _newest(self.location)
        return read(self.location, newest) if newest > self.number else None

    def end(self, outcome: str, **facts: Any) -> None:
        """Record how this life ended and let go of the run."""
        record = self._beat | facts | {"outcome": outcome, "time": _now()}
        try:
            self.location.create(f"{_stem(self.number)}.end.json", _json(record))
        finally:
            self._lock.release()


def claim(location: Location, facts: dict[str, Any], *, steal: bool = False) -> Attempt:
    """Become the newest attempt of the run.

    Raises RunInUse while the newest attempt lives, unless it is to be stolen from: then it will find itself
    superseded at its next commit.
    """
    newest = _newest(location)
    if not steal:
        raise_if_live(location, newest)
    while True:
        newest += 1
        # The lock first, so that of two who start at once the second sees the first before it claims.
        lock = location.lock(f"{_stem(newest)}.lock")
        if lock is None:
            raise _in_use(location, newest)
        record = _identity_of_process() | facts | {"attempt": newest}
        if location.create(f"{_stem(newest)}.json", _json(record)):
            return Attempt(newest, location, lock)
        lock.release()
        if not steal:
            raise_if_live(location, newest)


def raise_if_live(location: Location, number: int | None = None) -> None:
    """Raise RunInUse while the newest attempt (or that one) is locked by a living process."""
    number = _newest(location) if number is None else number
    if not number:
        return
    lock = location.lock(f"{_stem(number)}.lock")
    if lock is None:
        raise _in_use(location, number)
    lock.release()


def history(location: Location) -> list[Record]:
    """All attempts, oldest first."""
    return [read(location, number) for number in _numbers(location)]


def last(location: Location) -> Record | None:
    """The newest attempt, if there is one."""
    newest = _newest(location)
    return read(location, newest) if newest else None


def read(location: Location, number: int) -> Record:
    """The record of one attempt; a claim that cannot be parsed is an error, the hints beside it are not."""
    claimed = _read(location, f"{_stem(number)}.json")
    if claimed is None:
        raise StorageError(f"{location.url}/{_stem(number)}.json is not a record of an attempt (torn or not JSON)")
    beat = _read(location, f"{_stem(number)}.beat") or {}
    return Record(number, claimed, beat, _read(location, f"{_stem(number)}.end.json"))


def _read(location: Location, name: str) -> dict[str, Any] | None:
    try:
        found = json.loads(location.read(name, limit=_LIMIT) or b"null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _numbers(location: Location) -> list[int]:
    found = (_CLAIM.fullmatch(entry.name) for entry in location.list("attempts"))
    return sorted(int(match[1]) for match in found if match)


def _newest(location: Location) -> int:
    return max(_numbers(location), default=0)


def _stem(number: int) -> str:
    return f"attempts/{number:06d}"


def _in_use(location: Location, number: int) -> RunInUse:
    try:
        owner = read(location, number).owner()
    except StorageError:  # it holds the lock and has not written its claim yet
        owner = f"attempt {number}, just starting"
    return RunInUse(
        f"{location.url} is in use by {owner}.\n"
        "Wait for it with run.on_conflict=wait, or take the run over with run.on_conflict=steal "
        "(the other stops at its next checkpoint)."
    )


def _identity_of_process() -> dict[str, Any]:
    return {
        "nonce": secrets.token_hex(8),
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "started": _now(),
    }


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: pids alone have to do
        return None


def _runs(pid: Any, born: Any) -> bool:
    if born is not None:
        return bool(_born(pid) == born)
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return False
    return True


def _born(pid: Any) -> str | None:
    """When a process was started, in the kernel's ticks; tells a process from a later one with its pid.
    None for one that is gone, and off Linux."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _now() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"

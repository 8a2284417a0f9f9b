"""The thread that shows that an attempt lives, and that notices if another attempt has taken over its run."""

import json
import logging
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from runner.errors import RunGone, StorageError
from runner.run import records
from runner.run.records import Name, Record
from runner.storage.location import Location

log = logging.getLogger("runner")

GONE_SECONDS = 10.0  # so long a run directory that was moved away may take to come back
_EASY = 25  # attempts that are looked through at every beat; more of them less often
_PATIENCE_SECONDS = 0.2
_JOIN_SECONDS = 1.0


class Heartbeat:
    """Writes ``attempts/<name>.beat`` every ``location.beat_seconds``, and ignores errors of the storage.

    ``superseded`` is the attempt that took over the run, once there is one. Where the claim is gone nothing is written:
    it would make the folder of a removed run again. The thread takes no lock but its own, which forked data workers
    never use, so that a fork cannot deadlock.
    """

    def __init__(self, location: Location, name: Name) -> None:
        self.superseded: Record | None = None
        self._location = location
        self._name = name
        self._facts: dict[str, Any] = {}
        self._sequence = 0
        self._lost: float | None = None  # since when the claim is gone
        self._told = False
        self._asked = self._done = 0
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
            self._asked = asked = self._asked + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= asked, timeout=_PATIENCE_SECONDS)

    def raise_if_gone(self) -> None:
        """Raise RunGone if the claim has not been in the run directory for ``GONE_SECONDS``; costs nothing."""
        lost = self._lost
        if lost is None:
            self._told = False
            return
        gone = f"{self._location.url} was moved, removed or replaced: attempt {self._name.number}, this process, is not"
        if time.monotonic() - lost > GONE_SECONDS:
            raise RunGone(
                f"{gone} in it, and has not been for {GONE_SECONDS:.0f} seconds. Nothing was written there since. If "
                "the directory is somewhere else, move it back and run the same command again; else that begins anew."
            )
        if not self._told:
            log.warning("%s in it. Waiting %.0f seconds for it to come back", gone, GONE_SECONDS)
        self._told = True

    def stop(self) -> None:
        """End the thread; one that still waits for the storage is abandoned."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stopped:
            asked = self._asked
            self._look()
            if self._lost is None:
                self._write()
            with self._changed:
                self._done = asked
                self._changed.notify_all()
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopped or self._asked > self._done, timeout=self._location.beat_seconds
                )

    def _write(self) -> None:
        self._sequence += 1
        beat = {"sequence": self._sequence, **self.facts()}
        with suppress(StorageError):
            self._location.replace(f"{self._name}.beat", [dump(beat)], durable=False)

    def _look(self) -> None:
        rare = self._lost is None and self._sequence % (1 + self._name.number // _EASY)
        if self.superseded is None and not rare:
            try:
                self.superseded = records.successor(self._location, self._name)
                self._lost = None
            except records.Lost:
                self._lost = self._lost or time.monotonic()
            except StorageError:
                pass  # an outage says nothing of the claim


def now() -> str:
    """The current time as records contain it (ISO 8601, UTC)."""
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")


def dump(value: dict[str, Any]) -> bytes:
    """A record as bytes to be stored."""
    return json.dumps(value, indent=1).encode() + b"\n"

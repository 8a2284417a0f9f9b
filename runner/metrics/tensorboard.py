"""TensorBoard event files: one continuous curve over any number of attempts.

They are journals, because TensorBoard's own writer ends for good, and training with it, at the first error of a disk.

What a run computes, for TensorBoard's HParams tab: one row per run.

It is an event file of its own, replaced as a whole. TensorBoard reads the files of a folder in the order of their names
and keeps the first hyperparameters that it finds: this file comes first and has those of the newest attempt. The
columns and which of them differ TensorBoard finds out over all runs, so no run writes a list of them.
"""

import io
import json
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar, text

from runner.config.identity import flatten
from runner.errors import StorageError, printable
from runner.storage.location import JournalChain, Location

_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.")
_FULL = 4 << 20  # bytes after which a new file is begun, because each sync may upload a file as a whole


class Curves:
    """Writes scalars and texts from ``purge_step`` on, and makes TensorBoard hide what older attempts wrote there."""

    def __init__(self, location: Location, folder: str, *, purge_step: int, attempt: int) -> None:
        self._location = location
        self._folder = folder
        self._attempt = attempt
        self._journals = JournalChain(location)
        self._files = 0
        self._time = self._now()
        self._begin()
        start = Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self._journals.append(encoded([start]))

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        """Numbers become curves, strings become texts."""
        summaries = (
            text(tag, f"```\n{value}\n```") if isinstance(value, str) else scalar(tag, value)  # type: ignore[no-untyped-call]
            for tag, value in values.items()
        )
        now = time.time()
        self._journals.append(encoded(Event(wall_time=now, step=step, summary=summary) for summary in summaries))

    def mark(self) -> None:
        """Begin a new file if this one is full."""
        if self._journals.size > _FULL:
            with suppress(StorageError):  # where there is no room for another file, this one grows on
                self._begin()

    def flush(self) -> None:
        """Make everything so far durable. One thread may call this while another calls ``add``."""
        self._journals.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._journals.close()

    def _begin(self) -> None:
        name = f"events.out.tfevents.{self._time:010d}.a{self._attempt:06d}.{self._files + 1:04d}"
        head = encoded([Event(wall_time=time.time(), file_version="brain.Event:2")])
        self._journals.begin(f"{self._folder}/{name}", head)
        self._files += 1

    def _now(self) -> int:
        """The time for the names of files, which TensorBoard reads in their order. It is later than that of all that
        are there, whatever the clock says: else an older attempt would hide what this one writes.
        """
        found = (_NAME.match(entry.name) for entry in self._location.list(self._folder))
        return max([int(time.time()), *(int(name[1]) + 1 for name in found if name)])


def encoded(events: Iterable[Event]) -> bytes:
    """Events as an event file has them."""
    content = io.BytesIO()
    records = RecordWriter(content)
    for event in events:
        records.write(event.SerializeToString())
    return content.getvalue()


_FILE = "events.out.tfevents.0000000000.hparams"  # the number is a time, that of other files is later
_EXACT = 2**53  # up to here TensorBoard's numbers are exact


def write(location: Location, folder: str, experiment: str, identity: Mapping[str, Any], *, finished: bool) -> None:
    """Make a run with this identity the one row of ``folder``. Raises StorageError."""
    values = {"experiment": experiment, **flatten(identity)}
    _, start, end = hparams({printable(key): _cell(value) for key, value in values.items()}, {})  # type: ignore[no-untyped-call]
    events = [Event(file_version="brain.Event:2"), Event(summary=start), *([Event(summary=end)] if finished else [])]
    location.replace(f"{folder}/{_FILE}", [encoded(events)])


def _cell(value: Any) -> float | str:
    """Numbers are numbers, all else is text. An absent value is text too: one left out would not be seen to differ."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _EXACT:
        return value
    return printable(value if isinstance(value, str) else json.dumps(value))

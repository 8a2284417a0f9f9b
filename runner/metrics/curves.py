"""TensorBoard event files: one continuous curve over any number of attempts.

They are journals, because TensorBoard's own writer ends for good, and training with it, at the first error of a disk.
"""

import io
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

from runner.errors import StorageError
from runner.storage.journals import Journals
from runner.storage.location import Location

_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.")
_FULL = 4 << 20  # bytes after which a new file is begun, because each sync may upload a file as a whole


class Curves:
    """Writes scalars and texts from ``purge_step`` on, and makes TensorBoard hide what older attempts wrote there."""

    def __init__(self, location: Location, folder: str, *, purge_step: int, attempt: int) -> None:
        self._location = location
        self._folder = folder
        self._attempt = attempt
        self._journals = Journals(location)
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

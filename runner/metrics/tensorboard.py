"""TensorBoard's event files: one continuous curve over any number of attempts, and one row per run in the HParams tab.

Event files are journals here, because TensorBoard's own writer never recovers from an error of the disk.

The row is an event file of its own, replaced as a whole. TensorBoard reads the files of a folder in the order of their
names and keeps the first hyperparameters: this file comes first and is of the newest attempt. TensorBoard itself
compares the rows of all runs to find the columns, so no run writes a list of them.
"""

import io
import json
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard._utils import figure_to_image
from torch.utils.tensorboard.summary import histogram, hparams, image, text

from runner.config.identity import flatten
from runner.errors import StorageError, TaskError, printable
from runner.metrics.writer import MetricWriter, WriterContext
from runner.storage.location import JournalChain, Location

_FOLDER = "tensorboard"
_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.")
_BINS = 64  # bars of a histogram
_FILE_BYTES = 4 << 20  # bytes after which a new file is begun, because each sync may upload a file as a whole


class TensorBoardWriter(MetricWriter):
    """Writes curves and texts, and makes TensorBoard hide what older attempts wrote for the same and later steps."""

    def __init__(self, context: WriterContext) -> None:
        write_hparams(context.location, context.experiment, context.hyperparameters, finished=False)
        self._attempt = context.attempt
        self._step = context.step
        self._journals = JournalChain(context.location.journal)
        self._files = 0
        self._hides_older = False  # whether the event that hides older points is written
        # TensorBoard reads files in the order of their names, and older attempts must not hide the points of this one:
        # the time in these names is later than in all present names, even if the clock is wrong.
        matches = (_NAME.match(entry.name) for entry in context.location.list(_FOLDER))
        self._time = max([int(time.time()), *(int(match[1]) + 1 for match in matches if match)])
        self._begin()

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        self._append(step, [_point(tag, value) for tag, value in values.items()])

    def log(self, step: int, summaries: Mapping[str, bytes]) -> None:
        self._append(step, [value for each in summaries.values() for value in Summary.FromString(each).value])

    def mark(self, step: int) -> dict[str, Any]:
        """Begin a new file if this one is full. No mark is needed: TensorBoard hides the points of repeated steps."""
        if self._journals.size > _FILE_BYTES:
            with suppress(StorageError):  # no room for another file: the present file continues
                self._begin()
        return {}

    def flush(self) -> None:
        self._journals.flush()

    def close(self, status: str) -> None:
        if status != "failed":  # else the storage may have failed
            self._hide_from(self._step + 1)
            self.flush()
            self._journals.close()

    def _append(self, step: int, points: list[Summary.Value]) -> None:
        self._hide_from(min(step, self._step + 1))
        self._journals.append(encode_events([Event(wall_time=time.time(), step=step, summary=Summary(value=points))]))

    def _hide_from(self, step: int) -> None:
        """Once: an event at which TensorBoard drops the points from ``step`` on that it has read so far."""
        if not self._hides_older:
            start = Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
            self._journals.append(encode_events([start]))
            self._hides_older = True

    def _begin(self) -> None:
        name = f"events.out.tfevents.{self._time:010d}.a{self._attempt:06d}.{self._files + 1:04d}"
        head = encode_events([Event(wall_time=time.time(), file_version="brain.Event:2")])
        self._journals.begin(f"{_FOLDER}/{name}", head)
        self._files += 1


def encode_events(events: Iterable[Event]) -> bytes:
    """Events in the format of an event file."""
    content = io.BytesIO()
    records = RecordWriter(content)
    for event in events:
        records.write(event.SerializeToString())
    return content.getvalue()


def _point(tag: str, value: float | str) -> Summary.Value:
    if isinstance(value, str):
        return text(tag, f"```\n{value}\n```").value[0]  # type: ignore[no-untyped-call]
    return Summary.Value(tag=tag, simple_value=value)


def summary(name: str, value: Any) -> bytes:
    """A picture, a histogram or a text as ``Task.log`` takes it, encoded. Raises TaskError for any other value."""
    try:
        return bytes(_summary(name, value).SerializeToString())
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        shape = getattr(value, "shape", None)
        kind = type(value).__name__ + ("" if shape is None else f" of shape {[*shape]}")
        raise TaskError(
            f"log({name!r}) got a {kind}; expected a text, a figure, a vector for its histogram, or images of shape "
            "[h, w], [c, h, w] or [n, c, h, w] with 1 or 3 channels. Numbers are metrics: return them from the step"
        ) from error


def _summary(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return text(name, value)  # type: ignore[no-untyped-call]
    if hasattr(value, "savefig"):
        return image(name, figure_to_image(value, close=False), dataformats="CHW")  # type: ignore[no-untyped-call]
    array = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)
    array = array.float() if array.dtype in (torch.bfloat16, torch.bool) else array
    forms = {2: "HW", 3: "CHW", 4: "NCHW"}
    if array.dim() not in (1, *forms) or not array.numel() or array.is_complex():
        raise ValueError
    if array.dim() > 1:
        return image(name, array.nan_to_num().numpy(), dataformats=forms[array.dim()])  # type: ignore[no-untyped-call]
    if len(finite := array.double()[array.double().isfinite()]):
        return histogram(name, finite.numpy(), bins=_BINS)  # type: ignore[no-untyped-call]
    return text(name, "no value is finite")  # type: ignore[no-untyped-call]


_HPARAMS = f"{_FOLDER}/events.out.tfevents.0000000000.hparams"  # the number is a time; all other files have later times
_EXACT = 2**53  # TensorBoard's numbers are doubles: whole numbers are exact up to here


def declare_finished(location: Location, experiment: str, hyperparameters: Mapping[str, Any]) -> None:
    """Give the run's row the status "success", if the run has a row. Raises StorageError."""
    if location.read(_HPARAMS, limit=1 << 20) is not None:
        write_hparams(location, experiment, hyperparameters, finished=True)


def write_hparams(location: Location, experiment: str, hyperparameters: Mapping[str, Any], *, finished: bool) -> None:
    """Write the run's row. Raises StorageError."""
    cells = {printable(key): _cell(value) for key, value in flatten(hyperparameters).items()}
    _, start, end = hparams({"experiment": _cell(experiment), **cells}, {})  # type: ignore[no-untyped-call]
    events = [Event(file_version="brain.Event:2"), Event(summary=start), *([Event(summary=end)] if finished else [])]
    location.replace(_HPARAMS, [encode_events(events)])


def _cell(value: Any) -> float | str:
    """Numbers stay numbers, all else becomes text, null too: TensorBoard does not compare a cell that is absent."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _EXACT:
        return value
    return printable(value if isinstance(value, str) else json.dumps(value))

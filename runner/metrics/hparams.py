"""What a run computes, for TensorBoard's HParams tab: one row per run.

It is an event file of its own, replaced as a whole. TensorBoard reads the files of a folder in the order of their names
and keeps the first hyperparameters that it finds: this file comes first and has those of the newest attempt. The
columns and which of them differ TensorBoard finds out over all runs, so no run writes a list of them.
"""

import json
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard.summary import hparams

from runner.config.identity import flatten
from runner.errors import printable
from runner.metrics.curves import encoded
from runner.storage.location import Location

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

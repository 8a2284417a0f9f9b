"""A user's iterable and its state: looked at without a trace, and in a form that a checkpoint takes.

The batches of a user's iterable, pass after pass, made where the iterable lives: in a worker or in this process.

The user's state is loaded only if it was taken inside a pass, between two samples: at the begin and end of a pass the
state of many data sets is wrong. So up to a batch of samples is read again after a resume; without a state, the whole
pass up to there.
"""

import math
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from tqdm import tqdm

from runner import signals
from runner.activity import doing
from runner.data.fetch import Collate
from runner.data.order import splitmix64_int
from runner.data.probe import content_digest
from runner.data.sandbox import private_generators, sandboxed, seed_host
from runner.errors import DataError, RunnerError
from runner.seeds import derive

_MANY = 10_000  # items of an attribute that is data, and that a copy need not have for itself
_PLAIN = (str, int, float, bool, torch.Tensor, type(None))
_NUMPY = "numpy"  # key of a dict in place of a number or an array
_NUMBERS = "biufcmM"  # kinds of them


def stateful(thing: Any) -> bool:
    """Whether it can tell where it is and go there."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def duplicate(samples: Any) -> Any:
    """A copy that can be read without a trace in the original, with which it shares only large data."""
    values = getattr(samples, "__dict__", {}).values()
    shared: list[Any] = [value for value in values if isinstance(value, list | tuple | dict) and len(value) > _MANY]
    arrays = [value for value in values if isinstance(value, np.ndarray | torch.Tensor)]
    shared += [array for array in arrays if math.prod(array.shape) > _MANY]
    return deepcopy(samples, {id(value): value for value in shared})


def iterator(samples: Any) -> Any:
    """An iterator over a copy, from which nothing is read: making it may change the object, also for the workers."""
    try:
        samples = duplicate(samples)
    except Exception:  # an open file, a lock
        with suppress(Exception):
            samples = copy(samples)
    return iter(samples)


def packed(value: Any) -> Any:
    """A state with numbers and arrays of numpy as plain values."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in _NUMBERS:
        shape = [*value.shape] if isinstance(value, np.ndarray) else None
        return {_NUMPY: value.dtype.str, "shape": shape, "bytes": value.tobytes().hex()}
    if type(value) is dict:
        return {key.item() if isinstance(key, np.generic) else key: packed(item) for key, item in value.items()}
    return type(value)(map(packed, value)) if type(value) in (list, tuple) else value


def unpacked(value: Any) -> Any:
    """The state that ``packed`` was given; nothing in it is shared with ``value``."""
    if type(value) is dict and value.keys() == {_NUMPY, "shape", "bytes"}:
        array = np.frombuffer(bytearray.fromhex(value["bytes"]), value[_NUMPY])
        return array[0] if value["shape"] is None else array.reshape(value["shape"])
    if type(value) is dict:
        return {key: unpacked(item) for key, item in value.items()}
    return type(value)(map(unpacked, value)) if type(value) in (list, tuple) else deepcopy(value)


def not_plain(value: Any) -> str | None:
    """The first type in a state which a checkpoint does not take; a worker could not even send some of them."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((kind for item in value if (kind := not_plain(item))), None)
    return None if isinstance(value, _PLAIN) else type(value).__qualname__


_END = object()


@dataclass(frozen=True, slots=True)
class BatchRecipe:
    """How samples become batches. Seeds are set before each sample (``randomness=sample``), each batch, or never."""

    seed: int
    batch_size: int
    randomness: str
    collate: Collate = default_collate
    drop_last: bool = False
    replay: bool = False  # read a pass again instead of using the state of the user's
    audit: bool = False  # find out at the start whether a state sticks, or a pass cannot be read again


class Batch(NamedTuple):
    """So many samples, collated; ``again`` were read before them to resume. With a ``failure`` there are none."""

    size: int
    content: Any
    again: int = 0
    failure: str = ""


class _Place(NamedTuple):
    """``read`` samples of the pass ``number`` were delivered; ``own`` is the user's state after ``since`` of them."""

    number: int
    read: int = 0
    since: int = 0
    own: Any = None


class Passes(IterableDataset[Batch]):
    """One pass for each ``iter``.

    A batch and everything random in it depend on (seed, pass, worker, number of the sample in the pass) and on the
    state of the user's iterable alone. ``turn`` lets one worker at a time call ``set_epoch``: that of Hugging Face
    adds a difference to a number which all workers share.
    """

    def __init__(self, samples: Iterable[Any], making: BatchRecipe, turn: AbstractContextManager[Any]) -> None:
        self.samples: Any = samples
        self.making = making
        self.turn = turn
        self._number = -1  # the pass that is asked for
        self._place = _Place(0)
        self._resumed = False
        self._unchecked = making.audit
        self._rows: Any = None  # the user's iterator over ...
        self._entered = self._item = 0  # ... this pass, of which it has yielded so many
        self._keys: dict[str, int] = {}  # what its seeds are made from

    def __iter__(self) -> "Passes":
        self._number += 1
        self._rows = None  # until the first batch is asked for: a state may be loaded before
        if self._place.own is None or hasattr(self.samples, "set_epoch"):
            self._place = _Place(self._number)  # the end of the pass before does not matter
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"pass": self._number, "place": tuple(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number, self._place = state["pass"], _Place(*state["place"])
        if self.making.replay:
            read = self._place.read if self._place.number == self._number else 0
            self._place = _Place(self._number, read)
        self._resumed = True

    def __next__(self) -> Batch:
        with sandboxed(draws=self.making.randomness != "off"), signals.reading():
            batch = self._told()
        if batch is None:
            raise StopIteration
        return batch

    def _told(self) -> Batch | None:
        """The next batch, or what went wrong in the user's code, with its traceback; None at the end of the pass."""
        try:
            return self._batch()
        except Exception as error:
            where = f"data.train (a {type(self.samples).__qualname__}), item {self._item} of pass {self._entered}"
            if get_worker_info() is not None:
                where += f" in worker {self._worker}"
            if isinstance(error, RunnerError):
                return Batch(0, None, failure=f"{where}: {error}")
            lines = "".join(traceback.format_exception(error)).rstrip()
            return Batch(0, None, failure=f"{where}: {type(error).__name__}: {error}. Mend the data set:\n{lines}")

    def _batch(self) -> Batch | None:
        again = self._begin() if self._rows is None else 0
        rows: list[Any] = []
        while len(rows) < self.making.batch_size and (row := self._draw()) is not _END:
            rows.append(row)
            if self._item == 1 or len(rows) == self.making.batch_size:
                self._keep()
        if rows:
            self._place = self._place._replace(read=self._item)
        if not rows or (self.making.drop_last and len(rows) < self.making.batch_size):
            return None
        self._seed("train collate", self._item)
        return Batch(len(rows), self.making.collate(rows), again)

    def _draw(self) -> Any:
        """The next sample of the user's iterator, which is not asked again once it has ended."""
        if self.making.randomness == "sample" or self._item % self.making.batch_size == 0:
            self._seed("train", self._item)
        row = next(self._rows, _END)
        if row is _END:
            self._rows = iter(())
        else:
            self._item += 1
        return row

    def _keep(self) -> None:
        """Remember the user's state: a copy, because it may be a live object."""
        if self.making.replay:
            self._place = _Place(self._entered)
            return
        parts: tuple[Any, ...] = (None if self._rows is self.samples else self.samples, self._rows)
        own = tuple(packed(deepcopy(part.state_dict())) if stateful(part) else None for part in parts)
        if self._item == 1 and (kind := not_plain(own)):
            raise DataError(
                f"its state_dict holds a {kind}, which cannot be saved; it may hold tensors, numbers and arrays of "
                "numpy, str, int, float, bool, None, and dicts, lists and tuples of them"
            )
        self._place = _Place(self._entered, since=self._item, own=own)

    def _begin(self) -> int:
        """Go to the place of a loaded state, or to the beginning of the pass; returns how many samples that took."""
        place, self._resumed = self._place if self._resumed else _Place(self._number), False
        if not self.making.replay and self._tried(self._sticks):
            raise DataError(
                "after load_state_dict, every further pass begins where that state was taken, and not with its first "
                "sample: a resumed run would leave out the rest for ever. Have __iter__ forget the state once it is "
                "used, or give it a set_epoch that has what it wraps forget it, or set data.replay=true"
            )
        if self.making.replay and self._tried(self._differs):
            raise DataError(
                f"pass {self._number} begins with other samples when it is read again with the same seeds, so a resume "
                "could not go on where it was. Something in it draws from a generator that the runner does not control "
                "(of its own, or seeded by the clock); give that a seed. runtime.audit=false turns this check off"
            )
        self._unchecked = False
        self._enter(place)
        self._read_again(place)
        if place.number < self._number:
            if self._draw() is not _END:
                raise DataError("its state was taken at the end of this pass, but it yields more; mend its state_dict")
            self._enter(_Place(self._number))
        return place.read - place.since

    @doing("reads again")
    def _read_again(self, place: _Place) -> None:
        """Read the samples that were delivered before the interruption."""
        again: Iterable[int] = range(place.since, place.read)
        if place.own is None:  # the bar comes after a second, and from one worker only
            again = tqdm(again, "reading data.train again", delay=1, leave=False, disable=self._worker > 0)
        for _ in again:
            if self._draw() is _END:
                raise DataError(f"ended where {place.read} samples were read before; restore the data set")

    def _tried(self, check: Callable[[], bool]) -> bool:
        """A check with copies of the user's iterable, once; False where it cannot be copied or fails, which training
        will meet.
        """
        try:
            with private_generators():
                return self._unchecked and self._worker == 0 and check()
        except Exception:
            return False

    def _sticks(self) -> bool:
        """Whether a loaded state holds for later passes."""
        first = self._apart()
        first._draw_from(_Place(0))
        taken = first._place
        resumed = self._apart()
        resumed._draw_from(taken)
        resumed._draw()
        after, stuck = resumed._draw_from(_Place(1)), self._apart()._draw_from(taken._replace(number=1, since=0))
        return after == stuck and after != self._apart()._draw_from(_Place(1))

    def _differs(self) -> bool:
        """Whether a pass that is read again begins with other samples."""
        one, other = self._apart(), self._apart()
        return (one._draw_from(_Place(self._number)), content_digest(one._draw())) != (
            other._draw_from(_Place(self._number)),
            content_digest(other._draw()),
        )

    def _apart(self) -> "Passes":
        return Passes(duplicate(self.samples), self.making, self.turn)

    def _draw_from(self, place: _Place) -> str:
        """A digest of the first sample from that place on."""
        self._enter(place)
        row = self._draw()
        self._keep()
        return "" if row is _END else content_digest(row)

    def _enter(self, place: _Place) -> None:
        """Have the user's iterable go to a place, in the order in which torchdata would."""
        self._entered, self._item = place.number, place.since
        parts = self.making.seed, self._entered, self._worker
        self._keys = {label: derive(label, *parts) for label in ("train pass", "train", "train collate")}
        self._seed("train pass")
        if hasattr(self.samples, "set_epoch"):
            with self.turn:
                self.samples.set_epoch(place.number)
        of_samples, of_rows = unpacked(place.own) or (None, None)
        if of_samples is not None:
            self.samples.load_state_dict(of_samples)
        self._rows = iter(self.samples)
        if of_rows is not None:
            self._rows.load_state_dict(of_rows)

    def _seed(self, label: str, item: int = 0) -> None:
        if self.making.randomness != "off":
            seed_host(splitmix64_int(self._keys[label] ^ item))

    @property
    def _worker(self) -> int:
        worker = get_worker_info()
        return worker.id if worker is not None else 0

"""The batches of a user's iterable, pass after pass, made where the iterable is read: in a worker or in this process.

The user's state is loaded only if it was taken inside a pass, between two samples, because at the beginning and the end
of a pass the state of many data sets is wrong. So up to a batch of samples is read again after a resume; without a
state, the whole pass up to there.
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
from runner.hashing import derive

_LARGE = 10_000  # items of an attribute; a larger one is data, which copies may share
_PLAIN_TYPES = (str, int, float, bool, torch.Tensor, type(None))
_NUMPY = "numpy"  # key of the dict that stands for a number or an array of numpy
_NUMERIC_KINDS = "biufcmM"  # of numpy dtypes


def stateful(thing: Any) -> bool:
    """Whether an object has ``state_dict`` and ``load_state_dict``."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def duplicate(samples: Any) -> Any:
    """A copy that can be read without a change to the original. They share only large data."""
    values = getattr(samples, "__dict__", {}).values()
    shared: list[Any] = [value for value in values if isinstance(value, list | tuple | dict) and len(value) > _LARGE]
    arrays = [value for value in values if isinstance(value, np.ndarray | torch.Tensor)]
    shared += [array for array in arrays if math.prod(array.shape) > _LARGE]
    return deepcopy(samples, {id(value): value for value in shared})


def iterator(samples: Any) -> Any:
    """An iterator over a copy, because the call of ``iter`` may change the object that workers get. Reads no sample."""
    try:
        samples = duplicate(samples)
    except Exception:  # an open file, a lock
        with suppress(Exception):
            samples = copy(samples)
    return iter(samples)


def pack_numpy(value: Any) -> Any:
    """A state with numbers and arrays of numpy as plain values."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in _NUMERIC_KINDS:
        shape = [*value.shape] if isinstance(value, np.ndarray) else None
        return {_NUMPY: value.dtype.str, "shape": shape, "bytes": value.tobytes().hex()}
    if type(value) is dict:
        return {key.item() if isinstance(key, np.generic) else key: pack_numpy(item) for key, item in value.items()}
    return type(value)(map(pack_numpy, value)) if type(value) in (list, tuple) else value


def unpack_numpy(value: Any) -> Any:
    """The inverse of ``pack_numpy``; the result shares nothing with ``value``."""
    if type(value) is dict and value.keys() == {_NUMPY, "shape", "bytes"}:
        array = np.frombuffer(bytearray.fromhex(value["bytes"]), value[_NUMPY])
        return array[0] if value["shape"] is None else array.reshape(value["shape"])
    if type(value) is dict:
        return {key: unpack_numpy(item) for key, item in value.items()}
    return type(value)(map(unpack_numpy, value)) if type(value) in (list, tuple) else deepcopy(value)


def unsupported_type(value: Any) -> str | None:
    """The name of the first type in a state that a checkpoint cannot hold."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((kind for item in value if (kind := unsupported_type(item))), None)
    return None if isinstance(value, _PLAIN_TYPES) else type(value).__qualname__


_END = object()


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How samples become batches. Seeds are set before each sample (``randomness=sample``), each batch, or never."""

    seed: int
    batch_size: int
    randomness: str
    collate: Collate = default_collate
    drop_last: bool = False
    replay: bool = False  # after a resume, read the pass again instead of loading the user's state
    audit: bool = False  # check at the start that a state does not hold for later passes, or that passes are repeatable


class Batch(NamedTuple):
    """``size`` collated samples. ``reread`` samples were read before them to resume. With a ``failure`` there are no
    samples.
    """

    size: int
    content: Any
    reread: int = 0
    failure: str = ""


class _Place(NamedTuple):
    """``read`` samples of pass ``number`` were delivered; ``user_state`` is the state after ``since`` of them."""

    number: int
    read: int = 0
    since: int = 0
    user_state: Any = None


class IterableBatches(IterableDataset[Batch]):
    """The batches of a user's iterable; each ``iter`` is a pass.

    A batch and everything random in it depend only on (seed, pass, worker, number of the sample in the pass) and on
    the state of the user's iterable. ``epoch_lock`` lets one worker at a time call ``set_epoch``, because Hugging
    Face's adds a difference to a number that all workers share.
    """

    def __init__(self, samples: Iterable[Any], options: BatchOptions, epoch_lock: AbstractContextManager[Any]) -> None:
        self.samples: Any = samples
        self.options = options
        self.epoch_lock = epoch_lock
        self._number = -1  # of the current pass
        self._place = _Place(0)
        self._resumed = False
        self._unchecked = options.audit
        self._rows: Any = None  # the user's iterator over ...
        self._entered = self._item = 0  # ... this pass, and the number of samples that it has yielded
        self._keys: dict[str, int] = {}  # from which its seeds are derived

    def __iter__(self) -> "IterableBatches":
        self._number += 1
        self._rows = None  # until the first batch is requested, because a state may be loaded before
        if self._place.user_state is None or hasattr(self.samples, "set_epoch"):
            self._place = _Place(self._number)  # the end of the previous pass does not matter
        return self

    def state_dict(self) -> dict[str, Any]:
        """The current pass, and the place from which it can be read again."""
        return {"pass": self._number, "place": tuple(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved place, with the next ``iter``."""
        self._number, self._place = state["pass"], _Place(*state["place"])
        if self.options.replay:
            read = self._place.read if self._place.number == self._number else 0
            self._place = _Place(self._number, read)
        self._resumed = True

    def __next__(self) -> Batch:
        with sandboxed(draws=self.options.randomness != "off"), signals.reading():
            batch = self._batch_or_failure()
        if batch is None:
            raise StopIteration
        return batch

    def _batch_or_failure(self) -> Batch | None:
        """The next batch, or a failure of the user's code with its traceback; None at the end of the pass."""
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
        reread = self._begin() if self._rows is None else 0
        rows: list[Any] = []
        while len(rows) < self.options.batch_size and (row := self._draw()) is not _END:
            rows.append(row)
            if self._item == 1 or len(rows) == self.options.batch_size:
                self._record_state()
        if rows:
            self._place = self._place._replace(read=self._item)
        if not rows or (self.options.drop_last and len(rows) < self.options.batch_size):
            return None
        self._seed("train collate", self._item)
        return Batch(len(rows), self.options.collate(rows), reread)

    def _draw(self) -> Any:
        """The next sample of the user's iterator, or ``_END``. An iterator that has ended is not called again."""
        if self.options.randomness == "sample" or self._item % self.options.batch_size == 0:
            self._seed("train", self._item)
        row = next(self._rows, _END)
        if row is _END:
            self._rows = iter(())
        else:
            self._item += 1
        return row

    def _record_state(self) -> None:
        """Record a copy of the user's state, which may be a live object."""
        if self.options.replay:
            self._place = _Place(self._entered)
            return
        parts: tuple[Any, ...] = (None if self._rows is self.samples else self.samples, self._rows)
        state = tuple(pack_numpy(deepcopy(part.state_dict())) if stateful(part) else None for part in parts)
        if self._item == 1 and (kind := unsupported_type(state)):
            raise DataError(
                f"its state_dict holds a {kind}, which cannot be saved; it may hold tensors, numbers and arrays of "
                "numpy, str, int, float, bool, None, and dicts, lists and tuples of them"
            )
        self._place = _Place(self._entered, since=self._item, user_state=state)

    def _begin(self) -> int:
        """Go to the loaded place, or to the beginning of the pass. Returns the number of samples read again."""
        place, self._resumed = self._place if self._resumed else _Place(self._number), False
        if not self.options.replay and self._check(self._state_sticks):
            raise DataError(
                "after load_state_dict, every further pass begins where that state was taken, and not with its first "
                "sample: a resumed run would leave out the other samples for ever. Let __iter__ forget the state once "
                "it is used, or give the data set a set_epoch that forgets it, or set data.replay=true"
            )
        if self.options.replay and self._check(self._pass_differs):
            raise DataError(
                f"pass {self._number} begins with other samples when it is read again with the same seeds, so a resume "
                "could not go on where it was. Something in it draws from a generator that the runner does not control "
                "(of its own, or seeded by the clock); give it a seed. runtime.audit=false turns this check off"
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
        if place.user_state is None:  # show progress after a second, in one worker
            again = tqdm(again, "reading data.train again", delay=1, leave=False, disable=self._worker > 0)
        for _ in again:
            if self._draw() is _END:
                raise DataError(f"ended where {place.read} samples were read before; restore the data set")

    def _check(self, check: Callable[[], bool]) -> bool:
        """The result of a check on copies of the user's iterable, made once; False where a copy fails, or the iterable
        itself, which training will report.
        """
        try:
            with private_generators():
                return self._unchecked and self._worker == 0 and check()
        except Exception:
            return False

    def _state_sticks(self) -> bool:
        """Whether a loaded state affects later passes, too."""
        first = self._copy()
        first._digest_from(_Place(0))
        state = first._place
        resumed = self._copy()
        resumed._digest_from(state)
        resumed._draw()
        after, stuck = resumed._digest_from(_Place(1)), self._copy()._digest_from(state._replace(number=1, since=0))
        return after == stuck and after != self._copy()._digest_from(_Place(1))

    def _pass_differs(self) -> bool:
        """Whether a pass that is read again begins with other samples."""
        first, again = (
            (batches._digest_from(_Place(self._number)), content_digest(batches._draw()))
            for batches in (self._copy(), self._copy())
        )
        return first != again

    def _copy(self) -> "IterableBatches":
        return IterableBatches(duplicate(self.samples), self.options, self.epoch_lock)

    def _digest_from(self, place: _Place) -> str:
        """A digest of the first sample from a place on."""
        self._enter(place)
        row = self._draw()
        self._record_state()
        return "" if row is _END else content_digest(row)

    def _enter(self, place: _Place) -> None:
        """Take the user's iterable to a place, by the same calls in the same order as torchdata."""
        self._entered, self._item = place.number, place.since
        parts = self.options.seed, self._entered, self._worker
        self._keys = {label: derive(label, *parts) for label in ("train pass", "train", "train collate")}
        self._seed("train pass")
        if hasattr(self.samples, "set_epoch"):
            with self.epoch_lock:
                self.samples.set_epoch(place.number)
        samples_state, iterator_state = unpack_numpy(place.user_state) or (None, None)
        if samples_state is not None:
            self.samples.load_state_dict(samples_state)
        self._rows = iter(self.samples)
        if iterator_state is not None:
            self._rows.load_state_dict(iterator_state)

    def _seed(self, label: str, item: int = 0) -> None:
        if self.options.randomness != "off":
            seed_host(splitmix64_int(self._keys[label] ^ item))

    @property
    def _worker(self) -> int:
        worker = get_worker_info()
        return worker.id if worker is not None else 0

"""Training on a user's iterable, which resumes by its own state: a weaker guarantee than for map-style data.

``IterableBatches`` makes the batches where the iterable is read: in a worker or in this process. The user's state is
loaded only if it was taken inside a pass, between two samples, because at the beginning and the end of a pass the state
of many data sets is wrong. So up to a batch of samples is read again after a resume; without a state, the whole pass up
to there.

Hugging Face's ``datasets`` 5.2: its state is exact with any number of workers as long as nothing is shuffled.
``IterableDataset.shuffle`` leaves its buffer out of the state, so that a resume loses and repeats samples, which the
first samples do not show; workers may fail to load it. With ``data.replay`` all of these are exact.
"""

import logging
import multiprocessing
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from tqdm import tqdm

from runner import signals
from runner.activity import doing
from runner.data.fetch import Collate
from runner.data.ledger import LedgerLine
from runner.data.loader import Loader, LoaderOptions
from runner.data.order import splitmix64
from runner.data.probe import content_digest, hash_content
from runner.data.sandbox import private_generators, sandboxed, seed_host
from runner.data.stream import StepSamples, TrainingStream, stateful, to_device
from runner.data.workers import unread_copy
from runner.errors import DataError, RunnerError
from runner.hashing import content_hasher, derive

_log = logging.getLogger("runner")

_PLAIN_TYPES = (str, int, float, torch.Tensor, type(None), dict, list, tuple)
_NUMPY = "numpy"  # key of the dict that stands for a number or an array of numpy
_NUMERIC_KINDS = "biufcmM"  # kinds of numpy dtypes
_END = object()

_STATE_STICKS = (
    "after load_state_dict, every further pass begins where that state was taken: a resumed run would leave out the "
    "samples before it forever. Let __iter__ forget the state once it is used, or give the data set a set_epoch that "
    "forgets it, or set data.replay=true"
)
_STATE_LACKS = (
    "after load_state_dict it yields other samples than those that followed its state_dict: the state lacks something, "
    "as that of Hugging Face's shuffle lacks its buffer, or __iter__ draws random numbers for samples ahead. Set "
    "data.replay=true: every resume then reads the current pass again up to there"
)
_NOT_SEEDED = (
    " with the same seeds, so a resume could not continue where it was. Seed every generator in it that the runner "
    "does not control (its own, or seeded by the clock). runtime.audit=false turns this check off"
)


def pack_state(value: Any) -> Any:
    """A state with numpy's numbers and arrays as plain values. Raises DataError for what cannot be saved."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in _NUMERIC_KINDS:
        shape = [*value.shape] if isinstance(value, np.ndarray) else None
        return {_NUMPY: value.dtype.str, "shape": shape, "bytes": value.tobytes().hex()}
    if type(value) is dict:
        plain = ((key.item() if isinstance(key, np.generic) else key, item) for key, item in value.items())
        return {pack_state(key): pack_state(item) for key, item in plain}
    if type(value) in (list, tuple):
        return type(value)(map(pack_state, value))
    if not isinstance(value, _PLAIN_TYPES):
        raise DataError(
            f"its state_dict holds a {type(value).__qualname__}, which cannot be saved; it may hold tensors, numbers "
            "and arrays of numpy, str, int, float, bool, None, and dicts, lists and tuples of them"
        )
    return value


def unpack_state(value: Any) -> Any:
    """The inverse of ``pack_state``; the result shares nothing with ``value``."""
    if type(value) is dict and value.keys() == {_NUMPY, "shape", "bytes"}:
        array = np.frombuffer(bytearray.fromhex(value["bytes"]), value[_NUMPY])
        return array[0] if value["shape"] is None else array.reshape(value["shape"])
    if type(value) is dict:
        return {key: unpack_state(item) for key, item in value.items()}
    return type(value)(map(unpack_state, value)) if type(value) in (list, tuple) else deepcopy(value)


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How samples become batches. Seeds are set before each sample (``randomness=sample``), each batch, or never."""

    seed: int
    batch_size: int
    randomness: str
    collate: Collate = default_collate
    drop_last: bool = False
    replay: bool = False  # after a resume, read the pass again instead of loading the user's state
    audit: bool = False  # check at the start that a state ends with its pass or (replay) that passes repeat


class Batch(NamedTuple):
    """``size`` collated samples, 0 in case of a ``failure``. ``reread``: samples read again before them, to resume."""

    size: int
    content: Any
    reread: int = 0
    failure: str = ""


class _Cursor(NamedTuple):
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
        self._number = -1  # the current pass
        self._cursor = _Cursor(0)
        self._resumed = False
        self._check_due = options.audit
        self._rows: Any = None  # the user's iterator
        self._entered = self._item = 0  # the iterator's pass, and the number of samples that it has yielded
        self._keys: dict[str, int] = {}  # label -> key of the seeds in this pass

    def __iter__(self) -> "IterableBatches":
        self._number += 1
        self._rows = None  # opened for the first batch, because a state may be loaded before
        if self._cursor.user_state is None or hasattr(self.samples, "set_epoch"):
            self._cursor = _Cursor(self._number)  # the end of the previous pass does not matter
        return self

    def state_dict(self) -> dict[str, Any]:
        """The current pass, and the cursor from which it can be read again."""
        return {"pass": self._number, "place": tuple(self._cursor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved cursor, with the next ``iter``."""
        self._number, self._cursor = state["pass"], _Cursor(*state["place"])
        if self.options.replay:
            read = self._cursor.read if self._cursor.number == self._number else 0
            self._cursor = _Cursor(self._number, read)
        self._resumed = True

    def __next__(self) -> Batch:
        with sandboxed(draws=self.options.randomness != "off"), signals.reading():
            try:
                batch = self._batch()
            except Exception as error:  # raised by the user's code
                where = f"data.train (a {type(self.samples).__qualname__}), item {self._item} of pass {self._entered}"
                where += f" in worker {self._worker}" if get_worker_info() is not None else ""
                cause = str(error)
                if not isinstance(error, RunnerError):
                    lines = "".join(traceback.format_exception(error)).rstrip()
                    cause = f"{type(error).__name__}: {error}. Fix the data set:\n{lines}"
                return Batch(0, None, failure=f"{where}: {cause}")
        if batch is None:
            raise StopIteration
        return batch

    def _batch(self) -> Batch | None:
        """The next batch; None at the end of the pass."""
        reread = self._begin() if self._rows is None else 0
        rows: list[Any] = []
        while len(rows) < self.options.batch_size and (row := self._draw()) is not _END:
            rows.append(row)
            if self._item == 1 or len(rows) == self.options.batch_size:
                self._record_state()
        if rows:
            self._cursor = self._cursor._replace(read=self._item)
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
            self._cursor = _Cursor(self._entered)
            return
        parts: tuple[Any, ...] = (None if self._rows is self.samples else self.samples, self._rows)
        if not any(map(stateful, parts)):
            raise DataError(
                "it has no state_dict and load_state_dict (nor has its iterator), so a resume cannot know where it is. "
                "Give it both, make it map-style (__len__, __getitem__), or set data.replay=true: every resume then "
                "reads the current pass again up to there"
            )
        state = tuple(pack_state(deepcopy(part.state_dict())) if stateful(part) else None for part in parts)
        self._cursor = _Cursor(self._entered, since=self._item, user_state=state)

    def _begin(self) -> int:
        """Go to the loaded cursor, or to the beginning of the pass. Returns the number of samples read again."""
        cursor, self._resumed = self._cursor if self._resumed else _Cursor(self._number), False
        if self._check_due and self._worker == 0:
            self._check_due = False
            flaw = ""
            with suppress(Exception), private_generators():  # training will report an error of the iterable
                flaw = self._flaw()
            if flaw:
                raise DataError(flaw)
        self._enter(cursor)
        self._read_again(cursor)
        if cursor.number < self._number:
            if self._draw() is not _END:
                raise DataError("its state was taken at the end of this pass, but it yields more; fix its state_dict")
            self._enter(_Cursor(self._number))
        return cursor.read - cursor.since

    @doing("reads again")
    def _read_again(self, cursor: _Cursor) -> None:
        """Read the samples that were delivered before the interruption."""
        again: Iterable[int] = range(cursor.since, cursor.read)
        if cursor.user_state is None:  # show progress after a second, in one worker
            again = tqdm(again, "reading data.train again", delay=1, leave=False, disable=self._worker > 0)
        for _ in again:
            if self._draw() is _END:
                raise DataError(f"ended where {cursor.read} samples were read before; restore the data set")

    def _flaw(self) -> str:
        """Why this iterable cannot be resumed, as copies of it show; empty if they show nothing."""
        first, resumed = self._copy(), self._copy()
        if not self.options.replay and _loses_its_buffer(self.samples):
            return _STATE_LACKS
        if self.options.replay:
            start = _Cursor(self._number)
            differs = first._digests(start, samples=2) != resumed._digests(start, samples=2)
            return f"pass {self._number} begins with other samples when it is read again{_NOT_SEEDED}" * differs
        followed, state = first._digests(_Cursor(0), samples=2)[1], first._cursor
        if resumed._digests(state, samples=2)[0] != followed:
            return _STATE_LACKS
        after = resumed._digests(_Cursor(1))
        stuck = after == self._copy()._digests(state._replace(number=1, since=0))
        return _STATE_STICKS * (stuck and after != self._copy()._digests(_Cursor(1)))

    def _copy(self) -> "IterableBatches":
        options = replace(self.options, randomness="sample")  # equal draws, wherever in a batch the state is taken
        return IterableBatches(unread_copy(self.samples), options, self.epoch_lock)

    def _digests(self, cursor: _Cursor, *, samples: int = 1) -> list[str]:
        """Digests of the first samples after a cursor. The state is recorded after the first of them."""
        self._enter(cursor)
        digests = []
        for number in range(samples):
            row = self._draw()
            digests.append("" if row is _END else content_digest(row))
            if number == 0:
                self._record_state()
        return digests

    def _enter(self, cursor: _Cursor) -> None:
        """Take the user's iterable to a cursor, by the same calls in the same order as torchdata."""
        self._entered, self._item = cursor.number, cursor.since
        parts = self.options.seed, self._entered, self._worker
        self._keys = {label: derive(label, *parts) for label in ("train pass", "train", "train collate")}
        self._seed("train pass")
        if hasattr(self.samples, "set_epoch"):
            with self.epoch_lock:
                self.samples.set_epoch(cursor.number)
        samples_state, iterator_state = unpack_state(cursor.user_state) or (None, None)
        if samples_state is not None:
            self.samples.load_state_dict(samples_state)
        self._rows = iter(self.samples)
        if iterator_state is not None:
            self._rows.load_state_dict(iterator_state)

    def _seed(self, label: str, item: int = 0) -> None:
        if self.options.randomness != "off":
            seed_host(splitmix64(self._keys[label] ^ item))

    @property
    def _worker(self) -> int:
        return int(getattr(get_worker_info(), "id", 0))


class IterableStream(TrainingStream):
    """The stream of an iterable data set. ``options.batch_size`` samples are a micro-batch.

    The state is the one after the last finished step, however far workers have read ahead. ``advance`` reads one batch
    ahead, because there is no other way to find out whether a pass has ended. With ``replay`` the iterable needs no
    state: a resume reads the current pass again, up to its position.
    """

    epochs = 0  # finished passes

    def __init__(
        self, samples: Any, options: BatchOptions, *, micro_batches: int, loading: LoaderOptions, device: torch.device
    ) -> None:
        super().__init__(loading, device)
        _require_iterable(samples)
        self.count = 0  # samples of the current step
        self.digest = 0  # 64 bits of their content
        self._samples = samples
        self._options = options
        self._micro_batches = micro_batches
        self._loader_state: Any = None  # state of the loader after the last finished step
        self._ahead: Batch | DataError | None = None
        self._pass = 0  # number of the pass of the batch ahead
        self._pass_state: Any = None  # state of the loader at the beginning of this pass
        self._pass_is_empty = True  # whether it has yielded nothing so far
        self._rereading = 0  # batches for which a worker may still have to read the pass again
        self._end_unknown = False  # whether the last step may have ended a pass

    @property
    def guarantee(self) -> str:
        name, workers = type(self._samples).__qualname__, self.workers
        method = (
            "by reading the current pass again, as if not interrupted if every pass can be repeated"
            if self._options.replay
            else "by its own state, as exactly as that is"
        )
        shares = f"; each worker reads what {name} gives it by torch.utils.data.get_worker_info()" * (workers > 1)
        only = f"and only with runtime.num_workers={workers}{shares}"
        return f"data.train is an iterable ({name}): a resume continues {method}, {only}"

    def open(self) -> None:
        self.close()
        workers, start_method = self._loading.num_workers, self._loading.start_method
        epoch_lock = multiprocessing.get_context(start_method).Lock() if workers else nullcontext()
        batches = IterableBatches(self._samples, self._options, epoch_lock)
        key = f"data.train (a {type(self._samples).__qualname__})"
        self._loader = Loader(batches, None, self._loading, key=key, states=True)
        if self._loader_state is not None:
            self._loader.load_state_dict(deepcopy(self._loader_state))
        self._pass, self._ahead = self.epochs, None
        self._pass_is_empty = self._loader_state is None  # nothing may be left of a resumed pass, which is no error
        self._rereading = max(1, workers) if self._options.replay and self._loader_state is not None else 0
        self._loader_state = iter(self._loader).state_dict()

    def ready(self) -> None:
        """Have the next batch ready, or keep the error for the step that needs this batch."""
        try:
            self._ahead = self._ahead or self._read()
        except DataError as error:
            self._ahead = error
            self.close()  # the frames of the error keep this stream alive

    def step(self) -> Iterator[tuple[float, Any]]:
        self.count, content = 0, content_hasher()
        for _ in range(self._micro_batches):
            self.ready()
            if isinstance(self._ahead, DataError):
                raise self._ahead
            batch, self._ahead = self._ahead, None
            assert batch is not None
            first = self.consumed + self.count
            self.positions = range(first, first + batch.size)
            self.count += batch.size
            hash_content(batch.content, content)
            self.digest = content.intdigest()
            yield 1 / self._micro_batches, to_device(batch.content, self._device)

    @property
    def step_samples(self) -> StepSamples:
        return StepSamples(self.digest)

    def advance(self, whole: StepSamples | None = None) -> None:
        self._loader_state = self._loader.state_dict()
        self.consumed += self.count
        self.epochs_before = self.epochs
        try:
            with signals.stop_reads():
                self._finish_pass()
        except signals.Stopped:  # before the next batch could tell whether the pass has ended
            self._end_unknown = True

    def ledger_line(self, step: int) -> LedgerLine:
        return LedgerLine(step, self.consumed - self.count, self.consumed - 1, self.digest)

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "opaque",
            "workers": self._loading.num_workers,
            "consumed": self.consumed,
            "epochs": self.epochs,
            "epochs_before": self.epochs_before,
            "loader": deepcopy(self._loader_state),
            **({"unseen": True} if self._end_unknown else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        name = type(self._samples).__qualname__
        if state.get("kind") != "opaque":
            raise DataError(
                f"data.train is an iterable now ({name}) and was map-style; restore it, or set run.name=..."
            )
        before = state["workers"]
        if self.automatic:  # a new run begins with 0, a resumed one keeps its number
            self._loading = replace(self._loading, num_workers=before)
        if before != self.workers:
            raise DataError(
                f"the checkpoint is of a data.train read by {before} workers, and now {self.workers} read it, "
                f"so samples would be lost or repeated. Set runtime.num_workers={before}, or run.name=... for a new run"
            )
        self.consumed, self.epochs, self.epochs_before = state["consumed"], state["epochs"], state["epochs_before"]
        self._loader_state = state["loader"]
        self.open()
        if state.get("unseen"):
            self._finish_pass()

    def changes(self, state: dict[str, Any]) -> list[str]:
        """Only the kind of data and the number of workers can be compared."""
        same = state.get("kind") == "opaque" and state["workers"] == self.workers
        return [] if same else ["another kind of data, or another number of workers"]

    def _finish_pass(self) -> None:
        """Read a batch ahead to see whether the pass has ended with the last step."""
        before = self._pass
        self.ready()
        if self._pass > before:
            self._loader_state = self._pass_state
        self.epochs = self._pass

    def _read(self) -> Batch:
        """The next batch; at the end of a pass, the first of the next pass."""
        began = time.perf_counter()
        while True:
            rereading, self._rereading = self._rereading > 0, self._rereading - 1
            with doing("reads again") if rereading else nullcontext():
                batch: Batch | None = next(self._loader, None)
            if batch is not None:
                break
            if self._pass_is_empty:
                raise self._empty()
            self._pass += 1
            self._pass_is_empty = True
            self._pass_state = iter(self._loader).state_dict()
        self._pass_is_empty = False
        waited = time.perf_counter() - began
        self.waited += waited
        if batch.reread and self._options.replay:
            _log.info("data.train: read %d samples again to resume, %.1f s", batch.reread, waited)
        if batch.failure:
            raise DataError(batch.failure)
        return batch

    def _empty(self) -> DataError:
        name, size = type(self._samples).__qualname__, self._options.batch_size
        if self._pass > 0:
            return DataError(
                f"data.train is empty from pass {self._pass} on: this {name} yielded samples before and now none. "
                "Expected an __iter__ that begins anew every time; fix it"
            )
        dropped = f", or less than a batch of {size} in each worker, which is dropped" * self._options.drop_last
        return DataError(
            f"data.train is empty: {name} yielded nothing in a whole pass{dropped}; look at files and filters"
        )


def _loses_its_buffer(samples: Any) -> bool:
    """Whether it is a data set of Hugging Face that shuffles in a buffer."""
    inner = [getattr(samples, name, None) for name in ("_ex_iterable", "ex_iterable")]
    parts = [part for part in (*inner, *getattr(samples, "ex_iterables", ())) if part is not None]
    return type(samples).__name__ == "BufferShuffledExamplesIterable" or any(map(_loses_its_buffer, parts))


def _require_iterable(samples: Any) -> None:
    """Raise DataError unless each ``iter`` of the samples can begin anew or at a state."""
    name = type(samples).__qualname__
    if not hasattr(samples, "__iter__"):
        raise DataError(
            f"data.train is of class {name}, which is neither map-style (__len__, __getitem__) nor has __iter__"
        )
    if hasattr(samples, "__next__") and not stateful(samples):
        raise DataError(
            f"data.train is of class {name}, which can be read only once; give it as an object with __iter__"
        )

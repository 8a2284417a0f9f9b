"""Training on a user's iterable, which resumes by its own state: a weaker guarantee than for map-style data."""

import logging
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from runner import signals
from runner.activity import doing
from runner.data.fetch import Collate
from runner.data.iterable import Batch, BatchOptions, IterableBatches, iterator, stateful
from runner.data.ledger import LedgerLine
from runner.data.loader import Loader, LoaderOptions
from runner.data.stream import StepSamples, to_device
from runner.errors import DataError
from runner.hashing import content_hasher

_log = logging.getLogger("runner")


class IterableStream:
    """Training batches of an iterable data set, resumed by its own state.

    The state is the one after the last finished step, however far workers have read ahead. ``advance`` reads one batch
    ahead, because there is no other way to find out whether a pass has ended. With ``replay`` the iterable needs no
    state: a resume reads the current pass again, up to its position. See ``TrainingStream`` for the public members.

    Hugging Face's ``datasets`` 5.2: its state is exact with any number of workers as long as nothing is shuffled.
    ``IterableDataset.shuffle`` leaves its buffer out of the state, so that a resume loses and repeats samples, and with
    ``buffer_size=1`` workers fail to load the state (an IndexError). With ``replay`` all of these are exact.
    """

    def __init__(
        self,
        samples: Iterable[Any],
        *,
        seed: int,
        batch_size: int,
        micro_batches: int,
        randomness: str,
        loading: LoaderOptions,
        device: torch.device,
        collate: Collate | None = None,
        drop_last: bool = False,
        replay: bool = False,
        audit: bool = False,
    ) -> None:
        _require_resumable(samples, replay=replay)
        self.consumed = 0
        self.epochs = 0  # finished passes
        self.epochs_before = 0
        self.waited = 0.0
        self.count = 0  # samples of the current step
        self.digest = 0  # 64 bits of their content
        self.substituted = 0  # a bad sample ends the run
        self._samples = samples
        self._micro_batches = micro_batches
        self._loading = loading
        self._device = device
        micro_size = batch_size // micro_batches
        self._options = BatchOptions(seed, micro_size, randomness, collate or default_collate, drop_last, replay, audit)
        self._saved: Any = None  # the state of the loader after the last finished step
        self._loader: Any = None
        self._ahead: Batch | DataError | None = None
        self._pass = 0  # of the batch ahead
        self._pass_state: Any = None  # the state of the loader at its beginning
        self._pass_is_empty = True  # so far
        self._rereading = 0  # further batches before which a worker may have to read the pass again
        self._end_unseen = False  # a signal came before the batch ahead could tell whether the last step ended the pass

    @property
    def workers(self) -> int:
        return self._loading.num_workers

    @property
    def guarantee(self) -> str:
        name, workers = type(self._samples).__qualname__, self._loading.num_workers
        method = "by reading the current pass again" if self._options.replay else "by its own state"
        promise = (
            "as if not interrupted if every pass can be repeated" if self._options.replay else "as exactly as that is"
        )
        shares = f"; each worker reads what {name} gives it by torch.utils.data.get_worker_info()" * (workers > 1)
        return (
            f"data.train is a {name}, an iterable: a resume goes on {method}, {promise}, "
            f"and only with runtime.num_workers={workers}{shares}. A map-style data set is resumed exactly"
        )

    def open(self) -> None:
        self.close()
        workers, start_method = self._loading.num_workers, self._loading.start_method
        epoch_lock = multiprocessing.get_context(start_method).Lock() if workers else nullcontext()
        batches = IterableBatches(self._samples, self._options, epoch_lock)
        key = f"data.train (a {type(self._samples).__qualname__})"
        self._loader = Loader(batches, None, self._loading, key=key, states=True)
        if self._saved is not None:
            self._loader.load_state_dict(deepcopy(self._saved))
        self._pass, self._ahead = self.epochs, None
        self._pass_is_empty = self._saved is None
        self._rereading = max(1, workers) if self._options.replay and self._saved is not None else 0
        self._saved = self._begin_pass()

    def ready(self) -> None:
        self._look_ahead()

    def step(self) -> Iterator[tuple[float, Any]]:
        assert self._loader is not None, "open() comes first"
        self.count, content = 0, content_hasher()
        for _ in range(self._micro_batches):
            self._look_ahead()
            if isinstance(self._ahead, DataError):
                raise self._ahead
            batch, self._ahead = self._ahead, None
            assert batch is not None
            self.count += batch.size
            _hash_content(batch.content, content)
            self.digest = content.intdigest()
            yield 1 / self._micro_batches, to_device(batch.content, self._device)

    @property
    def step_samples(self) -> StepSamples:
        return StepSamples(self.digest)

    def advance(self, whole: StepSamples | None = None) -> None:
        self._saved = self._loader.state_dict()
        self.consumed += self.count
        self.epochs_before = self.epochs
        try:
            with signals.at_once():
                self._finish_pass()
        except signals.Stopped:
            self._end_unseen = True

    def ledger_line(self, step: int) -> LedgerLine:
        return LedgerLine(step, self.consumed - self.count, self.consumed - 1, self.digest)

    def state_dict(self) -> dict[str, Any]:
        assert self._loader is not None, "open() comes first"
        return {
            "kind": "opaque",
            "workers": self._loading.num_workers,
            "consumed": self.consumed,
            "epochs": self.epochs,
            "epochs_before": self.epochs_before,
            "loader": deepcopy(self._saved),
            **({"unseen": True} if self._end_unseen else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        name, workers = type(self._samples).__qualname__, self.workers
        if state.get("kind") != "opaque":
            raise DataError(
                f"data.train is a {name}, an iterable, but the checkpoint holds a position in map-style data, which "
                "means nothing to it. Restore the data set, or begin a new run with run.name=..."
            )
        if state["workers"] != workers:
            raise DataError(
                f"the checkpoint holds the state of a data.train read by {state['workers']} workers, and now {workers} "
                f"read it; an iterable shares itself out to them as it likes, so that samples would be lost or "
                f"repeated. Go on with runtime.num_workers={state['workers']}, or begin a new run with run.name=..."
            )
        self.consumed, self.epochs, self.epochs_before = state["consumed"], state["epochs"], state["epochs_before"]
        self._saved = state["loader"]
        self.open()
        if state.get("unseen"):
            self._finish_pass()

    def changes(self, state: dict[str, Any]) -> list[str]:
        """Only the kind of data and the number of workers can be compared."""
        if state.get("kind") != "opaque" or state["workers"] != self.workers:
            return ["another kind of data, or another number of workers"]
        return []

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _begin_pass(self) -> Any:
        """Let the workers begin a pass, or go to a loaded state. Returns the state of the loader there."""
        return iter(self._loader).state_dict()

    def _finish_pass(self) -> None:
        """Read a batch ahead to see whether the pass has ended with the last step."""
        before = self._pass
        self._look_ahead()
        if self._pass > before:
            self._saved = self._pass_state
        self.epochs = self._pass

    def _look_ahead(self) -> None:
        """Have the next batch at hand, or the error that belongs to the step which needs this batch."""
        try:
            self._ahead = self._ahead or self._read()
        except DataError as error:
            self._ahead = error
            self.close()  # the frames of the error refer to this stream, which may thus live on

    def _read(self) -> Batch:
        """The next batch, from the next pass where a pass has ended."""
        began = time.perf_counter()
        while (batch := self._receive()) is None:
            if self._pass_is_empty:
                raise self._empty()
            self._pass += 1
            self._pass_is_empty = True
            self._pass_state = self._begin_pass()
        self._pass_is_empty = False
        waited = time.perf_counter() - began
        self.waited += waited
        if batch.reread and self._options.replay:
            _log.info("data.train: read %d samples again to resume, %.1f s", batch.reread, waited)
        if batch.failure:
            raise DataError(batch.failure)
        return batch

    def _receive(self) -> Batch | None:
        rereading, self._rereading = self._rereading > 0, self._rereading - 1
        with doing("reads again") if rereading else nullcontext():
            batch: Batch | None = next(self._loader, None)
        return batch

    def _empty(self) -> DataError:
        name, size = type(self._samples).__qualname__, self._options.batch_size
        if self._pass > 0:
            return DataError(
                f"data.train is empty from pass {self._pass} on: this {name} yielded samples before and now none. "
                "Expected an __iter__ that begins anew every time; mend it"
            )
        dropped = (
            f", or less than a batch of {size} in each worker, which is dropped" if self._options.drop_last else ""
        )
        return DataError(
            f"data.train is empty: a {name} that yielded nothing in a whole pass{dropped}; expected a sample at least. "
            "Look at its files and filters"
        )


def _require_resumable(samples: Any, *, replay: bool) -> None:
    """Raise DataError unless the iterable can be resumed by its state or by reading it again."""
    name = type(samples).__qualname__
    if not hasattr(samples, "__iter__"):
        raise DataError(f"data.train is a {name}, which is neither map-style (__len__, __getitem__) nor has __iter__")
    if stateful(samples):
        return
    if hasattr(samples, "__next__"):
        raise DataError(f"data.train is a {name}, which can be read only once; give it as an object with __iter__")
    if not replay and not stateful(iterator(samples)):
        raise DataError(
            f"data.train is a {name}, an iterable without state_dict and load_state_dict (nor has its iterator), so a "
            "resume cannot know where it was. Give it both, make it map-style (__len__, __getitem__), or set "
            "data.replay=true: every resume then reads the current pass again up to there"
        )


def _hash_content(value: Any, content: Any) -> None:
    """Update the hash ``content`` with a batch: tensors, arrays and plain values by content, other values by type.

    The ledger holds these digests, so they must not change; ``probe.content_digest`` serves comparisons within a
    process and sees more types.
    """
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        content.update(f"{value.dtype}{[*value.shape]}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content.update(f"{value.dtype}{[*value.shape]}".encode())
        content.update(value.tobytes())
    elif isinstance(value, Mapping):
        _hash_content([*value.items()], content)
    elif isinstance(value, list | tuple):
        content.update(f"({len(value)}".encode())
        for item in value:
            _hash_content(item, content)
    else:
        plain = value is None or isinstance(value, str | bytes | int | float | complex)
        content.update(f"{type(value).__qualname__}{value!r};".encode() if plain else type(value).__qualname__.encode())

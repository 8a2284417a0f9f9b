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
import xxhash
from torch.utils.data import default_collate

from runner import signals
from runner.activity import doing
from runner.data.fetch import Collate
from runner.data.iterable import Batch, BatchRecipe, Passes, iterator, stateful
from runner.data.ledger import LedgerLine
from runner.data.loader import Loader, LoaderOptions
from runner.data.stream import StepSamples, to_device
from runner.errors import DataError

_log = logging.getLogger("runner")


class IterableStream:
    """Training batches of an iterable data set, resumed by its own state: a weaker guarantee, said at start.

    The state is that after the last finished step, however far workers have read ahead. ``advance`` reads one batch
    ahead, because there is no other way to find out whether a pass has ended.

    With ``replay`` the iterable needs no state: a resume reads the current pass again, up to where it was.

    Hugging Face's ``datasets`` 5.2: its state is exact with any number of workers as long as nothing is shuffled.
    After ``IterableDataset.shuffle`` it leaves the buffer out, so that a resume loses and repeats samples, and with
    ``buffer_size=1`` workers fail to load it (an IndexError). With ``replay`` every one of these is exact.
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
        self.consumed = 0  # samples of finished steps
        self.epochs = 0  # passes finished by them
        self.epochs_before = 0  # the same, before the last of them
        self.waited = 0.0  # seconds spent in waiting for batches
        self.count = 0  # samples of the current step
        self.digest = 0  # 64 bits of their content, to compare a replay with
        self.substituted = 0  # a bad sample ends the run
        self._samples = samples
        self._micro_batches = micro_batches
        self._loading = loading
        self._device = device
        micro_size = batch_size // micro_batches
        self._making = BatchRecipe(seed, micro_size, randomness, collate or default_collate, drop_last, replay, audit)
        self._saved: Any = None  # the state of the loader after the last finished step
        self._batches: Any = None
        self._ahead: Batch | DataError | None = None
        self._pass = 0
        self._start: Any = None  # the state at its beginning
        self._untouched = True  # the current pass has not yielded anything
        self._behind = 0  # batches before which a worker may have to read the pass again
        self._unseen = False  # a signal came before it was seen whether the pass ended with the last step

    @property
    def workers(self) -> int:
        """Processes that load data."""
        return self._loading.num_workers

    @property
    def guarantee(self) -> str:
        """What may be relied upon, for people."""
        name, workers = type(self._samples).__qualname__, self._loading.num_workers
        how = "by reading the current pass again" if self._making.replay else "by its own state"
        promise = (
            "as if not interrupted if every pass can be repeated" if self._making.replay else "as exactly as that is"
        )
        shares = f"; each worker reads what {name} gives it by torch.utils.data.get_worker_info()" * (workers > 1)
        return (
            f"data.train is a {name}, an iterable: a resume goes on {how}, {promise}, "
            f"and only with runtime.num_workers={workers}{shares}. A map-style data set is resumed exactly"
        )

    def open(self) -> None:
        """Start loading after the last finished step."""
        self.close()
        workers, method = self._loading.num_workers, self._loading.start_method
        turn = multiprocessing.get_context(method).Lock() if workers else nullcontext()
        passes = Passes(self._samples, self._making, turn)
        self._batches = Loader(
            passes, None, self._loading, key=f"data.train (a {type(self._samples).__qualname__})", states=True
        )
        if self._saved is not None:
            self._batches.load_state_dict(deepcopy(self._saved))
        self._pass, self._ahead = self.epochs, None
        self._untouched = self._saved is None
        self._behind = max(1, workers) if self._making.replay and self._saved is not None else 0
        self._saved = self._begin_pass()

    def ready(self) -> None:
        """Wait for the first micro-batch of the next step."""
        self._look_ahead()

    def step(self) -> Iterator[tuple[float, Any]]:
        """The micro-batches of the next step, each with its share of the step, on the device."""
        assert self._batches is not None, "open() comes first"
        self.count, content = 0, xxhash.xxh3_64()
        for _ in range(self._micro_batches):
            self._look_ahead()
            if isinstance(self._ahead, DataError):
                raise self._ahead
            batch, self._ahead = self._ahead, None
            assert batch is not None
            self.count += batch.size
            _add(batch.content, content)
            self.digest = content.intdigest()
            yield 1 / self._micro_batches, to_device(batch.content, self._device)

    @property
    def step_samples(self) -> StepSamples:
        """The content of the current step."""
        return StepSamples(self.digest)

    def advance(self, whole: StepSamples | None = None) -> None:
        """The step that used the current batches is done."""
        self._saved = self._batches.state_dict()
        self.consumed += self.count
        self.epochs_before = self.epochs
        try:
            with signals.at_once():
                self._turn()
        except signals.Stopped:
            self._unseen = True

    def ledger_line(self, step: int) -> LedgerLine:
        """What the ledger says of the last finished step, which has that number."""
        return LedgerLine(step, self.consumed - self.count, self.consumed - 1, self.digest)

    def state_dict(self) -> dict[str, Any]:
        assert self._batches is not None, "open() comes first"
        return {
            "kind": "opaque",
            "workers": self._loading.num_workers,
            "consumed": self.consumed,
            "epochs": self.epochs,
            "epochs_before": self.epochs_before,
            "loader": deepcopy(self._saved),
            **({"unseen": True} if self._unseen else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a saved step. Raises DataError where the state is that of something else."""
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
            self._turn()

    def changes(self, state: dict[str, Any]) -> list[str]:
        """In what the data of a saved position is not this data, as far as can be told."""
        if state.get("kind") != "opaque" or state["workers"] != self.workers:
            return ["another kind of data, or another number of workers"]
        return []

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()

    def _begin_pass(self) -> Any:
        """Let the workers begin a pass, or go on where they were told to; the state of the loader then."""
        return iter(self._batches).state_dict()

    def _turn(self) -> None:
        """See whether the pass has ended with the last step."""
        before = self._pass
        self._look_ahead()
        if self._pass > before:
            self._saved = self._start
        self.epochs = self._pass

    def _look_ahead(self) -> None:
        """Have the next batch at hand, or the error that belongs to the step which asks for it."""
        try:
            self._ahead = self._ahead or self._read()
        except DataError as error:
            self._ahead = error
            self.close()  # the error refers to this stream, which may thus live on for long

    def _read(self) -> Batch:
        """The next batch, from the next pass where one has ended."""
        asked = time.perf_counter()
        while (batch := self._received()) is None:
            if self._untouched:
                raise self._empty()
            self._pass += 1
            self._untouched = True
            self._start = self._begin_pass()
        self._untouched = False
        waited = time.perf_counter() - asked
        self.waited += waited
        if batch.again and self._making.replay:
            _log.info("data.train: read %d samples again to resume, %.1f s", batch.again, waited)
        if batch.failure:
            raise DataError(batch.failure)
        return batch

    def _received(self) -> Batch | None:
        behind, self._behind = self._behind > 0, self._behind - 1
        with doing("reads again") if behind else nullcontext():
            batch: Batch | None = next(self._batches, None)
        return batch

    def _empty(self) -> DataError:
        name, size = type(self._samples).__qualname__, self._making.batch_size
        if self._pass > 0:
            return DataError(
                f"data.train is empty from pass {self._pass} on: this {name} yielded samples before and now none. "
                "Expected that its __iter__ begins anew every time; mend it"
            )
        dropped = f", or less than a batch of {size} in each worker, which is dropped" if self._making.drop_last else ""
        return DataError(
            f"data.train is empty: a {name} that yielded nothing in a whole pass{dropped}; expected a sample at least. "
            "Look at its files and filters"
        )


def _require_resumable(samples: Any, *, replay: bool) -> None:
    """Raises DataError unless the iterable can be resumed by its state or by reading it again."""
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


def _add(value: Any, content: Any) -> None:
    """Add a batch to a hash: tensors, arrays and plain values by content, anything else by its type."""
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        content.update(f"{value.dtype}{[*value.shape]}".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content.update(f"{value.dtype}{[*value.shape]}".encode())
        content.update(value.tobytes())
    elif isinstance(value, Mapping):
        _add([*value.items()], content)
    elif isinstance(value, list | tuple):
        content.update(f"({len(value)}".encode())
        for item in value:
            _add(item, content)
    else:
        plain = value is None or isinstance(value, str | bytes | int | float | complex)
        content.update(f"{type(value).__qualname__}{value!r};".encode() if plain else type(value).__qualname__.encode())

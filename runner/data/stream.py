"""The endless stream of training batches, whose position moves when a step is done."""

import logging
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch

from runner.data import probe
from runner.data.fetch import MAX_SUBSTITUTES, BadRecord, Collate, FetchedBatch, Fetcher, Samples, bad_record_error
from runner.data.ledger import LedgerLine
from runner.data.loader import Loader, LoaderOptions
from runner.data.plan import Plan, Slice
from runner.errors import DataError, printable

log = logging.getLogger("runner")

_MAX_LOGGED = 20  # bad records; the others are only counted


class StepSamples(NamedTuple):
    """The samples of a step: a 64-bit digest, which adds up over processes, and the substitutions in the format of the
    ledger.
    """

    digest: int
    substitutions: str = ""


class TrainingStream(Protocol):
    """Training data as a part of the state. ``consumed`` counts the samples of finished steps: it moves in ``advance``,
    after the optimizer step, however far workers have read ahead.

    ``waited``: seconds spent waiting for batches. ``epochs``: whole epochs consumed; ``epochs_before``: the same before
    the last finished step. ``substituted``: bad records replaced so far. ``workers``: processes that load data.
    ``guarantee``: the promise for the samples, for the log.
    """

    consumed: int
    waited: float
    epochs_before: int

    @property
    def workers(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def guarantee(self) -> str: ...

    @property
    def substituted(self) -> int: ...

    @property
    def step_samples(self) -> StepSamples:
        """The samples of the current step in this process. Raises DataError if its task did not take all of them."""

    def open(self) -> None:
        """Start loading at the cursor. Some loaders draw random numbers here, so open before restoring generators."""

    def ready(self) -> None:
        """Wait for the first micro-batch of the next step. A stop signal may raise ``signals.Stopped``."""

    def step(self) -> Iterator[tuple[float, Any]]:
        """The micro-batches of the next step on the device, each with its share of the step's samples."""

    def advance(self, whole: StepSamples | None = None) -> None:
        """The step of the current batch is done; ``whole`` are the samples of all processes, if there are others.
        Raises DataError if the step did not take all of its samples.
        """

    def ledger_line(self, step: int) -> LedgerLine:
        """The line of the ledger for the last finished step, whose number is ``step``."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises DataError if it is a position in other data."""

    def changes(self, state: dict[str, Any]) -> list[str]:
        """Messages on how the data of a saved position differs from this data."""

    def close(self) -> None:
        """End the workers, within some seconds."""


class MapStyleStream:
    """The stream of a map-style data set. Its state is {positions consumed, plan, fingerprint}, the same for any number
    of workers and processes.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Plan,
        *,
        loading: LoaderOptions,
        device: torch.device,
        collate: Collate | None = None,
        substitute: bool = False,
        audit: bool = False,
    ) -> None:
        self.plan = plan
        self.consumed = 0
        self.waited = 0.0
        self.epochs_before = 0
        self.substituted = 0
        self._fetcher = Fetcher(samples, plan, label="train", collate=collate, substitute=substitute)
        self._plan_state = plan.state()
        sketch, self._probe_digests = probe.examine(self._fetcher, loading, audit=audit)
        self._fingerprint: dict[str, Any] = {"samples": sketch, "text": str(getattr(samples, "fingerprint", ""))}
        self._loading = loading
        self._device = device
        self._steps: Iterator[list[Slice]] = iter(())
        self._loader: Loader | None = None
        self._probe_awaited = False  # the first item of the loader is the answer of a worker to the probe
        self._ahead: FetchedBatch | None = None
        self._step: tuple[int, int, StepSamples] | None = None  # the current one: first position, positions, samples

    @property
    def epochs(self) -> int:
        return self.consumed // self.plan.epoch_size

    @property
    def workers(self) -> int:
        return self._loading.num_workers

    @property
    def guarantee(self) -> str:
        return f"{self.plan.samples} samples, {self.plan.portion}; {self.plan.guarantee}"

    def repeat_substitutions(self, substitutions: Mapping[int, int]) -> None:
        """Before ``open``: use the samples at these positions that an earlier attempt used (position -> index)."""
        self._fetcher.substitutions = {**substitutions}

    def open(self) -> None:
        self.close()
        order, world = self._fetcher.order, self.plan.world
        self._steps = self.plan.steps(self.consumed, order)
        prefetched = self.plan.steps(self.consumed, order)  # runs ahead of the steps above
        slices = (piece for step in prefetched for piece in step[world.rank :: world.size])
        self._probe_awaited = self._probe_digests is not None and self._loading.num_workers > 0
        requests = [probe.sample_digests] if self._probe_awaited else []
        self._loader = Loader(self._fetcher, chain(requests, slices), self._loading)
        iter(self._loader)
        self._ahead = None

    def ready(self) -> None:
        assert self._loader is not None, "open() comes first"
        if self._probe_awaited:
            assert self._probe_digests is not None
            probe.require_same_in_worker(self._fetcher, self._probe_digests, next(self._loader))
            self._probe_awaited = False
        self._ahead = self._ahead or self._next()

    def step(self) -> Iterator[tuple[float, Any]]:
        self.ready()
        slices = next(self._steps)
        total = sum(piece.count for piece in slices)
        own = slices[self.plan.world.rank :: self.plan.world.size]
        digest, substitutions, self._step = 0, "", None
        for number, piece in enumerate(own, 1):
            fetched, self._ahead = self._ahead or self._next(), None
            if fetched.failure:
                raise DataError(f"data.train: {fetched.failure}")
            assert fetched.first == piece.first, f"the loader delivered {fetched.first} where {piece.first} was due"
            digest += fetched.digest
            substitutions += self._report(fetched.bad)
            if number == len(own):
                self._step = slices[0].first, total, StepSamples(digest % 2**64, substitutions)
            yield piece.count / total, to_device(fetched.batch, self._device)

    @property
    def step_samples(self) -> StepSamples:
        if self._step is None:
            raise DataError(
                f"the task's optimization_step left some of the {self.plan.micro_batches} micro-batches of a step; "
                "their samples would be missed. Go through all that it is given"
            )
        return self._step[2]

    def advance(self, whole: StepSamples | None = None) -> None:
        samples = whole or self.step_samples
        assert self._step is not None, "step() comes first"
        first, count, _ = self._step
        self._step = first, count, samples
        self.epochs_before = self.epochs
        self.substituted += samples.substitutions.count(">")
        self.consumed += count

    def ledger_line(self, step: int) -> LedgerLine:
        assert self._step is not None, "advance() comes first"
        first, count, (digest, substitutions) = self._step
        return LedgerLine(step, first, first + count - 1, digest, substitutions)

    def first_batches(self) -> list[Any]:
        """The micro-batches of the run's first step, of all processes, on the device, read in this process. The
        stream's position does not move.
        """
        pieces = next(self.plan.steps(0, self._fetcher.order))
        return [to_device(self._fetcher[piece].batch, self._device) for piece in pieces]

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "epochs_before": self.epochs_before,
            "substituted": self.substituted,
            "plan": self._plan_state,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        changes = self.changes(state)
        if changes:
            raise DataError(
                f"the data is not what this run began with, so 'every sample exactly once' cannot be kept:\n"
                f"  {printable(chr(10).join(changes)).replace(chr(10), chr(10) + '  ')}\n"
                "Restore it, or begin a new run with run.name=...",
                kind="data-changed",
            )
        self.consumed, self.epochs_before = state["consumed"], state["epochs_before"]
        self.substituted = state["substituted"]
        self.open()

    def changes(self, state: dict[str, Any]) -> list[str]:
        saved, now = state.get("plan", {}), self._plan_state
        changes = [
            f"{key}: {saved.get(key)} then, {now.get(key)} now"
            for key in (now | saved)
            if now.get(key) != saved.get(key)
        ]
        then = state.get("fingerprint", {})
        changes += probe.differences(then.get("samples", {}), self._fingerprint["samples"])
        if then.get("text", "") != self._fingerprint["text"]:
            changes.append(f"fingerprint: {then.get('text') or 'none'} then, {self._fingerprint['text'] or 'none'} now")
        return changes

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _next(self) -> FetchedBatch:
        assert self._loader is not None
        began = time.perf_counter()
        fetched: FetchedBatch = next(self._loader)
        self.waited += time.perf_counter() - began
        return fetched

    def _report(self, records: Sequence[BadRecord]) -> str:
        """Log bad records, and return their substitutions in the format of the ledger. Raises DataError for a record
        without a substitute.
        """
        for number, record in enumerate(records, self.substituted):
            if record.substitute is None:
                remedy = (
                    f"{MAX_SUBSTITUTES} others in its place could not be read either; look at the data set"
                    if self._fetcher.substitute
                    else "mend or remove it, or take another sample in its place with data.on_bad_record=substitute"
                )
                raise bad_record_error(record, self._fetcher.samples, remedy=remedy)
            if number < _MAX_LOGGED:
                error = printable(record.error.splitlines()[-1])
                log.warning("bad      %s: %s; sample %d instead", record.location, error, record.substitute)
        return "".join(f" {record.position}:{record.index}>{record.substitute}" for record in records)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device, asynchronously from pinned memory.

    Moves what has a ``to`` method by this method, the items of sequences, mappings and dataclasses, and the tensors
    that are attributes of any other object.
    """
    if device.type == "cpu" or isinstance(batch, str | bytes | range | type):
        return batch
    if callable(getattr(batch, "to", None)):
        try:
            moved = batch.to(device, non_blocking=True)
        except TypeError:  # a class of the user, whose ``to`` takes the device alone
            moved = batch.to(device)
        return batch if moved is None else moved  # None: moved in place
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, Sequence):
        return type(batch)(to_device(value, device) for value in batch)  # type: ignore[call-arg]
    if isinstance(batch, Mapping):
        items = {key: to_device(value, device) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping) or type(batch) is dict:
            return items
        other = copy(batch)  # of the same class, with its attributes
        other.update(items)
        return other
    if is_dataclass(batch):
        names = [field.name for field in fields(batch)]
    else:  # attributes may refer to anything, so look no deeper
        names = [name for name, value in getattr(batch, "__dict__", {}).items() if isinstance(value, torch.Tensor)]
    other = copy(batch) if names else batch
    for name in names:
        object.__setattr__(other, name, to_device(getattr(batch, name), device))  # dataclasses may be frozen
    return other

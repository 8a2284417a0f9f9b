"""The endless stream of training batches, whose position moves when a step is done; and passes over evaluation data,
which change neither this position nor the global random generators.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import tee
from typing import Any, NamedTuple

import torch

from runner.data import probe
from runner.data.fetch import MAX_SUBSTITUTES, BadRecord, Collate, FetchedBatch, Fetcher, Samples, bad_record_error
from runner.data.ledger import LedgerLine
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan, Slice
from runner.data.workers import BatchLoader, examine
from runner.distributed.world import World
from runner.errors import DataError, printable

log = logging.getLogger("runner")

_MAX_LOGGED = 20  # bad records that are logged; more are only counted


class StepSamples(NamedTuple):
    """The samples of a step."""

    digest: int  # 64 bits; the digests of processes add up
    substitutions: str = ""  # in the format of the ledger


def stateful(thing: Any) -> bool:
    """Whether an object has ``state_dict`` and ``load_state_dict``."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


class TrainingStream(ABC):
    """Training data as a part of the state. ``consumed`` counts the samples of finished steps: it moves in ``advance``,
    after the optimizer step, however far workers have read ahead.

    ``waited``: seconds spent waiting for batches. ``epochs_before``: ``epochs`` before the last finished step.
    ``substituted``: bad records replaced so far.
    """

    consumed = epochs_before = substituted = 0
    waited = 0.0
    positions = range(0)  # positions of the micro-batch that ``step`` yielded last

    def __init__(self, loading: LoaderOptions, device: torch.device) -> None:
        self._loading = loading
        self._device = device
        self._loader: Any = None

    @property
    def workers(self) -> int:
        """The number of processes that load data at present."""
        return self._loader.workers if isinstance(self._loader, BatchLoader) else self._loading.num_workers

    @property
    def automatic(self) -> bool:
        """Whether ``runtime.num_workers=auto``."""
        return self._loading.limits is not None

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Whole epochs consumed."""

    @property
    @abstractmethod
    def guarantee(self) -> str:
        """The promise about the samples, for the log."""

    @property
    @abstractmethod
    def step_samples(self) -> StepSamples:
        """The samples of the current step in this process. Raises DataError if its task did not take all of them."""

    @abstractmethod
    def open(self) -> None:
        """Start loading at the cursor. Some loaders draw random numbers in it, so open before restoring generators."""

    @abstractmethod
    def ready(self) -> None:
        """Wait for the first micro-batch of the next step. A stop signal may raise ``signals.Stopped``."""

    @abstractmethod
    def step(self) -> Iterator[tuple[float, Any]]:
        """The micro-batches of the next step on the device, each with its share of the step's samples."""

    @abstractmethod
    def advance(self, whole: StepSamples | None = None) -> None:
        """End a step with the samples ``whole`` of all processes. Raises DataError if the task did not take all."""

    @abstractmethod
    def ledger_line(self, step: int) -> LedgerLine:
        """The line of the ledger for the last finished step, whose number is ``step``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the last finished step."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises DataError if it is a position in other data."""

    @abstractmethod
    def changes(self, state: dict[str, Any]) -> list[str]:
        """Messages on how the data of a saved position differs from this data."""

    def close(self) -> None:
        """End the workers, within some seconds."""
        if self._loader is not None:
            self._loader.close()


class MapStyleStream(TrainingStream):
    """The stream of a map-style data set. Its state is the same for any number of workers and processes."""

    def __init__(self, fetcher: Fetcher, *, loading: LoaderOptions, device: torch.device, audit: bool = False) -> None:
        super().__init__(loading, device)
        self.plan = fetcher.plan
        self._fetcher = fetcher
        self._plan_state = self.plan.state()
        self._local_fetcher, sketch, self._probe_digests = examine(fetcher, loading, audit=audit)
        text = str(getattr(fetcher.samples, "fingerprint", ""))
        self._fingerprint: dict[str, Any] = {"samples": sketch, "text": text}
        self._steps: Iterator[list[Slice]] = iter(())
        self._prefetched: FetchedBatch | None = None
        self._step: tuple[int, int, StepSamples] | None = None  # first position, positions, samples

    @property
    def epochs(self) -> int:
        return self.consumed // self.plan.epoch_size

    @property
    def guarantee(self) -> str:
        return self.plan.guarantee

    def repeat_substitutions(self, substitutions: Mapping[int, int]) -> None:
        """Before ``open``: use the samples of an earlier attempt at these positions (position -> index)."""
        self._fetcher.substitutions = self._local_fetcher.substitutions = {**substitutions}

    def open(self) -> None:
        self.close()
        self._prefetched = None
        world = self.plan.world
        self._steps, prefetched = tee(self.plan.steps(self.consumed, self._fetcher.order))
        slices = (piece for step in prefetched for piece in step[world.rank :: world.size])
        request = None if self._probe_digests is None else probe.sample_digests
        check = partial(probe.require_equal, self._local_fetcher, self._probe_digests or [], kind="sample-per-process")
        self._loader = BatchLoader(
            self._fetcher, slices, self._loading, local_fetcher=self._local_fetcher, request=request, check=check
        )
        iter(self._loader)

    def ready(self) -> None:
        if self._prefetched is None:
            self._loader.adapt()
        self._prefetched = self._prefetched or self._next()

    def step(self) -> Iterator[tuple[float, Any]]:
        self.ready()
        slices = next(self._steps)
        total = sum([piece.count for piece in slices])
        own = slices[self.plan.world.rank :: self.plan.world.size]
        digest, substitutions, self._step = 0, "", None
        for number, piece in enumerate(own, 1):
            result, self._prefetched = self._prefetched or self._next(), None
            if result.failure:
                raise DataError(f"data.train: {result.failure}")
            assert result.first == piece.first, f"the loader delivered {result.first} where {piece.first} was due"
            digest += result.digest
            if result.bad_records:
                substitutions += self._report(result.bad_records)
            if number == len(own):
                self._step = slices[0].first, total, StepSamples(digest % 2**64, substitutions)
            self.positions = range(piece.first, piece.first + piece.count)
            yield piece.count / total, to_device(result.batch, self._device)

    @property
    def step_samples(self) -> StepSamples:
        if self._step is None:
            raise DataError(
                f"the task's optimization_step did not take all {self.plan.micro_batches} micro-batches of a step, "
                "whose samples would be missed. Iterate over all of them"
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

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "epochs_before": self.epochs_before,
            "substituted": self.substituted,
            "plan": self._plan_state,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if changes := self.changes(state):
            raise DataError(
                "the data is not what this run began with, so 'every sample exactly once' cannot be kept:\n  "
                + printable("\n".join(changes)).replace("\n", "\n  ")
                + "\nRestore it, or start a new run with run.name=...",
                kind="data-changed",
            )
        self.consumed, self.epochs_before = state["consumed"], state["epochs_before"]
        self.substituted = state["substituted"]
        self.open()

    def changes(self, state: dict[str, Any]) -> list[str]:
        saved, now = state.get("plan", {}), self._plan_state
        changed = [key for key in (now | saved) if now.get(key) != saved.get(key)]
        changes = [f"{key}: {saved.get(key)} then, {now.get(key)} now" for key in changed]
        then = state.get("fingerprint", {})
        changes += probe.differences(then.get("samples", {}), self._fingerprint["samples"])
        if then.get("text", "") != self._fingerprint["text"]:
            changes.append(f"fingerprint: {then.get('text') or 'none'} then, {self._fingerprint['text'] or 'none'} now")
        return changes

    def _next(self) -> FetchedBatch:
        began = time.perf_counter()
        result: FetchedBatch = next(self._loader)
        self.waited += time.perf_counter() - began
        return result

    def _report(self, records: Sequence[BadRecord]) -> str:
        """Log bad records, and return their substitutions for the ledger. Raises DataError if one has none."""
        for number, record in enumerate(records, self.substituted):
            if record.substitute is None:
                remedy = (
                    f"{MAX_SUBSTITUTES} others in its place could not be read either; look at the data set"
                    if self._fetcher.substitute
                    else "fix or remove it, or take another sample in its place with data.on_bad_record=substitute"
                )
                raise bad_record_error(record, self._fetcher.samples, remedy=remedy)
            if number < _MAX_LOGGED:
                error = printable(record.error.splitlines()[-1])
                log.warning("bad      %s: %s; sample %d instead", record.location, error, record.substitute)
        return "".join(f" {record.position}:{record.index}>{record.substitute}" for record in records)


class EvaluationData:
    """Iterates over all samples of a data set once, in order, with fixed randomness.

    Batches are dealt to the processes in turn. A process that gets none in the last round gets the first batch with
    weight zero, so that all processes have the same number of batches. ``fingerprint`` describes the data.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        batch_size: int,
        randomness: str,
        loading: LoaderOptions,
        device: torch.device,
        collate: Collate | None = None,
        world: World | None = None,
        audit: bool = False,
        key: str = "data.validation",
    ) -> None:
        world = world or World()
        plan = Plan(len(samples), seed, batch_size, shuffle=False, randomness=randomness)
        every = [Slice(first, min(batch_size, plan.samples - first)) for first in range(0, plan.samples, batch_size)]
        slices = every[world.rank :: world.size]
        self._weights = [piece.count for piece in slices]
        if len(slices) < -(-len(every) // world.size):
            slices.append(every[0])
            self._weights.append(0)
        self._slices, self._loading = slices, loading
        self.key = key
        self.device = device
        self.batch_listeners: Sequence[Callable[[int], None]] = ()  # called before each batch with its number, from 0
        self._fetcher = Fetcher(samples, plan, label="evaluation", collate=collate)
        self._local_fetcher, sketch, _ = examine(self._fetcher, loading, audit=audit, key=key)
        self._loader: Any = BatchLoader(self._fetcher, slices, loading, local_fetcher=self._local_fetcher, key=key)
        self.fingerprint: dict[str, Any] = {"length": plan.samples, "samples": sketch}

    def head(self, batches: int) -> "EvaluationData":
        """Only the first batches of each process, without listeners; a single new worker reads them if workers do."""
        first = copy(self)
        first._slices, first._weights, first.batch_listeners = self._slices[:batches], self._weights[:batches], ()
        loading = replace(self._loading, num_workers=min(1, self._loading.num_workers))
        reader = self._local_fetcher
        first._loader = BatchLoader(reader, first._slices, loading, local_fetcher=reader, key=self.key)
        return first

    def changes(self, then: dict[str, Any]) -> list[str]:
        """Messages on how the data of the fingerprint ``then`` differs from this data."""
        before, now = then["length"], self.fingerprint["length"]
        messages = [] if before == now else [f"{before} samples then, {now} now"]
        return messages + probe.differences(then["samples"], self.fingerprint["samples"])

    def close(self) -> None:
        """End the workers, within some seconds."""
        self._loader.close()

    def __len__(self) -> int:
        """Batches of this process, as many as any other has."""
        return len(self._slices)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(number of samples, batch on the device); the number is 0 for a batch that fills up the last round."""
        for number, (weight, result) in enumerate(zip(self._weights, self._loader, strict=True)):
            for listener in self.batch_listeners:
                listener(number)
            self._loader.adapt()
            if result.bad_records:
                remedy = f"fix it or take it out of {self.key}: every figure is over all of its samples"
                raise bad_record_error(result.bad_records[0], self._fetcher.samples, remedy=remedy)
            if result.failure:
                raise DataError(f"{self.key}: {result.failure}")
            yield weight, to_device(result.batch, self.device)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device, asynchronously from pinned memory.

    Moves what has a ``to`` method, the items of sequences, mappings and dataclasses, and tensors that are attributes.
    """
    if device.type == "cpu" or isinstance(batch, str | bytes | range | type):
        return batch
    if callable(getattr(batch, "to", None)):
        try:
            moved = batch.to(device, non_blocking=True)
        except TypeError:  # the ``to`` of a user's class may take nothing but the device
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
        other = copy(batch)  # keeps the class and its attributes
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

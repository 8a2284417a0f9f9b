"""An endless stream of training batches, whose position moves when a step is done."""

import logging
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch

from runner.data import probe
from runner.data.fetch import SUBSTITUTES, Bad, Collate, Fetched, Fetcher, Samples, unreadable
from runner.data.ledger import Line
from runner.data.loader import Loader, Loading, Probed
from runner.data.look import look
from runner.data.plan import Plan, Slice
from runner.errors import DataError, printable

log = logging.getLogger("runner")

_TOLD = 20  # bad records that are logged; the rest is counted


class Read(NamedTuple):
    """The samples of a step: a 64-bit digest, which adds up over processes, and substituted samples, in the format of
    the ledger.
    """

    digest: int
    swaps: str = ""


class Stream(Protocol):
    """Training data as a part of the state. ``consumed`` counts samples of finished steps: it moves in ``advance``,
    after the optimizer step, however far workers have read ahead.

    ``waited``: seconds spent waiting for batches. ``epochs``: whole epochs consumed; ``epochs_before``: the same before
    the last finished step. ``guarantee``: what holds for the samples, in words.
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
    def read(self) -> Read:
        """What this process read of the current step, once it has been handed out."""

    def open(self) -> None:
        """Start loading at the cursor. Opening draws random numbers in some loaders, so it comes before they are
        restored.
        """

    def ready(self) -> None:
        """Wait for the first micro-batch of the next step. A stop signal may raise ``signals.Stopped``."""

    def step(self) -> Iterator[tuple[float, Any]]:
        """The micro-batches of the next step on the device, each with its share of the step's samples."""

    def advance(self, whole: Read | None = None) -> None:
        """The step that used the current batch is done; ``whole`` is what all processes read, if there are others."""

    def line(self, step: int) -> Line:
        """What the ledger says of the last finished step, which has that number."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises DataError when it is a position in something else."""

    def changes(self, state: dict[str, Any]) -> list[str]:
        """In what the data of a saved position is not this data, in words."""

    def close(self) -> None:
        """End the workers, within some seconds."""


class BatchStream:
    """The stream of a map-style data set: the state is {positions consumed, plan, fingerprint}, the same for any number
    of workers.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Plan,
        *,
        loading: Loading,
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
        described, self._found = look(self._fetcher, loading, audit=audit)
        self._fingerprint: dict[str, Any] = {"samples": described, "text": str(getattr(samples, "fingerprint", ""))}
        self._loading = loading
        self._device = device
        self._steps: Iterator[list[Slice]] = iter(())
        self._batches: Loader | None = None
        self._probed = False  # the first that comes from the loader is what a worker found
        self._ahead: Fetched | None = None
        self._step: tuple[int, int, Read] | None = None  # first position, count: of the current step, once handed out

    @property
    def epochs(self) -> int:
        """Whole epochs consumed."""
        return self.consumed // self.plan.epoch_size

    @property
    def workers(self) -> int:
        """Processes that load data."""
        return self._loading.num_workers

    @property
    def guarantee(self) -> str:
        """What holds for the samples, for people."""
        return f"{self.plan.samples} samples, {self.plan.portion}; {self.plan.guarantee}"

    def repeat(self, swaps: Mapping[int, int]) -> None:
        """Before ``open``: take these samples at these positions, as an earlier attempt did."""
        self._fetcher.recorded = {**swaps}

    def open(self) -> None:
        """Start loading at the cursor. Opening draws random numbers in some loaders, so it comes before they are
        restored.
        """
        self.close()
        order, world = self._fetcher.order, self.plan.world
        self._steps = self.plan.steps(self.consumed, order)
        steps = self.plan.steps(self.consumed, order)  # far ahead of the others
        ours = (piece for step in steps for piece in step[world.rank :: world.size])
        probed = self._found is not None and self._loading.num_workers > 0
        asked = [probe.Probe(probe.indices(self.plan.samples))] if probed else []
        data = Probed(self._fetcher) if probed else self._fetcher
        self._batches = Loader(data, chain(asked, ours), self._loading)
        iter(self._batches)
        self._probed, self._ahead = probed, None

    def ready(self) -> None:
        """Wait for the first micro-batch of the next step."""
        assert self._batches is not None, "open() comes first"
        if self._probed:
            assert self._found is not None
            probe.require_same_in_worker(self._fetcher, self._found, next(self._batches))
            self._probed = False
        self._ahead = self._ahead or self._next()

    def step(self) -> Iterator[tuple[float, Any]]:
        """The micro-batches of the next step, on the device, each with its share of the step's samples."""
        self.ready()
        slices = next(self._steps)
        total = sum(piece.count for piece in slices)
        ours = slices[self.plan.world.rank :: self.plan.world.size]
        digest, swaps, self._step = 0, "", None
        for number, piece in enumerate(ours, 1):
            (first, batch, found, bad, failure), self._ahead = self._ahead or self._next(), None
            if failure:
                raise DataError(f"data.train: {failure}")
            assert first == piece.first, f"the loader delivered position {first} where {piece.first} was due"
            digest += found
            swaps += self._tell(bad)
            if number == len(ours):
                self._step = slices[0].first, total, Read(digest % 2**64, swaps)
            yield piece.count / total, to_device(batch, self._device)

    @property
    def read(self) -> Read:
        """What this process read of the current step. Raises DataError if its task did not take all of it."""
        if self._step is None:
            raise DataError(
                f"the task's optimization_step left some of the {self.plan.micro_batches} micro-batches of a step; "
                "their samples would be missed. Go through all that it is given"
            )
        return self._step[2]

    def advance(self, whole: Read | None = None) -> None:
        """The step that used the current batch is done. Raises DataError if it did not take all of it."""
        read = whole or self.read
        assert self._step is not None, "step() comes first"
        first, count, _ = self._step
        self._step = first, count, read
        self.epochs_before = self.epochs
        self.substituted += read.swaps.count(">")
        self.consumed += count

    def line(self, step: int) -> Line:
        """What the ledger says of the last finished step, which has that number."""
        assert self._step is not None, "advance() comes first"
        first, count, (digest, swaps) = self._step
        return Line(step, first, first + count - 1, digest, swaps)

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
        """Go to a saved position. Raises DataError when it is a position in something else."""
        changed = self.changes(state)
        if changed:
            raise DataError(
                f"the data is not what this run began with, so 'every sample exactly once' cannot be kept:\n"
                f"  {printable(chr(10).join(changed)).replace(chr(10), chr(10) + '  ')}\n"
                "Restore it, or begin a new run with run.name=..."
            )
        self.consumed, self.epochs_before = state["consumed"], state["epochs_before"]
        self.substituted = state["substituted"]
        self.open()

    def changes(self, state: dict[str, Any]) -> list[str]:
        """In what the data of a saved position is not this data."""
        saved, now = state.get("plan", {}), self._plan_state
        changed = [
            f"{key}: {saved.get(key)} then, {now.get(key)} now"
            for key in (now | saved)
            if now.get(key) != saved.get(key)
        ]
        then = state.get("fingerprint", {})
        changed += probe.differences(then.get("samples", {}), self._fingerprint["samples"])
        if then.get("text", "") != self._fingerprint["text"]:
            changed.append(f"fingerprint: {then.get('text') or 'none'} then, {self._fingerprint['text'] or 'none'} now")
        return changed

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()

    def _next(self) -> Fetched:
        assert self._batches is not None
        asked = time.perf_counter()
        fetched: Fetched = next(self._batches)
        self.waited += time.perf_counter() - asked
        return fetched

    def _tell(self, bad: Sequence[Bad]) -> str:
        """Say which records are bad; how the ledger writes it. Raises DataError for one that nothing replaces."""
        for number, one in enumerate(bad, self.substituted):
            if one.instead is None:
                remedy = (
                    f"{SUBSTITUTES} others in its place could not be read either; look at the data set"
                    if self._fetcher.substitute
                    else "mend or remove it, or take another sample in its place with data.on_bad_record=substitute"
                )
                raise unreadable(one, self._fetcher.samples, remedy=remedy)
            if number < _TOLD:
                why = one.why.splitlines()[-1]
                log.warning("bad      %s: %s; sample %d instead", one.where, printable(why), one.instead)
        return "".join(f" {one.position}:{one.index}>{one.instead}" for one in bad)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device, asynchronously from pinned memory: in sequences, mappings and
    dataclasses, those that are attributes of any other object, and what an object's own ``to`` moves.
    """
    if device.type == "cpu" or isinstance(batch, str | bytes | range | type):
        return batch
    if callable(getattr(batch, "to", None)):
        return _by_itself(batch, device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, Sequence):
        return type(batch)(to_device(value, device) for value in batch)  # type: ignore[call-arg]
    if isinstance(batch, Mapping):
        return _like(batch, {key: to_device(value, device) for key, value in batch.items()})
    if is_dataclass(batch):
        names = [field.name for field in fields(batch)]
    else:  # others may refer to anything, so no deeper
        names = [name for name, value in getattr(batch, "__dict__", {}).items() if isinstance(value, torch.Tensor)]
    other = copy(batch) if names else batch
    for name in names:
        object.__setattr__(other, name, to_device(getattr(batch, name), device))  # also of what is frozen
    return other


def _by_itself(batch: Any, device: torch.device) -> Any:
    try:
        moved = batch.to(device, non_blocking=True)
    except TypeError:  # it has a simpler one
        moved = batch.to(device)
    return batch if moved is None else moved  # in place


def _like(batch: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """A mapping of the same kind, with whatever else it has; a dict where that cannot be made."""
    if isinstance(batch, MutableMapping) and type(batch) is not dict:
        other = copy(batch)
        other.update(moved)
        return other
    return moved

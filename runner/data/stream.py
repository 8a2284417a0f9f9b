"""Endless training batches with a cursor that moves when a step is done, and passes over evaluation data."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from runner.data.engine import Loader, Loading
from runner.data.fetch import Collate, Fetched, Fetcher, Samples
from runner.data.plan import Plan, Slice
from runner.errors import DataError


class BatchStream:
    """The training data as a part of the state: {positions consumed, plan}.

    Nothing holds a batch uncounted: ``consumed`` moves in ``advance``, after the optimizer step, however far workers
    have read ahead. The state is the same for any number of workers.
    """

    def __init__(
        self, samples: Samples, plan: Plan, *, loading: Loading, device: torch.device, collate: Collate | None = None
    ) -> None:
        self.plan = plan
        self.consumed = 0
        self.waited = 0.0  # seconds spent in waiting for batches
        self._fetcher = Fetcher(samples, plan, label="train", collate=collate)
        self._loading = loading
        self._device = device
        self._batches: Iterator[Fetched] | None = None

    @property
    def epochs(self) -> int:
        """Whole epochs consumed."""
        return self.consumed // self.plan.epoch_size

    def open(self) -> None:
        """Start loading at the cursor. Opening draws random numbers in some loaders, so it comes before they are
        restored.
        """
        self._batches = iter(Loader(self._fetcher, self.plan.slices(self.consumed), self._loading))

    def step(self) -> Iterator[Any]:
        """The micro-batches of the next step, on the device."""
        assert self._batches is not None, "open() comes first"
        expected = self.consumed
        for _ in range(self.plan.micro_batches):
            asked = time.perf_counter()
            first, batch = next(self._batches)
            self.waited += time.perf_counter() - asked
            assert first == expected, f"the loader delivered position {first} where {expected} was due"
            expected += self.plan.batch_size // self.plan.micro_batches
            yield to_device(batch, self._device)

    def advance(self) -> None:
        """The step that used the current batch is done."""
        self.consumed += self.plan.batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "plan": self.plan.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises DataError when it is a position in something else."""
        now, saved = self.plan.state(), state["plan"]
        changed = [f"{key}: {saved.get(key)} then, {now.get(key)} now" for key in now if now.get(key) != saved.get(key)]
        if changed:
            raise DataError(
                "the data is not what this run began with (" + "; ".join(changed) + "), so 'every sample exactly once' "
                "cannot be kept. Restore it, or begin a new run with run.name=..."
            )
        self.consumed = state["consumed"]
        self.open()


class EvaluationData:
    """All samples of a data set once, in order, with fixed randomness; touches neither cursor nor global generators."""

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        batch_size: int,
        randomness: str,
        loading: Loading,
        device: torch.device,
        collate: Collate | None = None,
    ) -> None:
        plan = Plan(len(samples), seed, batch_size, shuffle=False, randomness=randomness)
        self._slices = [
            Slice(first, min(batch_size, plan.samples - first)) for first in range(0, plan.samples, batch_size)
        ]
        self._loader = Loader(Fetcher(samples, plan, label="evaluation", collate=collate), self._slices, loading)
        self._device = device

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Batches on the device, each with its number of samples."""
        for piece, (_, batch) in zip(self._slices, self._loader, strict=True):
            yield piece.count, to_device(batch, self._device)


def checked(samples: Any, key: str) -> Samples:
    """``samples`` if it is a map-style data set that holds something. Raises DataError naming the configuration key."""
    if isinstance(samples, IterableDataset) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        raise DataError(
            f"{key} is a {type(samples).__qualname__} without __len__ and __getitem__; a data set needs both, "
            "so that a position alone says which sample comes next"
        )
    if len(samples) == 0:
        raise DataError(f"{key} is empty: a {type(samples).__qualname__} of length 0")
    found: Samples = samples
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch of tuples, lists, dicts and tensors on the device; asynchronously from pinned memory."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return type(batch)(to_device(value, device) for value in batch)  # type: ignore[call-arg]
    return batch

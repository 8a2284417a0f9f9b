"""Passes over evaluation data, which change neither the training position nor the global generators."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from runner.data import probe
from runner.data.fetch import Collate, Fetcher, Samples, bad_record_error
from runner.data.iterable import stateful
from runner.data.loader import Loader, LoaderOptions
from runner.data.plan import Plan, Slice
from runner.data.stream import to_device
from runner.distributed.world import World
from runner.errors import DataError

log = logging.getLogger("runner")


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
    ) -> None:
        world = world or World()
        plan = Plan(len(samples), seed, batch_size, shuffle=False, randomness=randomness)
        every = [Slice(first, min(batch_size, plan.samples - first)) for first in range(0, plan.samples, batch_size)]
        slices = every[world.rank :: world.size]
        self._weights = [piece.count for piece in slices]
        if len(slices) < -(-len(every) // world.size):
            slices.append(every[0])
            self._weights.append(0)
        self._samples = samples
        self.device = device
        self.batch_listeners: Sequence[Callable[[int], None]] = ()  # called with a batch's number, from 0, before it
        fetcher = Fetcher(samples, plan, label="evaluation", collate=collate)
        sketch, _ = probe.examine(fetcher, loading, audit=audit, key="data.validation")
        self._loader = Loader(fetcher, slices, loading, key="data.validation")
        self.fingerprint: dict[str, Any] = {"length": plan.samples, "samples": sketch}

    def changes(self, then: dict[str, Any]) -> list[str]:
        """Messages on how the data of the fingerprint ``then`` differs from this data."""
        before, now = then["length"], self.fingerprint["length"]
        messages = [] if before == now else [f"{before} samples then, {now} now"]
        return messages + probe.differences(then["samples"], self.fingerprint["samples"])

    def close(self) -> None:
        """End the workers, within some seconds."""
        self._loader.close()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(number of samples, batch on the device); the number is 0 for a batch that only fills up the last round."""
        for number, (weight, fetched) in enumerate(zip(self._weights, self._loader, strict=True)):
            if fetched.bad:
                remedy = "mend it or take it out of data.validation: every figure is a mean over all of its samples"
                raise bad_record_error(fetched.bad[0], self._samples, remedy=remedy)
            if fetched.failure:
                raise DataError(f"data.validation: {fetched.failure}")
            for listener in self.batch_listeners:
                listener(number)
            yield weight, to_device(fetched.batch, self.device)


def require_map_style(samples: Any, key: str) -> Samples:
    """``samples``, if it is a map-style data set with at least one sample. Raises DataError naming the key."""
    if isinstance(samples, IterableDataset) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        raise DataError(
            f"{key} is a {type(samples).__qualname__} without __len__ and __getitem__; a data set needs both, "
            "so that a position alone says which sample comes next"
        )
    if len(samples) == 0:
        raise DataError(f"{key} is empty: a {type(samples).__qualname__} of length 0")
    if stateful(samples):
        log.warning(
            "ignored  state_dict of %s (a %s): the position alone says which sample comes next, and no state of a data "
            "set with __getitem__ is saved or restored",
            key,
            type(samples).__qualname__,
        )
    map_style: Samples = samples
    return map_style

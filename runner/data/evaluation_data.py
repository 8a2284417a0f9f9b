"""Passes over evaluation data, which change neither data position nor global generators."""

import logging
from collections.abc import Iterator
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

    Batches are dealt to the processes in turn. If there is none left for a process in the last round, it gets a batch
    with weight zero, so that all processes have equally many.
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
        whole = [Slice(first, min(batch_size, plan.samples - first)) for first in range(0, plan.samples, batch_size)]
        self._weights = [piece.count for piece in whole[world.rank :: world.size]]
        self._slices = whole[world.rank :: world.size]
        if len(self._slices) < -(-len(whole) // world.size):
            self._slices, self._weights = [*self._slices, whole[0]], [*self._weights, 0]
        self._samples = samples
        fetcher = Fetcher(samples, plan, label="evaluation", collate=collate)
        described, _ = probe.examine(fetcher, loading, audit=audit, key="data.validation")
        self._loader = Loader(fetcher, self._slices, loading, key="data.validation")
        self.fingerprint: dict[str, Any] = {"length": plan.samples, "samples": described}
        self.device = device

    def changes(self, then: dict[str, Any]) -> list[str]:
        """In what the data of that fingerprint is not this data, in words."""
        was, now = then["length"], self.fingerprint["length"]
        found = [] if was == now else [f"{was} samples then, {now} now"]
        return found + probe.differences(then["samples"], self.fingerprint["samples"])

    def close(self) -> None:
        """End the workers, within some seconds."""
        self._loader.close()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Batches on the device, each with its number of samples (0: padding)."""
        for weight, fetched in zip(self._weights, self._loader, strict=True):
            for bad in fetched.bad:
                remedy = "mend it or take it out of data.validation: every figure is a mean over all of its samples"
                raise bad_record_error(bad, self._samples, remedy=remedy)
            if fetched.failure:
                raise DataError(f"data.validation: {fetched.failure}")
            yield weight, to_device(fetched.batch, self.device)


def require_map_style(samples: Any, key: str) -> Samples:
    """``samples`` if it is a map-style data set that holds something. Raises DataError naming the configuration key."""
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
    found: Samples = samples
    return found

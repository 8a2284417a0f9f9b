"""The only user of torchdata's StatefulDataLoader, which moves batches from workers; its state is not used here.

The state is the stream's position, so a plain ``torch.utils.data.DataLoader`` yields the same bytes (tested).
"""

import atexit
import faulthandler
import pickle
import signal
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from runner import signals
from runner.data.fetch import Fetched, Fetcher
from runner.data.plan import Slice
from runner.data.probe import Probe, digests
from runner.errors import DataError


@dataclass(frozen=True, slots=True)
class Loading:
    """How batches are loaded; free to change between attempts.

    ``num_workers`` processes (0: in this one), each with ``prefetch`` batches in flight, started by ``start_method``.
    """

    num_workers: int = 0
    prefetch: int = 2
    start_method: str | None = None
    pin_memory: bool = False


class Loader:
    """Iterates over the batches of the given slices, in order. Workers live as long as the loader.

    With ``probe`` the first item is a worker's answer to it: the digests of some samples.
    """

    def __init__(
        self, fetcher: Fetcher, slices: Iterable[Slice], loading: Loading, *, probe: Probe | None = None
    ) -> None:
        workers = loading.num_workers > 0
        self._start_method = loading.start_method if workers else None
        with without_noise():
            self._loader: StatefulDataLoader[Any] = StatefulDataLoader(
                fetcher if probe is None else _Probed(fetcher),
                batch_size=None,
                sampler=slices if probe is None else chain([probe], slices),
                collate_fn=_as_is,
                num_workers=loading.num_workers,
                prefetch_factor=loading.prefetch if workers else None,
                persistent_workers=workers,
                multiprocessing_context=loading.start_method if workers else None,
                worker_init_fn=start_worker,
                pin_memory=loading.pin_memory,
                generator=torch.Generator().manual_seed(0),  # else opening it would draw from the global one
                snapshot_every_n_steps=0,
            )

    def __iter__(self) -> Iterator[Any]:
        with without_noise(), sendable(self._start_method):
            iterator: Iterator[Any] = iter(self._loader)
        if self._loader.num_workers:
            watch(iterator)
        return iterator


class _Probed(Dataset[Any]):
    """A fetcher that also answers a probe."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher

    def __getitem__(self, asked: Slice | Probe) -> Fetched | list[str]:
        if isinstance(asked, Probe):
            return digests(self._fetcher, asked.indices)
        return self._fetcher[asked]


@contextmanager
def sendable(start_method: str | None) -> Iterator[None]:
    """Within the block, an error in pickling a data set for new processes becomes a DataError with a remedy."""
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if not any(word in str(error).lower() for word in ("pickle", "local object")):  # the latter from Python 3.12 on
            raise
        method = start_method or torch.multiprocessing.get_start_method()
        raise DataError(
            f"the data set or its collate function cannot be sent to data workers, which runtime.start_method={method} "
            f"requires: {error}. Define functions and classes at the top of a module (no lambda), open files when they "
            "are first read, or use runtime.start_method=fork or runtime.num_workers=0."
        ) from error


@contextmanager
def without_noise() -> Iterator[None]:
    """Within the block, suppress warnings that a user cannot avoid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")  # three times over
        yield


def start_worker(number: int) -> None:
    """The first action of a data worker."""
    signals.ignore()  # the training process decides when to stop
    with suppress(Exception):  # stderr may be anything
        faulthandler.register(signal.SIGQUIT)  # by which the watchdog of a run that stands still asks where it is


def watch(iterator: Any) -> None:
    """End the workers of this iterator when the process ends."""
    _running.add(iterator)


def _as_is(fetched: Any) -> Any:
    return fetched


_running: "weakref.WeakSet[Any]" = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """End workers of loaders that are still alive at exit, as after an error. They ignore SIGTERM, so multiprocessing
    would wait for them for ever.
    """
    for iterator in [*_running]:
        iterator._shutdown_workers()

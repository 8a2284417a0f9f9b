"""The door to the loader that moves batches from workers: torchdata's StatefulDataLoader, whose state is not used here.

The stream's own state is a position, so a plain ``torch.utils.data.DataLoader`` yields the same bytes (a test says so).
"""

import atexit
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from runner import signals
from runner.data.fetch import Fetched, Fetcher
from runner.data.plan import Slice


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
    """Iterates over the slices it is given, in their order; workers live as long as the loader."""

    def __init__(self, fetcher: Fetcher, slices: Iterable[Slice], loading: Loading) -> None:
        workers = loading.num_workers > 0
        with _without_noise():
            self._loader: StatefulDataLoader[Fetched] = StatefulDataLoader(
                fetcher,
                batch_size=None,
                sampler=slices,
                collate_fn=_as_is,
                num_workers=loading.num_workers,
                prefetch_factor=loading.prefetch if workers else None,
                persistent_workers=workers,
                multiprocessing_context=loading.start_method if workers else None,
                worker_init_fn=_start_worker,
                pin_memory=loading.pin_memory,
                generator=torch.Generator().manual_seed(0),  # else opening it would draw from the global one
                snapshot_every_n_steps=0,
            )

    def __iter__(self) -> Iterator[Fetched]:
        with _without_noise():
            iterator: Iterator[Fetched] = iter(self._loader)
        if self._loader.num_workers:
            _running.add(iterator)
        return iterator


@contextmanager
def _without_noise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")  # three times over
        yield


def _as_is(fetched: Fetched) -> Fetched:
    return fetched


def _start_worker(number: int) -> None:
    signals.ignore()  # the training process decides when to stop


_running: "weakref.WeakSet[Any]" = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """After an error the interpreter may end with loaders still alive. Their workers ignore SIGTERM, by which
    multiprocessing would then end them and wait for ever.
    """
    for iterator in [*_running]:
        iterator._shutdown_workers()

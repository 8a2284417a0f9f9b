"""The only user of torchdata's StatefulDataLoader, which moves batches from workers; its state is not used here.

The state is the stream's position, so a plain ``torch.utils.data.DataLoader`` yields the same bytes (tested).
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful_dataloader import _StatefulMultiProcessingDataLoaderIter

from runner import signals
from runner.data.fetch import Fetched, Fetcher
from runner.data.plan import Slice
from runner.data.probe import Probe, digests
from runner.data.workers import Unsent, Workers, explained, start_worker
from runner.errors import DataError, RunnerError

_DEATH_SECONDS = 5.0  # from the last sign of a worker to its exit status


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """How batches are loaded; free to change between attempts.

    ``num_workers`` processes (0: in this one), each with ``prefetch`` batches in flight, started by ``start_method``.
    """

    num_workers: int = 0
    prefetch: int = 2
    start_method: str | None = None
    pin_memory: bool = False


class Loader:
    """Iterates over the batches of ``data``, pass after pass; ``key`` names it in messages. Its workers live until
    ``close``.

    With a ``sampler`` the data is map-style, and each batch is ``data[item]`` of one of its items. With ``states``,
    ``state_dict`` tells where an iterable is.
    """

    def __init__(
        self,
        data: Dataset[Any],
        sampler: Iterable[Any] | None,
        loading: LoaderOptions,
        *,
        key: str = "data.train",
        states: bool = False,
    ) -> None:
        self._key = key
        self._workers = Workers(loading.start_method) if loading.num_workers else None
        self._batches: Any = None
        with without_noise():
            self._loader = _StatefulLoader(
                data,
                batch_size=None,  # they come as batches
                sampler=sampler,
                collate_fn=_as_is,
                num_workers=loading.num_workers,
                prefetch_factor=loading.prefetch if self._workers else None,
                persistent_workers=self._workers is not None,
                multiprocessing_context=self._workers,
                worker_init_fn=start_worker,
                pin_memory=loading.pin_memory,
                generator=torch.Generator().manual_seed(0),  # else opening it would draw from the global one
                snapshot_every_n_steps=int(states),
            )
        if self._workers:
            weakref.finalize(self, self._workers.close)

    def __iter__(self) -> "Loader":
        """Begin a pass. Raises DataError if workers cannot start."""
        begun = self._batches is not None
        try:
            with without_noise():
                self._batches = iter(self._loader)
            if self._workers and not begun:
                self._workers.watch(self._batches.end)
            return self
        except Exception as error:
            why = self._why(error, starting=not begun)
        raise self._failure(why)

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except Exception as error:
            why = self._why(error)
        else:
            if not isinstance(batch, Unsent):
                return batch
            why = batch.why
        raise self._failure(why)

    def state_dict(self) -> Any:
        """Where the pass is, after the last batch."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Where the first pass is to begin."""
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """End the workers, within some seconds."""
        if self._workers:
            self._workers.close()

    def _why(self, error: Exception, *, starting: bool = False) -> str:
        """What went wrong in a worker or on the way from it. Raises the runner's errors, and any without workers."""
        if self._workers is None or isinstance(error, RunnerError):
            raise error
        cut = isinstance(error, ConnectionError | FileNotFoundError | EOFError)  # of the pipe to a worker that ends
        death = self._workers.death(_DEATH_SECONDS if cut else 0.0)
        return death or (self._workers.unstarted(error) if starting else explained(error))

    def _failure(self, why: str) -> BaseException:
        """End the workers, and return the error to raise; without a cause, whose frames would keep open what there is
        too little of.
        """
        self.close()
        if stopped := signals.received():  # a signal to the whole group of processes may end workers, too
            return signals.Stopped(stopped)
        return DataError(f"{self._key}: {why}")


class _StatefulLoader(StatefulDataLoader[Any]):  # type: ignore[misc]
    """Its iterators over workers are ours."""

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        state: Any = self.next_iter_state  # type: ignore[has-type]
        self.next_iter_state = None
        return _Iterator(self, state)


class _Iterator(_StatefulMultiProcessingDataLoaderIter):  # type: ignore[misc]
    """Whose wait for a worker is broken off by signals, and which leaves the end of workers to ``Workers``."""

    def __init__(self, loader: _StatefulLoader, state: Any) -> None:
        self._held: Any = loader.multiprocessing_context
        super().__init__(loader, state)

    def end(self) -> None:
        """Ask all workers to end. May wait for ever, if one of them was killed."""
        super()._shutdown_workers()

    def _get_data(self) -> Any:
        with signals.reading(self._raise_if_dead):
            return super()._get_data()

    def _raise_if_dead(self) -> None:
        if (why := self._held.death()) and not signals.received():
            raise RuntimeError(why)

    def _shutdown_workers(self) -> None:
        # Called wherever this object is collected, which is no place to wait for anything.
        if getattr(self, "_worker_pids_set", False):
            signal_handling._remove_worker_pids(id(self))  # type: ignore[attr-defined]
            self._worker_pids_set = False


class Probed(Dataset[Any]):
    """A fetcher that also answers a probe."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher

    def __getitem__(self, asked: Slice | Probe) -> Fetched | list[str]:
        if isinstance(asked, Probe):
            return digests(self._fetcher, asked.indices)
        return self._fetcher[asked]


@contextmanager
def without_noise() -> Iterator[None]:
    """Within the block, suppress warnings that a user cannot avoid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")  # three times over
        yield


def _as_is(fetched: Any) -> Any:
    return fetched

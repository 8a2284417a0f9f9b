"""Moves batches from workers to the training process: the only user of torchdata's StatefulDataLoader.

A map-style stream does not use its state, so a plain ``torch.utils.data.DataLoader`` yields the same bytes (tested).
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
from runner.data.workers import UnsentBatch, WorkerContext, start_worker, with_remedy
from runner.errors import DataError, RunnerError

_EXIT_SECONDS = 5.0  # from the last sign of a worker to its exit status


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """How batches are loaded; may change between attempts.

    ``num_workers`` processes (0: in this process), each with ``prefetch`` batches in flight, started by
    ``start_method``.
    """

    num_workers: int = 0
    prefetch: int = 2
    start_method: str | None = None
    pin_memory: bool = False


class Loader:
    """Iterates over the batches of ``data``, pass after pass; ``key`` names the data in messages. Its workers live
    until ``close``.

    With a ``sampler`` the data is map-style, and a batch is ``data[item]`` for each item of the sampler. With
    ``states`` the data is an iterable with a state, and ``state_dict`` is its state after the last batch.
    """

    def __init__(
        self,
        data: Dataset[Any],
        sampler: Iterable[Any] | None,
        options: LoaderOptions,
        *,
        key: str = "data.train",
        states: bool = False,
    ) -> None:
        self._key = key
        self._context = WorkerContext(options.start_method) if options.num_workers else None
        self._batches: Any = None
        with without_noise():
            self._loader = _StatefulLoader(
                data,
                batch_size=None,  # the data set yields batches
                sampler=sampler,
                collate_fn=_identity,
                num_workers=options.num_workers,
                prefetch_factor=options.prefetch if self._context else None,
                persistent_workers=self._context is not None,
                multiprocessing_context=self._context,
                worker_init_fn=start_worker,
                pin_memory=options.pin_memory,
                generator=torch.Generator().manual_seed(0),  # else opening it would draw from the global one
                snapshot_every_n_steps=int(states),
            )
        if self._context:
            weakref.finalize(self, self._context.close)

    def __iter__(self) -> "Loader":
        """Begin a pass. Raises DataError if workers cannot start."""
        starting = self._batches is None
        try:
            with without_noise():
                self._batches = iter(self._loader)
            if self._context and starting:
                self._context.watch(self._batches.request_end)
            return self
        except Exception as error:
            reason = self._reason(error, starting=starting)
        raise self._failure(reason)

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except Exception as error:
            reason = self._reason(error)
        else:
            if not isinstance(batch, UnsentBatch):
                return batch
            reason = batch.reason
        raise self._failure(reason)

    def state_dict(self) -> Any:
        """The position in the pass, after the last batch."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """The position where the first pass begins."""
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """End the workers, within some seconds."""
        if self._context:
            self._context.close()

    def _reason(self, error: Exception, *, starting: bool = False) -> str:
        """The cause of an error in a worker or on the way from it. Raises the runner's own errors, and any error
        without workers.
        """
        if self._context is None or isinstance(error, RunnerError):
            raise error
        pipe_closed = isinstance(error, ConnectionError | FileNotFoundError | EOFError)  # its worker is about to end
        death = self._context.death(_EXIT_SECONDS if pipe_closed else 0.0)
        return death or (self._context.start_failure(error) if starting else with_remedy(error))

    def _failure(self, reason: str) -> BaseException:
        """End the workers, and return the error to raise. It has no cause, because the frames of a cause would keep
        the files and memory open that have run out.
        """
        self.close()
        if stopped := signals.received():  # a signal to the whole process group may end workers, too
            return signals.Stopped(stopped)
        return DataError(f"{self._key}: {reason}")


class _StatefulLoader(StatefulDataLoader[Any]):  # type: ignore[misc]
    """torchdata's loader with ``_Iterator`` over workers."""

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        state: Any = self.next_iter_state  # type: ignore[has-type]
        self.next_iter_state = None
        return _Iterator(self, state)


class _Iterator(_StatefulMultiProcessingDataLoaderIter):  # type: ignore[misc]
    """An iterator whose wait for a worker is interrupted by signals, and which leaves the end of the workers to
    ``WorkerContext``.
    """

    def __init__(self, loader: _StatefulLoader, state: Any) -> None:
        self._context: Any = loader.multiprocessing_context
        super().__init__(loader, state)

    def request_end(self) -> None:
        """Ask all workers to end. May wait for ever, if a worker was killed."""
        super()._shutdown_workers()

    def _get_data(self) -> Any:
        with signals.reading(self._raise_if_dead):
            return super()._get_data()

    def _raise_if_dead(self) -> None:
        if (reason := self._context.death()) and not signals.received():
            raise RuntimeError(reason)

    def _shutdown_workers(self) -> None:
        # Called wherever this object is collected, where nothing may wait.
        if getattr(self, "_worker_pids_set", False):
            signal_handling._remove_worker_pids(id(self))  # type: ignore[attr-defined]
            self._worker_pids_set = False


@contextmanager
def without_noise() -> Iterator[None]:
    """Within the block, suppress warnings that a user cannot avoid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")  # repeated three times
        yield


def _identity(batch: Any) -> Any:
    return batch

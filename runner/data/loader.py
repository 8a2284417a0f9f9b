"""Moves batches from data workers to the training process, and ends the workers. The only user of torchdata.

A map-style stream does not use the state of torchdata's loader, so a plain ``torch.utils.data.DataLoader`` yields the
same bytes (tested). multiprocessing drops what a worker cannot send, and the training process would wait forever.
torch leaves the end of workers to garbage collection and to the interpreter's exit, which may wait forever, too. Here
a context holds all processes and queues from their start, and ends them within some seconds whatever they do.
"""

import atexit
import errno
import multiprocessing
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.pin_memory import pin_memory
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful_dataloader import _StatefulMultiProcessingDataLoaderIter
from tqdm import tqdm

from runner import signals
from runner.data.limits import Limits
from runner.distributed.watchdog import write_stacks_on_request
from runner.errors import DataError, RunnerError

_END_SECONDS = 5.0  # time for workers to finish their current batch
_POLL_SECONDS = 1.0
_EXIT_SECONDS = 5.0  # time between the end of a worker's pipe and its exit status

# torch's handler of SIGCHLD raises wherever the training process happens to be. A dead worker is noticed in time where
# its batch is awaited.
signal_handling._SIGCHLD_handler_set = True


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """How batches are loaded, which may change between attempts. Each worker has ``prefetch`` batches in flight; with 0
    workers this process loads. A longer wait for a worker than ``timeout`` seconds is an error; 0: never. With
    ``limits`` the number of workers changes while they load.
    """

    num_workers: int = 0
    prefetch: int = 2
    start_method: str | None = None
    pin_memory: bool = False
    timeout: float = 0.0
    limits: Limits | None = None


class Loader:
    """Iterates over the batches of ``data``, pass after pass; ``key`` names the data in messages. Its workers live
    until ``close``.

    With a ``sampler`` the data is map-style, and a batch is ``data[item]`` for each item of the sampler. With
    ``states`` the data is an iterable with a state, and ``state_dict`` is its state after the last batch.
    """

    def __init__(
        self, data: Any, sampler: Any, options: LoaderOptions, *, key: str = "data.train", states: bool = False
    ) -> None:
        self._key = key
        self._context = WorkerContext(options.start_method) if options.num_workers else None
        self._batches: Any = None
        if self._context is None and sampler is not None:  # torch's loader takes 10 us for a batch
            pinned = options.pin_memory and torch.accelerator.is_available()
            self._loader: Any = _InThisProcess(data, sampler, pinned=pinned)
            return
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
                timeout=options.timeout if self._context else 0,
                generator=torch.Generator().manual_seed(0),  # else opening would draw from the global generator
                snapshot_every_n_steps=int(states),
            )
        if self._context:
            weakref.finalize(self, self._context.close)

    def __iter__(self) -> "Loader":
        """Begin a pass. Raises DataError if workers cannot start."""
        starting = self._batches is None

        def begin() -> None:
            with without_noise():
                self._batches = iter(self._loader)
            if self._context and starting:
                self._context.watch(self._batches.request_end)

        self._result(begin, starting=starting)
        return self

    def __next__(self) -> Any:
        return next(self._batches) if self._context is None else self._result(lambda: next(self._batches))

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

    def _result(self, function: Callable[[], Any], *, starting: bool = False) -> Any:
        """The result of ``function``. An error of a worker ends the workers and becomes a DataError, without a cause,
        whose frames would keep files and sockets open.
        """
        try:
            result = function()
            if not isinstance(result, UnsentBatch):
                return result
            reason = result.reason
        except (StopIteration, RunnerError):
            raise
        except Exception as error:
            if self._context is None:
                raise
            ending = isinstance(error, ConnectionError | FileNotFoundError | EOFError)  # its worker has closed the pipe
            death = self._context.death(_EXIT_SECONDS if ending else 0.0)
            reason = death or (self._context.start_failure(error) if starting else with_remedy(error))
        self.close()
        if stopped := signals.received():  # a signal to the whole process group may end workers, too
            raise signals.Stopped(stopped)
        raise DataError(f"{self._key}: {reason}")


@dataclass(frozen=True, slots=True)
class _InThisProcess:
    """Loads map-style data without workers."""

    data: Any
    sampler: Any
    pinned: bool

    def __iter__(self) -> Iterator[Any]:
        batches = map(self.data.__getitem__, self.sampler)
        return map(pin_memory, batches) if self.pinned else batches


class _StatefulLoader(StatefulDataLoader[Any]):  # type: ignore[misc]
    """torchdata's loader with ``_Iterator`` over workers."""

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        state: Any = self.next_iter_state  # type: ignore[has-type]
        self.next_iter_state = None
        return _Iterator(self, state)


class _Iterator(_StatefulMultiProcessingDataLoaderIter):  # type: ignore[misc]
    """Signals interrupt its wait for a worker, and ``WorkerContext`` ends its workers."""

    def __init__(self, loader: _StatefulLoader, state: Any) -> None:
        self._context: Any = loader.multiprocessing_context
        super().__init__(loader, state)

    def request_end(self) -> None:
        """Ask all workers to end. May wait forever, if a worker was killed."""
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
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")  # comes three times
        yield


def _identity(batch: Any) -> Any:
    return batch


class UnsentBatch(NamedTuple):
    """In place of a batch that a worker could not send."""

    reason: str  # the error and its remedy


class WorkerContext(BaseContext):
    """A multiprocessing context for one loader, which holds the processes and queues that it starts."""

    def __init__(self, start_method: str | None) -> None:
        self._base: Any = multiprocessing.get_context(start_method)
        # The fork server imports torch once, instead of each worker: 20 ms for a worker instead of some seconds.
        self._base.set_forkserver_preload(["__main__", __name__, "runner.data.fetch"])
        self.Event: Any = self._base.Event
        self._processes: list[Any] = []
        self._queues: list[_Queue] = []
        self._closed = threading.Event()
        self._request_end: Callable[[], Any] | None = None

    def get_start_method(self, allow_none: bool = False) -> str:
        return str(self._base.get_start_method(allow_none))

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        self._processes.append(self._base.Process(*args, **kwargs))
        return self._processes[-1]

    def Queue(self, maxsize: int = 0) -> "Queue[Any]":  # noqa: N802
        self._queues.append(_Queue(maxsize, ctx=self._base))
        return self._queues[-1]

    def watch(self, request_end: Callable[[], Any]) -> None:
        """Called when all workers have started; ``request_end`` asks them to end. A thread then wakes the training
        process when a worker dies, because it may be reading half a batch.
        """
        self._request_end = request_end
        _open_contexts.add(self)
        threading.Thread(target=self._watch, name="workers", daemon=True).start()

    def death(self, seconds: float = 0.0) -> str | None:
        """How a worker died, with the remedy; None if all are alive for ``seconds``."""
        closed = wait([process.sentinel for process in self._started], seconds)
        # The system closes the sentinel of a process a moment before the process has a status.
        _await_exit([process for process in self._started if process.sentinel in closed])
        for number, process in enumerate(self._started):
            if not process.is_alive():
                return f"data worker {number} (pid {process.pid}) {_exit_message(process.exitcode)}"
        return None

    def start_failure(self, error: BaseException) -> str:
        """The message for an error in starting workers."""
        if remedy_for(error) != _PICKLED:
            return f"data workers cannot start: {with_remedy(error)}"
        return (
            f"the data set or its collate function cannot be sent to data workers, as runtime.start_method="
            f"{self.get_start_method()} requires: {error}. Define functions and classes at the top of a module (no "
            "lambda), open files at the first read, or use runtime.start_method=fork or runtime.num_workers=0."
        )

    def close(self) -> None:
        """Ask all processes to end, and kill those that are alive after some seconds."""
        self._closed.set()
        _open_contexts.discard(self)
        alive = [process for process in self._started if process.is_alive()]
        if self._request_end is not None and len(alive) == len(self._started):  # a dead worker may have left a lock
            threading.Thread(target=self._request_end, daemon=True).start()
            _await_exit(alive)
        for process in alive:
            if process.is_alive():
                process.kill()
        _await_exit(alive)
        for queue in self._queues:
            queue.cancel_join_thread()
            queue.close()
        self._queues, self._processes, self._request_end = [], [], None

    @property
    def _started(self) -> list[Any]:
        return [process for process in self._processes if process.pid is not None]

    def _watch(self) -> None:
        sentinels = [process.sentinel for process in self._started]
        while not self._closed.is_set():
            # With forkserver, a signal to the whole process group may end the server shortly before it reaches this
            # process; its children then look dead. So wait before believing that a worker has died.
            if wait(sentinels, _POLL_SECONDS) and not self._closed.wait(_POLL_SECONDS):
                signals.wake()


class _Queue(Queue):  # type: ignore[type-arg]
    """A queue whose feeder thread sends a reason in place of what it cannot send."""

    def _on_queue_feeder_error(self, error: Exception, message: Any) -> None:
        if get_worker_info() is None:
            Queue._on_queue_feeder_error(error, message)  # type: ignore[attr-defined]
        else:
            self.put(_replacement(error, message))


def start_worker(number: int) -> None:
    """The first action of a data worker."""
    signals.ignore()  # the training process decides when to stop
    write_stacks_on_request()  # for the watchdog of a stalled run
    tqdm.set_lock(threading.RLock())  # a killed process would leave the lock that all processes share locked
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def remedy_for(error: BaseException) -> str:
    """What helps where memory, files, processes or pickling are the cause of an error; empty for other causes."""
    text, number = str(error).lower(), getattr(error, "errno", None)
    for fragments, numbers, remedy in _REMEDIES:
        if number in numbers or any(fragment in text for fragment in fragments):
            return remedy
    return _MEMORY if isinstance(error, MemoryError) else ""


def with_remedy(error: BaseException) -> str:
    """An error and its remedy."""
    return f"{type(error).__name__}: {error}. {remedy_for(error)}".rstrip()


def _replacement(error: Exception, message: Any) -> Any:
    """The message to the loader in place of one that cannot be sent. Ends the process if there is none."""
    reason = f"a data worker cannot send what it has read: {with_remedy(error)}"
    if isinstance(message, tuple) and len(message) == 2:
        request, answer = message
        if hasattr(answer, "initial_state"):  # the answer to the start, or to a new pass
            failure = ExceptionWrapper((DataError, DataError(reason), None))  # type: ignore[no-untyped-call]
            return request, replace(answer, initial_state=failure)
        if isinstance(answer, tuple) and len(answer) == 3 and not isinstance(answer[0], UnsentBatch):
            return request, (UnsentBatch(reason), answer[1], None)
    print(reason, flush=True)
    os._exit(1)


def _end_with_parent() -> None:
    """End this process when the training process is gone, even in the middle of a sample. Neither its id nor the
    sentinel is enough: with forkserver the parent is the server, and forked siblings keep the sentinel open.
    """
    training = multiprocessing.parent_process()
    assert training is not None
    parents = {training.pid, os.getppid()}
    while os.getppid() in parents and training.is_alive():
        wait([training.sentinel], _POLL_SECONDS)
    os._exit(1)


def _exit_message(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}; its output is above. If no process or thread could be started: {_THREADS}"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return f"was ended by {name}, as the system does where memory runs out. {_MEMORY}"
    if name == "SIGBUS":
        return f"was ended by {name}: too little shared memory. {_SHARED}"
    return f"was ended by {name}; runtime.num_workers=0 and python -X faulthandler may show where"


def _await_exit(processes: list[Any]) -> None:
    """Wait some seconds until all have ended. Not by their sentinels, which their own children may hold open."""
    until = time.monotonic() + _END_SECONDS
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        time.sleep(0.01)


_FEWER = "a smaller runtime.prefetch, fewer runtime.num_workers or 0 help as well"
_SHARED = f"Give it more shared memory (docker run --shm-size=8g; /dev/shm holds the batches in flight); {_FEWER}."
_MEMORY = f"Give it more memory; {_FEWER}."
_FILES = f"Every tensor of a batch in flight is an open file: raise the limit with ulimit -n 65536; {_FEWER}."
_THREADS = "Raise the limit of processes and threads (ulimit -u, pids of a container), or set runtime.num_workers=0."
_FORKED = (
    "Its workers may wait for a thread or a lock, say of a pool of threads in a module: make it at the first read of "
    "each process, or set runtime.start_method=forkserver or runtime.num_workers=0."
)
_PICKLED = (
    "A batch from a data worker is pickled: let the data set and data.collate give tensors, arrays and plain values, "
    "of classes at the top of a module, no functions, generators or open files, or set runtime.num_workers=0."
)
_REMEDIES: tuple[tuple[tuple[str, ...], tuple[int, ...], str], ...] = (
    (("too many open files", "ancillary data"), (errno.EMFILE, errno.ENFILE), _FILES),
    (("cannot allocate memory", "can't allocate memory"), (errno.ENOMEM,), _MEMORY),
    (("shared memory", "(shm)"), (errno.ENOSPC,), _SHARED),
    (("can't start new thread", "resource temporarily unavailable"), (errno.EAGAIN,), _THREADS),
    (("requires_grad",), (), "Call detach() on tensors of a batch, or set runtime.num_workers=0."),
    (("af_unix path too long",), (), "Set TMPDIR to a folder with a path of at most 70 characters."),
    (("timed out after",), (), _FORKED),
    (("pickl", "local object"), (), _PICKLED),  # "local object" from Python 3.12 on
)
_open_contexts: set[WorkerContext] = set()


@atexit.register
def _close_all() -> None:
    """Close open loaders. At exit multiprocessing would wait forever for workers, which do not obey its SIGTERM."""
    for context in [*_open_contexts]:
        context.close()

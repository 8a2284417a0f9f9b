"""The processes that load data: their start, their end, and the batches that they cannot send.

multiprocessing drops what a worker cannot send, and the training process would wait for ever. torch leaves the end of
workers to garbage collection and to the interpreter's exit, which may wait for ever, too. Here a context holds all
processes and queues from their start, and ends them within some seconds whatever they do.
"""

import atexit
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info
from torch.utils.data._utils import signal_handling
from tqdm import tqdm

from runner import signals
from runner.distributed.watchdog import write_stacks_on_request
from runner.errors import DataError

_END_SECONDS = 5.0  # for workers to finish their current batch
_POLL_SECONDS = 1.0

# torch raises from a handler of SIGCHLD wherever the training process happens to be. A dead worker is noticed in time
# where its batch is awaited.
signal_handling._SIGCHLD_handler_set = True


class UnsentBatch(NamedTuple):
    """In place of a batch that a worker could not send: the reason and the remedy."""

    reason: str


class WorkerContext(BaseContext):
    """A multiprocessing context for one loader, which holds the processes and queues that it starts."""

    def __init__(self, start_method: str | None) -> None:
        self._base: Any = multiprocessing.get_context(start_method)
        self.Event: Any = self._base.Event
        self._processes: list[Any] = []
        self._queues: list[_Queue] = []
        self._closed = threading.Event()
        self._request_end: Callable[[], Any] | None = None

    def get_start_method(self, allow_none: bool = False) -> str:
        """See ``BaseContext``."""
        return str(self._base.get_start_method(allow_none))

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        """See ``BaseContext``."""
        self._processes.append(self._base.Process(*args, **kwargs))
        return self._processes[-1]

    def Queue(self, maxsize: int = 0) -> "Queue[Any]":  # noqa: N802
        """See ``BaseContext``."""
        self._queues.append(_Queue(maxsize, ctx=self._base))
        return self._queues[-1]

    def watch(self, request_end: Callable[[], Any]) -> None:
        """All workers have started, and ``request_end`` asks them to end. From now on a thread wakes the training
        process when a worker dies, because it may be reading a batch that was sent in half.
        """
        self._request_end = request_end
        _open_contexts.add(self)
        threading.Thread(target=self._watch, name="workers", daemon=True).start()

    def death(self, seconds: float = 0.0) -> str | None:
        """How a worker died, with the remedy; None if all are alive for ``seconds``."""
        wait([process.sentinel for process in self._started], seconds)
        for number, process in enumerate(self._started):
            if not process.is_alive():
                return f"data worker {number} (pid {process.pid}) {_exit_message(process.exitcode)}"
        return None

    def start_failure(self, error: BaseException) -> str:
        """The message for an error in starting workers."""
        if remedy_for(error) != _PICKLED:
            return f"data workers cannot start: {with_remedy(error)}"
        return (
            "the data set or its collate function cannot be sent to data workers, which "
            f"runtime.start_method={self.get_start_method()} requires: {error}. Define functions and classes at the "
            "top of a module (no lambda), open files when they are first read, or use runtime.start_method=fork or "
            "runtime.num_workers=0."
        )

    def close(self) -> None:
        """Ask all processes to end, and kill those that are alive after some seconds."""
        self._closed.set()
        _open_contexts.discard(self)
        alive = [process for process in self._started if process.is_alive()]
        if self._request_end is not None and len(alive) == len(self._started):  # a dead one may have left locks behind
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
            # A signal to the whole process group may end the server of forkserver, and with it the view of its
            # children, shortly before it reaches this process: so some time passes before a death is believed.
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
    write_stacks_on_request()  # of the watchdog of a stalled run
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
        if hasattr(answer, "initial_state"):  # to the start, or to a new pass
            failure = ExceptionWrapper((DataError, DataError(reason), None))  # type: ignore[no-untyped-call]
            return request, replace(answer, initial_state=failure)
        if isinstance(answer, tuple) and len(answer) == 3 and not isinstance(answer[0], UnsentBatch):
            return request, (UnsentBatch(reason), answer[1], None)
    print(reason, flush=True)
    os._exit(1)


def _end_with_parent() -> None:
    """End this process when the training process is gone, even in the middle of a sample. The parent of a process of
    forkserver is the server, which lives as long as its children; the sentinel of a forked process is held open by its
    younger siblings.
    """
    training = multiprocessing.parent_process()
    assert training is not None
    parents = {training.pid, os.getppid()}
    while os.getppid() in parents and training.is_alive():
        wait([training.sentinel], _POLL_SECONDS)
    os._exit(1)


def _exit_message(code: int) -> str:
    if code >= 0:
        return (
            f"ended with status {code}; its output is above. If no process or thread could be started: raise the limit "
            "(ulimit -u, pids of a container), or set runtime.num_workers=0."
        )
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
_THREADS = (
    "Raise the limit of processes and threads (ulimit -u, pids of a container), or set fewer runtime.num_workers."
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
    (("pickl", "local object"), (), _PICKLED),  # "local object" from Python 3.12 on
)
_open_contexts: set[WorkerContext] = set()


@atexit.register
def _close_all() -> None:
    """Close the loaders that are still open. At exit multiprocessing would wait for ever for workers, which do not obey
    its SIGTERM.
    """
    for context in [*_open_contexts]:
        context.close()

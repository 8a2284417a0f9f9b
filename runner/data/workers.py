"""The processes that load data: how they start, what becomes of a batch that they cannot send, and that they end.

multiprocessing drops what a worker cannot send, after which the training process would wait for ever; torch leaves the
end of processes to garbage collection and to the interpreter's exit, which may wait for ever, too. Here all processes
and queues are held from their start, and ended within some seconds whatever they do.
"""

import atexit
import errno
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
from runner.errors import DataError

_PATIENCE_SECONDS = 5.0  # for workers to finish the batch that they are at
_LOOK_SECONDS = 1.0

# torch raises from a handler of SIGCHLD wherever the training process happens to be. A dead worker is noticed in time
# where its batch is waited for.
signal_handling._SIGCHLD_handler_set = True


class Unsent(NamedTuple):
    """In place of a batch that a worker could not send: why, and the remedy."""

    why: str


class Workers(BaseContext):
    """A multiprocessing context for one loader, which holds what it starts."""

    def __init__(self, start_method: str | None) -> None:
        self._base: Any = multiprocessing.get_context(start_method)
        self.Event: Any = self._base.Event
        self._processes: list[Any] = []
        self._queues: list[_Queue] = []
        self._ended = threading.Event()
        self._ask: Callable[[], Any] | None = None

    def get_start_method(self, allow_none: bool = False) -> str:
        """See ``BaseContext``."""
        return str(self._base.get_start_method(allow_none))

    def Process(self, *arguments: Any, **how: Any) -> Any:  # noqa: N802
        """See ``BaseContext``."""
        self._processes.append(self._base.Process(*arguments, **how))
        return self._processes[-1]

    def Queue(self, maxsize: int = 0) -> "Queue[Any]":  # noqa: N802
        """See ``BaseContext``."""
        self._queues.append(_Queue(maxsize, ctx=self._base))
        return self._queues[-1]

    def watch(self, ask: Callable[[], Any]) -> None:
        """All have started; ``ask`` tells them to end. Wakes the training process when a worker dies: it may be reading
        a batch that was sent in half.
        """
        self._ask = ask
        _open.add(self)
        threading.Thread(target=self._watch, name="workers", daemon=True).start()

    def death(self, seconds: float = 0.0) -> str | None:
        """How a worker died, with the remedy; None if all live, for as long."""
        wait([process.sentinel for process in self._started], seconds)
        for number, process in enumerate(self._started):
            if not process.is_alive():
                return f"data worker {number} (pid {process.pid}) {_ending(process.exitcode)}"
        return None

    def unstarted(self, error: BaseException) -> str:
        """An error in starting workers, with its remedy."""
        if remedy(error) != _PICKLED:
            return f"data workers cannot start: {explained(error)}"
        return (
            "the data set or its collate function cannot be sent to data workers, which "
            f"runtime.start_method={self.get_start_method()} requires: {error}. Define functions and classes at the "
            "top of a module (no lambda), open files when they are first read, or use runtime.start_method=fork or "
            "runtime.num_workers=0."
        )

    def close(self) -> None:
        """Ask all processes to end; whichever does not within some seconds is killed."""
        self._ended.set()
        _open.discard(self)
        alive = [process for process in self._started if process.is_alive()]
        if self._ask is not None and len(alive) == len(self._started):  # the dead may have left locks behind
            threading.Thread(target=self._ask, daemon=True).start()
            _await(alive, _PATIENCE_SECONDS)
        for process in alive:
            if process.is_alive():
                process.kill()
        _await(alive, _PATIENCE_SECONDS)
        for queue in self._queues:
            queue.cancel_join_thread()
            queue.close()
        self._queues, self._processes, self._ask = [], [], None

    @property
    def _started(self) -> list[Any]:
        return [process for process in self._processes if process.pid is not None]

    def _watch(self) -> None:
        sentinels = [process.sentinel for process in self._started]
        while not self._ended.is_set():
            # A signal to the whole group of processes may end forkserver's server, and with it the view of its
            # children, shortly before it reaches this process: so some time passes before a death is believed.
            if wait(sentinels, _LOOK_SECONDS) and not self._ended.wait(_LOOK_SECONDS):
                signals.wake()


class _Queue(Queue):  # type: ignore[type-arg]
    """Whose feeder thread sends the reason in place of what it cannot send."""

    def _on_queue_feeder_error(self, error: Exception, sent: Any) -> None:
        if get_worker_info() is None:
            Queue._on_queue_feeder_error(error, sent)  # type: ignore[attr-defined]
        else:
            self.put(_instead(error, sent))


def start_worker(number: int) -> None:
    """The first action of a data worker."""
    signals.ignore()  # the training process decides when to stop
    with suppress(Exception):  # stderr may be anything
        faulthandler.register(signal.SIGQUIT)  # by which the watchdog of a run that stands still asks where it is
    tqdm.set_lock(
        threading.RLock()
    )  # the one shared by all processes stays locked when a process is killed that has it
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def remedy(error: BaseException) -> str:
    """What helps where memory, files, processes or pickling are the cause of an error; empty for other causes."""
    text, number = str(error).lower(), getattr(error, "errno", None)
    for words, numbers, kinds, told in _REMEDIES:
        if number in numbers or isinstance(error, kinds) or any(word in text for word in words):
            return told
    return ""


def explained(error: BaseException) -> str:
    """An error with its remedy."""
    return f"{type(error).__name__}: {error}. {remedy(error)}".rstrip()


def _instead(error: Exception, sent: Any) -> Any:
    """What is sent to the loader in place of an answer that cannot be sent. Ends the process if there is nothing."""
    why = Unsent(f"a data worker cannot send what it has read: {explained(error)}")
    if isinstance(sent, tuple) and len(sent) == 2:
        asked, answer = sent
        if hasattr(answer, "initial_state"):  # to a start or to a new pass
            failure = DataError(why.why)
            return asked, replace(answer, initial_state=ExceptionWrapper((DataError, failure, None)))  # type: ignore[no-untyped-call]
        if isinstance(answer, tuple) and len(answer) == 3 and not isinstance(answer[0], Unsent):
            return asked, (why, answer[1], None)
    print(why.why, flush=True)
    os._exit(1)


def _end_with_parent() -> None:
    """End this process when the training process is gone, whatever it does. The parent of a forkserver's process is
    the server, which lives as long as its children; of a forked one, younger siblings hold the sentinel open.
    """
    training = multiprocessing.parent_process()
    assert training is not None
    parents = {training.pid, os.getppid()}
    while os.getppid() in parents and training.is_alive():
        wait([training.sentinel], _LOOK_SECONDS)
    os._exit(1)


def _ending(code: int) -> str:
    """How a process ended, by its exit code, and the remedy."""
    if code >= 0:
        return f"ended with status {code}; what it printed is above. {_PROCESSES}"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return f"was ended by {name}, as the system does where memory runs out. {_MEMORY}"
    if name == "SIGBUS":
        return f"was ended by {name}: too little shared memory. {_SHARED}"
    return f"was ended by {name}; with runtime.num_workers=0 and python -X faulthandler it may be seen where"


def _await(processes: list[Any], seconds: float) -> None:
    """Wait until all have ended, but not for longer. Not by their sentinels, which children of theirs hold open."""
    until = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        time.sleep(0.01)


_FEWER = "a smaller runtime.prefetch, fewer runtime.num_workers or 0 help as well"
_SHARED = f"Give it more shared memory (docker run --shm-size=8g; /dev/shm holds the batches in flight); {_FEWER}."
_MEMORY = f"Give it more memory; {_FEWER}."
_PROCESSES = (
    "If it says that no process or thread can be started: raise the limit (ulimit -u, pids of a container), or set "
    "runtime.num_workers=0."
)
_PICKLED = (
    "A batch from a data worker is pickled: let the data set and data.collate give tensors, arrays and plain values, "
    "of classes at the top of a module, no functions, generators or open files, or set runtime.num_workers=0."
)
_REMEDIES: tuple[tuple[tuple[str, ...], tuple[int, ...], tuple[type[BaseException], ...], str], ...] = (
    (
        ("too many open files", "ancillary data"),
        (errno.EMFILE, errno.ENFILE),
        (),
        f"Every tensor of a batch in flight is an open file: raise the limit with ulimit -n 65536; {_FEWER}.",
    ),
    (("cannot allocate memory", "can't allocate memory"), (errno.ENOMEM,), (MemoryError,), _MEMORY),
    (("shared memory", "(shm)"), (errno.ENOSPC,), (), _SHARED),
    (
        ("can't start new thread", "resource temporarily unavailable"),
        (errno.EAGAIN,),
        (),
        "Raise the limit of processes and threads (ulimit -u, pids of a container), or set fewer runtime.num_workers.",
    ),
    (("requires_grad",), (), (), "Call detach() on tensors of a batch, or set runtime.num_workers=0."),
    (
        ("pickl", "local object"),  # the latter from Python 3.12 on
        (),
        (),
        _PICKLED,
    ),
)
_open: set[Workers] = set()


@atexit.register
def _end_all() -> None:
    """What nobody closed; multiprocessing would wait at exit for workers, which do not obey its SIGTERM, for ever."""
    for workers in [*_open]:
        workers.close()

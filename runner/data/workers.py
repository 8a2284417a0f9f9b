"""``runtime.num_workers=auto``: how many processes load data is chosen, and changed, while they load it.

Batches are pure functions of their items, so a move changes no bit: the items that were not delivered yet are read
again, by other processes.

Workers must not get a data set that was read already. A file that is opened at the first read would be shared by all
forked workers, position and all, and could not be sent to others. So this process reads a copy, which shares only
large data with the data set.
"""

import copy
import logging
import math
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from runner.data import probe
from runner.data.fetch import FetchedBatch, Fetcher
from runner.data.limits import Limits
from runner.data.loader import Loader, LoaderOptions
from runner.data.probe import Sketch, leaves
from runner.errors import DataError, printable

log = logging.getLogger("runner")

_LARGE = 10_000  # items or numbers; what is larger is data, which copies may share
_DEPTH = 8  # of attributes and containers in which large data is looked for
_WAITING = 0.25  # of reading on a core: reading with less of it waits, and does not just share the core with others
_MOST = 32  # workers, whatever the machine has
_WORTH = 0.05  # of a step's time: a shorter wait is left as it is
_GAIN = 0.04  # of a step's time: less is not worth the memory of more workers
_SEND_SECONDS = 0.5e-3, 1e-9  # that a batch from a worker takes of this process: for itself, and for each byte
_WORKER_BYTES = {"fork": 100e6, "spawn": 500e6, "forkserver": 500e6}  # of a worker that holds no batches
_WINDOW_STEPS = 4
_PAUSE = 10  # times the median of a step beside data: one that takes longer had an evaluation or a save in it


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a step took with ``workers``, in seconds: waiting for data, the ``rest``, and (in the process that does it)
    reading, of which the share ``busy`` on a core. A batch has ``size`` bytes.
    """

    workers: int
    rest: float
    waited: float
    reading: float
    busy: float
    size: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.rest + self.waited


class WorkerChoice:
    """The number of workers for what was measured: enough to read a batch while another is trained, within the limits,
    and only if steps then take less time indeed.
    """

    def __init__(self, limits: Limits, options: LoaderOptions) -> None:
        self._limits = limits
        self._prefetch = options.prefetch
        self._worker_bytes = _WORKER_BYTES[multiprocessing.get_context(options.start_method).get_start_method()]
        self._tried: dict[int, float] = {}  # seconds of a step, by the numbers of workers that this work was done with
        self._share = self._reading = 0.0  # of this work: the share of reading in a step, and its seconds

    def after(self, measured: Measurement) -> int:
        """The number to try next, or to stay with."""
        share = max(_WORTH, measured.reading / (measured.reading + measured.rest))
        if not self._tried or not 0.5 < share / self._share < 2:  # other work than before
            self._tried, self._share, self._reading = {}, share, math.inf
        tried = self._tried
        tried[measured.workers] = min(measured.seconds, tried.get(measured.workers, math.inf))
        self._reading = min(measured.reading, self._reading)  # it takes longer where workers crowd the cores
        shortest = min(tried.values())
        best = min(number for number, seconds in tried.items() if seconds <= shortest / (1 - _GAIN))
        wanted = self._wanted(measured)
        return wanted if wanted not in tried and measured.workers == best else best

    def limit(self, measured: Measurement) -> tuple[int, str]:
        """The largest number of workers, and what it is limited by. Reading that waits, as for a remote store, leaves
        the cores to other workers.
        """
        limits = self._limits
        busy = max(0.1, measured.busy)
        in_flight = self._prefetch * measured.size
        numbers = {
            f"{limits.cores:g} cores": limits.cores / (busy if busy < _WAITING else 1.0),
            "free memory": limits.memory() / 2 / (self._worker_bytes + in_flight),
            "free shared memory": limits.shared_memory() / 2 / max(1, in_flight),
            "the most that are tried": _MOST,
        }
        cause = min(numbers, key=lambda name: numbers[name])
        most = int(numbers[cause])
        fit = limits.fit(most) if most else 0
        return fit, cause if fit == most else "the streams of the data"

    def _wanted(self, measured: Measurement) -> int:
        once, per_byte = _SEND_SECONDS
        gain = measured.reading - once - per_byte * measured.size
        if gain < _WORTH * (measured.reading + measured.rest):
            return 0
        enough = math.ceil(1.1 * self._reading / measured.rest)
        if measured.workers and measured.waited > _WORTH * measured.seconds:
            enough = max(enough, math.ceil(1.5 * measured.workers))
        return self._limits.fit(min(enough, self.limit(measured)[0]))


class AdaptiveLoader:
    """As ``Loader``: the batches of ``fetcher`` for the items of ``sampler``, read by ``here`` in this process or by as
    many workers as ``WorkerChoice`` chooses. ``adapt`` is called at the border of two steps.

    Whatever is wrong with workers, from data that cannot be sent to a worker that is killed, is said in one line, and
    this process reads on by itself. ``examine`` gets the answer of a worker to the item ``request``, and may raise
    DataError.
    """

    _leave_out: int  # steps before the measurement begins
    _rests: list[float]  # seconds of each step beside waiting for data
    _waited: float  # seconds of this step
    _all_waited: float
    _step_began: float
    _busy: list[float]  # shares of reading on a core

    def __init__(
        self,
        fetcher: Fetcher,
        sampler: Iterable[Any],
        options: LoaderOptions,
        *,
        here: Fetcher,
        key: str = "data.train",
        request: Any = None,
        examine: Callable[[Any], object] = bool,
    ) -> None:
        self._fetcher, self._here, self._options, self._key = fetcher, here, options, key
        assert options.limits is not None, "for runtime.num_workers=auto"
        self._choice = WorkerChoice(options.limits, options)
        self._items = _Items(sampler, request)
        self._examine = examine
        self._stays = fetcher is here  # in this process
        self._said: int | None = None
        self._windows = options.limits.windows
        self._window = self._windows[0]
        self._share = 1.0  # of reading on a core
        self._last: Any = None  # batch
        self._measure()
        self._open(0)

    def __iter__(self) -> "AdaptiveLoader":
        """Begin a pass."""
        self._items.begin()
        self._begin()
        self._measure(leave_out=1)
        return self

    def __next__(self) -> FetchedBatch:
        began = time.perf_counter()
        try:
            batch = self._next()
        except DataError as error:
            if not self.workers:
                raise
            self._stay(error)
            batch = self._next()
        self._items.delivered()
        self._waited += time.perf_counter() - began
        if batch.time is not None:  # it could be read
            self._reading += batch.time.seconds
            self._busy += [] if batch.time.busy is None else [batch.time.busy]
        self._last = batch
        return batch

    def adapt(self) -> None:
        """A step is over: change the number of workers if that is due, and say once what was chosen and why."""
        now = time.perf_counter()
        self._rests.append(now - self._step_began - self._waited)
        self._all_waited += self._waited
        self._step_began, self._waited = now, 0.0
        if self._leave_out:
            self._measure(leave_out=self._leave_out - 1)
        elif now >= self._due and len(self._rests) >= _WINDOW_STEPS and not self._stays:
            self._adapt(self._measured())

    def close(self) -> None:
        """End the workers, within some seconds."""
        self._loader.close()

    def _adapt(self, measured: Measurement) -> None:
        number = self._choice.after(measured)
        log.debug("workers  %s: next %d", measured, number)
        if number != self.workers:
            self._window = self._windows[0]
            self._move(number)
            return
        self._window = min(2 * self._window, self._windows[1])
        self._measure()
        if number != self._said:
            limit, cause = self._choice.limit(measured)
            log.info(
                "workers  %d for %s: a step reads for %.1f ms and takes %.1f ms beside it; at most %d, for %s",
                *(number, self._key, 1e3 * measured.reading, 1e3 * measured.rest, limit, cause),
            )
            self._said = number

    def _measured(self) -> Measurement:
        rests, count = sorted(self._rests), len(self._rests)
        usual = [seconds for seconds in rests if seconds <= _PAUSE * rests[count // 2]]
        rest = max(sum(usual) / len(usual), 1e-6)
        if self._busy:
            self._share = max(self._busy)  # the others may have waited for a core
        spent = self._all_waited / count, self._reading / count
        return Measurement(self.workers, rest, *spent, self._share, _size(self._last))

    def _measure(self, leave_out: int = 0) -> None:
        """Measure from now on, but for some steps."""
        self._leave_out, self._rests = leave_out, []
        self._step_began = time.perf_counter()
        self._due = self._step_began + self._window
        self._waited = self._all_waited = self._reading = 0.0
        self._busy = []

    def _next(self) -> FetchedBatch:
        if self._items.asking:
            self._examine(next(self._loader))
            self._items.asking = False
        batch: FetchedBatch = next(self._loader)
        return batch

    def _open(self, workers: int) -> None:
        self.workers = workers
        fetcher = self._fetcher if workers else self._here
        self._items.asking = self._items.request is not None and workers > 0
        self._loader = Loader(fetcher, self._items, replace(self._options, num_workers=workers), key=self._key)

    def _begin(self) -> None:
        try:
            iter(self._loader)
        except DataError as error:
            if not self.workers:
                raise
            self._stay(error)

    def _move(self, workers: int) -> None:
        """Go on reading with another number of workers."""
        self._loader.close()
        self._fetcher.drawn |= self._here.drawn  # seen by now
        self._open(workers)
        self._begin()
        self._measure(leave_out=workers + 1)

    def _stay(self, error: DataError) -> None:
        """Read in this process from now on."""
        self._stays = True
        self.close()
        log.warning("workers  0: this process reads by itself, for workers failed: %s", printable(str(error)))
        self._open(0)
        iter(self._loader)


class _Items:
    """The items of a sampler, pass after pass. Each iterator goes on with those that were not delivered yet, after the
    ``request`` while ``asking``.
    """

    def __init__(self, sampler: Iterable[Any], request: Any) -> None:
        self.request = request
        self.asking = False
        self._sampler = sampler
        self._rest: Iterator[Any] = iter(())
        self._under_way: deque[Any] = deque()  # items that a loader has taken and not delivered

    def begin(self) -> None:
        self._rest, self._under_way = iter(self._sampler), deque()

    def delivered(self) -> None:
        self._under_way.popleft()

    def __iter__(self) -> Iterator[Any]:
        self._rest, self._under_way = chain([*self._under_way], self._rest), deque()
        if self.asking:
            yield self.request
        for item in self._rest:
            self._under_way.append(item)
            yield item


def examine(
    fetcher: Fetcher, options: LoaderOptions, *, audit: bool, key: str = "data.train"
) -> tuple[Fetcher, Sketch, list[str] | None]:
    """The fetcher for this process, and the results of ``probe.examine``.

    Where workers may have to read the data set later, this process gets a copy of it. It gets the data set itself, and
    workers never do, if there can be no copy, or if files stay open beside the copy: of a module, or of a class. Says
    so.
    """
    if options.limits is None:
        return fetcher, *probe.examine(fetcher, options, audit=audit, key=key)
    fetcher.timed = True
    before = _open_files()
    try:
        here, trial = _over_copy(fetcher), _over_copy(fetcher)
    except Exception as error:
        _say_never(fetcher, key, f"it cannot be copied ({type(error).__name__}: {error})")
        return fetcher, *probe.examine(fetcher, options, audit=audit, key=key)
    results = probe.examine(trial, options, audit=audit, key=key)
    here.drawn = fetcher.drawn = trial.drawn
    here.by_batch = fetcher.by_batch = trial.by_batch
    del trial
    if left := _open_files() - before:
        _say_never(fetcher, key, f"its samples leave open what workers must not share: {', '.join(sorted(left))}")
        return fetcher, *results
    return here, *results


def _say_never(fetcher: Fetcher, key: str, cause: str) -> None:
    name = type(fetcher.samples).__qualname__
    log.info("workers  0 for %s, a %s: %s", key, name, printable(cause))


def _over_copy(fetcher: Fetcher) -> Fetcher:
    other = copy.copy(fetcher)
    other.samples = unread_copy(fetcher.samples)
    return other


def _open_files() -> set[str]:
    """The files and connections that this process has open; not those of fsspec, which workers do not use."""
    targets = set()
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                targets.add(os.readlink(f"/proc/self/fd/{number}"))
    of_fsspec = getattr(sys.modules.get("fsspec.asyn"), "iothread", [None])[0] is not None
    kinds = ("/",) if of_fsspec else ("/", "socket:")
    return {target for target in targets if target.startswith(kinds) and not target.startswith(("/dev/", "/proc/"))}


def unread_copy(samples: Any) -> Any:
    """A copy that can be read without a change to the original. They share only large data."""
    shared: dict[int, Any] = {}
    _share(samples, shared, set(), _DEPTH)
    return copy.deepcopy(samples, shared)


def _share(value: Any, shared: dict[int, Any], seen: set[int], depth: int) -> None:
    """Put large data, within attributes and small containers, into ``shared``, by its id."""
    if id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray | torch.Tensor):
        if math.prod(value.shape) > _LARGE:
            shared[id(value)] = value
    elif isinstance(value, list | tuple | dict):
        if len(value) > _LARGE:
            shared[id(value)] = value
            return
        for inner in value.values() if isinstance(value, dict) else value:
            _share(inner, shared, seen, depth - 1)
    else:
        for inner in getattr(value, "__dict__", {}).values():
            _share(inner, shared, seen, depth - 1)


def _size(batch: Any) -> int:
    """Bytes of the tensors in a batch."""
    return sum(int(getattr(value, "nbytes", 0)) for _, value in leaves(batch))

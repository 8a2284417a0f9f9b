"""``runtime.num_workers=auto``: the number of processes that load data is chosen, and changed, while they load it.

A batch is a pure function of its item, so another number changes no bit: other processes read the items that were not
delivered yet.

Workers must not get a data set that has been read. Forked workers would all share a file that the first read opened,
with its position, and it could not be sent to others. So this process reads a copy, which shares only large data with
the original.
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
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from runner.data import probe
from runner.data.fetch import FetchedBatch, Fetcher
from runner.data.limits import Limits
from runner.data.loader import Loader, LoaderOptions
from runner.data.probe import Sketch, leaves
from runner.errors import DataError, printable

log = logging.getLogger("runner")

_LARGE, _MANY = 10_000, 1_000  # numbers of an array, items of a container: more are data, which copies may share
_IN_MEMORY = {"pandas", "polars", "pyarrow", "scipy"}  # their large tables and matrices may be shared as well
_DEPTH = 8  # levels of attributes and containers that are searched for large data
_WAITING = 0.25  # share of reading on a core: with less, reading waits, and is not just slowed down by other processes
_MOST = 32  # workers, even on a large machine
_WORTH = 0.05  # share of a step's time: a shorter wait does not matter
_GAIN = 0.04  # share of a step's time: a smaller gain is not worth the memory of more workers
_SEND_SECONDS = 0.5e-3, 1e-9  # time of this process for a batch from a worker: per batch, per byte
_WORKER_BYTES = {"fork": 100e6, "spawn": 500e6, "forkserver": 500e6}  # memory of a worker without batches
_SPAWN_FACTOR = 20  # of the first measurement's length for spawned workers: training waits seconds for their imports
_MIN_STEPS = 4  # the fewest steps in a measurement
_PATIENCE_SECONDS, _PATIENCE_FACTOR = 30.0, 20  # the longest wait for a worker's batch: 30 s and 20 times its reading
_OUTLIER = 10  # a step longer than so many medians includes an evaluation or a save


@dataclass(frozen=True, slots=True)
class Measurement:
    """Mean seconds of a step with ``workers``: ``waited`` for data, ``reading`` it (in the process that does), and the
    ``rest``. ``busy`` is the share of reading on a core; a batch has ``size`` bytes.
    """

    workers: int
    rest: float
    waited: float
    reading: float
    busy: float
    size: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.rest + self.waited


class WorkerChoice:
    """Chooses the number of workers: enough to read a batch while another is trained, within the limits, and only if
    this makes steps shorter.
    """

    def __init__(self, limits: Limits, options: LoaderOptions) -> None:
        self._limits = limits
        self._prefetch = options.prefetch
        self._worker_bytes = _WORKER_BYTES[_start_method(options)]
        self._tried: dict[int, float] = {}  # number of workers -> seconds of a step
        self._share = self._reading = 0.0  # the share of reading in a step, and its seconds

    def after(self, measured: Measurement) -> int:
        """The number to try next, or to stay with."""
        share = max(_WORTH, measured.reading / (measured.reading + measured.rest))
        if not self._tried or not 0.5 < share / self._share < 2:  # the work has changed
            self._tried, self._share, self._reading = {}, share, math.inf
        tried = self._tried
        tried[measured.workers] = min(measured.seconds, tried.get(measured.workers, math.inf))
        self._reading = min(measured.reading, self._reading)  # reading takes longer where workers crowd the cores
        shortest = min(tried.values())
        best = min(number for number, seconds in tried.items() if seconds <= shortest / (1 - _GAIN))
        wanted = self._wanted(measured)
        return wanted if wanted not in tried and measured.workers == best else best

    def limit(self, measured: Measurement) -> tuple[int, str]:
        """The largest number of workers, and what limits it. Reading that waits, say for a remote store, leaves its
        core to other workers.
        """
        limits = self._limits
        busy = max(0.1, measured.busy)
        in_flight = self._prefetch * measured.size
        numbers = {
            f"{limits.cores:g} cores": limits.cores / (busy if busy < _WAITING else 1.0),
            "the free memory": limits.free_memory() / 2 / (self._worker_bytes + in_flight),
            "the free shared memory": limits.free_shared_memory() / 2 / max(1, in_flight),
            "a fixed maximum": _MOST,
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


class BatchLoader:
    """Iterates over the batches of ``fetcher`` for the items of ``sampler``, pass after pass, as ``Loader`` does. With
    ``options.limits``, ``WorkerChoice`` chooses the number of workers; ``adapt`` is called between two steps.

    With 0 workers ``local_fetcher`` reads the batches. If it is ``fetcher`` itself, the number stays 0. If workers
    fail whose number was chosen, say because one is killed, a line of the log tells why, and this process reads on by
    itself. ``check`` gets a worker's answer to ``request`` before the first batch, and may raise DataError.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        sampler: Iterable[Any],
        options: LoaderOptions,
        *,
        local_fetcher: Fetcher,
        key: str = "data.train",
        request: Any = None,
        check: Callable[[Any], object] = lambda answer: None,
    ) -> None:
        limits = options.limits or Limits(cores=0.0)  # of no effect where the number is fixed
        self._fetcher, self._local_fetcher, self._options, self._key = fetcher, local_fetcher, options, key
        self._is_fixed = options.limits is None or fetcher is local_fetcher
        self._choice = WorkerChoice(limits, options)
        self._items = _Items(sampler, request)
        self._check = check
        self._settings = {} if self._is_fixed else dict(_settings(fetcher.samples))
        self._logged_number: int | None = None
        self._first_seconds, self._most_seconds = limits.seconds
        self._timeout = limits.timeout
        self._spawns = _start_method(options) == "spawn"
        if self._spawns:
            self._first_seconds *= _SPAWN_FACTOR
        self._seconds = self._first_seconds
        self._share = 1.0  # share of reading on a core
        self._last_batch: Any = None
        self._step_began = self._waited = self._all_waited = 0.0  # waits: in this step, in all steps
        self._measure()
        self._open(options.num_workers)

    def __iter__(self) -> "BatchLoader":
        """Begin a pass."""
        self._require_unchanged()
        self._items.begin()
        self._begin()
        self._measure(leave_out=1)
        return self

    def __next__(self) -> FetchedBatch:
        began = time.perf_counter()
        try:
            batch = self._next()
        except DataError as error:
            if self._is_fixed or not self.workers:
                raise
            self._stay(error)
            batch = self._next()
        self._items.delivered()
        self._waited += time.perf_counter() - began
        if batch.time is not None:  # None for a batch that could not be read
            self._reading += batch.time.seconds
            self._busy += [] if batch.time.busy is None else [batch.time.busy]
        self._last_batch = batch
        return batch

    def adapt(self) -> None:
        """After a step: change the number of workers if that is due, and log each choice once, with the reason."""
        if self._is_fixed:
            return
        now = time.perf_counter()
        self._rests.append(now - self._step_began - self._waited)
        self._all_waited += self._waited
        self._step_began, self._waited = now, 0.0
        if self._leave_out:
            self._measure(leave_out=self._leave_out - 1)
        elif now >= self._due and len(self._rests) >= _MIN_STEPS:
            self._adapt(self._measured())

    def close(self) -> None:
        """End the workers, within some seconds."""
        self._loader.close()

    def _adapt(self, measured: Measurement) -> None:
        self._require_unchanged()
        number = self._choice.after(measured)
        log.debug("workers  %s: next %d", measured, number)
        if number != self.workers:
            self._seconds = self._first_seconds
            self._move(number, measured.reading)
            return
        self._seconds = min(2 * self._seconds, self._most_seconds)
        self._measure()
        matters = number or self._logged_number or measured.waited > _WORTH * measured.seconds
        if matters and number != self._logged_number:
            limit, cause = self._choice.limit(measured)
            log.info(
                "workers  %d for %s: a step reads for %.1f ms and takes %.1f ms beside it; at most %d, limited by %s",
                *(number, self._key, 1e3 * measured.reading, 1e3 * measured.rest, limit, cause),
            )
            self._logged_number = number

    def _measured(self) -> Measurement:
        rests, count = sorted(self._rests), len(self._rests)
        usual = [seconds for seconds in rests if seconds <= _OUTLIER * rests[count // 2]]
        rest = max(sum(usual) / len(usual), 1e-6)
        if self._busy:
            self._share = max(self._busy)  # smaller shares may include waiting for a core
        waited, reading = self._all_waited / count, self._reading / count
        return Measurement(self.workers, rest, waited, reading, self._share, _size(self._last_batch))

    def _measure(self, leave_out: int = 0) -> None:
        """Begin a measurement, after ``leave_out`` steps."""
        self._leave_out = leave_out
        self._rests: list[float] = []  # seconds of each step without waiting for data
        self._busy: list[float] = []  # shares of reading on a core
        self._step_began = time.perf_counter()
        self._due = self._step_began + self._seconds
        self._waited = self._all_waited = self._reading = 0.0

    def _require_unchanged(self) -> None:
        """Raise DataError if the training process has changed a setting of the data set, of which a copy is read."""
        if self._is_fixed:
            return
        for name, now in _settings(self._fetcher.samples):
            before = self._settings.get(name, now)
            if now != before:
                raise DataError(
                    f"{self._key}: {name} of {type(self._fetcher.samples).__qualname__} was {before} and is {now} now, "
                    "but a copy of it is read. Let samples depend on their index and the configuration alone, or set "
                    "runtime.num_workers=0, with which this process reads the object itself"
                )

    def _open(self, workers: int, timeout: float = 0.0) -> None:
        self.workers = workers
        fetcher = self._fetcher if workers else self._local_fetcher
        self._items.asking = self._items.request is not None and workers > 0
        options = replace(self._options, num_workers=workers, timeout=timeout)
        self._loader = Loader(fetcher, self._items, options, key=self._key)

    def _begin(self) -> None:
        try:
            iter(self._loader)
        except DataError as error:
            if self._is_fixed or not self.workers:
                raise
            self._stay(error)

    def _next(self) -> FetchedBatch:
        if self._items.asking:
            self._check(next(self._loader))
            self._items.asking = False
        batch: FetchedBatch = next(self._loader)
        return batch

    def _move(self, workers: int, reading: float) -> None:
        """Go on reading with another number of workers; a batch takes ``reading`` seconds."""
        if workers and self._spawns:
            log.info("workers  starting %d for %s; training waits until they have imported modules", workers, self._key)
        self._loader.close()
        self._fetcher.generators |= self._local_fetcher.generators  # as this process has seen by now
        if workers:  # closes files before a fork, which some libraries require (LMDB)
            self._local_fetcher.samples = unread_copy(self._fetcher.samples)
        # A forked worker waits forever for a lock or a thread that only this process has.
        patience = _PATIENCE_SECONDS * (1 + self._spawns) + _PATIENCE_FACTOR * reading
        self._open(workers, math.ceil(min(patience, self._timeout / 2)))
        self._begin()
        self._measure(leave_out=workers + 1)

    def _stay(self, error: DataError) -> None:
        """Read in this process from now on."""
        self._is_fixed = True
        self.close()
        log.warning("workers  0: this process reads by itself; workers failed: %s", printable(str(error)))
        self._open(0)
        iter(self._loader)


class _Items:
    """The items of a sampler, pass after pass. Each iterator continues with the items that were not delivered yet;
    while ``asking``, the ``request`` comes before them.
    """

    def __init__(self, sampler: Iterable[Any], request: Any) -> None:
        self.request = request
        self.asking = False
        self._sampler = sampler
        self._rest: Iterator[Any] = iter(())
        self._under_way: deque[Any] = deque()  # items that the loader has taken but not delivered

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


def _start_method(options: LoaderOptions) -> str:
    return multiprocessing.get_context(options.start_method).get_start_method()


def examine(
    fetcher: Fetcher, options: LoaderOptions, *, audit: bool, key: str = "data.train"
) -> tuple[Fetcher, Sketch, list[str] | None]:
    """The fetcher for this process, and the results of ``probe.check_samples``.

    With ``num_workers=auto`` this process reads a copy of the data set, because workers may get it later. If it cannot
    be copied, or if files stay open outside of the copy (in a module or a class), this process reads the data set
    itself, workers never do, and a line of the log tells why.
    """
    if options.limits is None:
        return fetcher, *probe.check_samples(fetcher, options, audit=audit, key=key)
    fetcher.timed = True
    before, reason = _open_files(), ""
    try:
        local_fetcher = _over_copy(fetcher)
    except Exception as error:
        local_fetcher, reason = fetcher, f"it cannot be copied ({type(error).__name__}: {error})"
    results = probe.check_samples(local_fetcher, options, audit=audit, key=key)
    fetcher.generators, fetcher.by_batch = local_fetcher.generators, local_fetcher.by_batch
    if not reason and _open_files() - before:
        local_fetcher = fetcher  # drops the copy, which closes its files
        if left := _open_files() - before:
            reason = f"its samples leave files open that workers must not share: {', '.join(sorted(left))}"
        else:
            local_fetcher = _over_copy(fetcher)
    if reason:
        log.info("workers  0 for %s, a %s: %s", key, type(fetcher.samples).__qualname__, printable(reason))
        return fetcher, *results
    return local_fetcher, *results


def _over_copy(fetcher: Fetcher) -> Fetcher:
    other = copy.copy(fetcher)
    other.samples = unread_copy(fetcher.samples)
    return other


def _open_files() -> set[str]:
    """The files and connections that this process has open, except those of fsspec, which workers do not use."""
    targets = set()
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                targets.add(os.readlink(f"/proc/self/fd/{number}"))
    of_fsspec = getattr(sys.modules.get("fsspec.asyn"), "iothread", [None])[0] is not None
    kinds = ("/",) if of_fsspec else ("/", "socket:")
    return {target for target in targets if target.startswith(kinds) and not target.startswith(("/dev/", "/proc/"))}


def unread_copy(samples: Any) -> Any:
    """A copy that can be read without a change to the original. They share only large data and modules."""
    shared: dict[int, Any] = {}
    _share(samples, shared, set(), _DEPTH)
    return copy.deepcopy(samples, shared)


def _settings(samples: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The plain public attributes of a data set, and of data sets in its attributes, by their paths."""
    for name, value in getattr(samples, "__dict__", {}).items():
        if isinstance(value, int | float | str) and not name.startswith("_"):
            yield f"{prefix}{name}", repr(value)
        elif isinstance(value, Dataset) and prefix.count(".") < _DEPTH:
            yield from _settings(value, f"{prefix}{name}.")


def _share(value: Any, shared: dict[int, Any], seen: set[int], depth: int) -> None:
    """Put large data, within attributes and small containers, into ``shared``, by its id."""
    if id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, ModuleType):
        shared[id(value)] = value
    elif isinstance(value, np.ndarray | torch.Tensor) or type(value).__module__.partition(".")[0] in _IN_MEMORY:
        if math.prod(getattr(value, "shape", ())) > _LARGE:
            shared[id(value)] = value
    elif isinstance(value, list | tuple | dict):
        if len(value) > _MANY:
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

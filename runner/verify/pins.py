"""Things that can be held fast in an attempt, to see whether a difference goes away with them.

A pin changes what is computed; only runs under the same pins are compared.
"""

import concurrent.futures
import datetime
import itertools
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any

from runner.callbacks.base import Observer, TrainingSetup, observers
from runner.callbacks.evaluate import Evaluate, Interval
from runner.verify import source

_PID = 4242
_NOW = 1_700_000_000.0
_PATIENCE_SECONDS = 1.0  # for a thread that waits for others

asked: list[str] = []  # lines of the user's code that asked for what is held fast in this process


def hold(name: str) -> None:
    """Hold one thing fast in this process."""
    _HOLD[name]()


class _NoEvaluation(Observer):
    """No evaluation but the last."""

    def on_build(self, setup: TrainingSetup) -> None:
        evaluate = setup.callbacks.get("evaluate")
        if isinstance(evaluate, Evaluate):
            evaluate.interval = Interval()
            evaluate.evaluator.check_batches = 0


def _pid() -> None:
    def getpid() -> int:
        _note()
        return _PID

    os.getpid = getpid


def _time() -> None:
    """The clocks that people read: each call of a module reads a little later time than its last call, in every attempt
    alike, whatever others ask beside it. The runner reads the true ones.
    """
    ticks: dict[str, Iterator[int]] = defaultdict(itertools.count)

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.now(datetime.timezone.utc).replace(tzinfo=None)

    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        setattr(time, name, _ticking(getattr(time, name), ticks, lambda tick: _NOW + tick * 1e-3))
        in_ns = f"{name}_ns"
        setattr(time, in_ns, _ticking(getattr(time, in_ns), ticks, lambda tick: int(_NOW * 1e9) + tick * 10**6))
    datetime.datetime = Datetime  # type: ignore[misc]


def _ticking(
    clock: Callable[[], Any], ticks: Mapping[str, Iterator[int]], shown: Callable[[int], Any]
) -> Callable[[], Any]:
    def read() -> Any:
        who = _asking()
        _note()
        return clock() if who.startswith("runner.") else shown(next(ticks[who]))

    return read


def _turns() -> None:
    """Threads of the user's do not overlap: each is done before the next begins, and is looked at in that order."""
    start, pools, futures = threading.Thread.start, ThreadPoolExecutor, concurrent.futures

    def whole(self: threading.Thread) -> None:
        start(self)
        if "site-packages" not in _asking() and not _asking().startswith("runner."):
            self.join(_PATIENCE_SECONDS)

    def submit(self: ThreadPoolExecutor, call: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments, **keywords))
        except BaseException as error:
            future.set_exception(error)
        return future

    def in_turn(given: Iterable[Future[Any]], timeout: float | None = None) -> Iterator[Future[Any]]:
        return iter([*given])

    threading.Thread.start, pools.submit = whole, submit  # type: ignore[method-assign,assignment]
    futures.as_completed = in_turn  # type: ignore[assignment]


def _note() -> None:
    """Note the line of the user's that asks for what is held fast."""
    place = source.of_stack(sys._getframe(2))
    if place and place not in asked:
        asked.append(place)


def _asking() -> str:
    """Who asks: module and file of the first caller beyond python's own library."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in sys.stdlib_module_names:
            return f"{name} {frame.f_code.co_filename}"
        frame = frame.f_back
    return ""


def _entropy() -> None:
    """What the system gives as chance: seeds of generators that are made without one. Each module draws for itself,
    whatever others draw beside it; so do ranks, since names of files come from it.
    """
    draws: dict[str, Iterator[int]] = defaultdict(itertools.count)
    rank, seed = os.environ.get("RANK", "0"), random.Random.seed

    def urandom(size: int) -> bytes:
        who = _asking()
        _note()
        return random.Random(f"{rank} {who} {next(draws[who])}").randbytes(size)

    def seeded(self: random.Random, a: Any = None, version: int = 2) -> None:
        who = _asking()
        seed(self, f"{rank} {who} {next(draws[who])}" if a is None else a, version)

    os.urandom = urandom
    random._urandom = urandom  # type: ignore[attr-defined]  # SystemRandom's name for it
    random.Random.seed = seeded  # type: ignore[method-assign]


_HOLD: dict[str, Callable[[], None]] = {
    "evaluation": lambda: observers.append(_NoEvaluation()),
    "pid": _pid,
    "time": _time,
    "entropy": _entropy,
    "turns": _turns,
}

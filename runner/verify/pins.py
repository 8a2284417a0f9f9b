"""Things that can be held fast in a life, to see whether a difference goes away with them.

A pin changes what is computed; only runs under the same pins are compared.
"""

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from runner import build
from runner.callbacks.base import Loop
from runner.callbacks.evaluate import Evaluate
from runner.data.stream import BatchStream

_PID = 4242
_NOW = 1_700_000_000.0


def hold(name: str) -> None:
    """Hold one thing fast in this process."""
    _HOLD[name]()


def _evaluation() -> None:
    """No evaluation but the last."""

    def due(self: Evaluate, loop: Loop) -> bool:
        return loop.stop is not None

    Evaluate._due = due  # type: ignore[method-assign]


def _callbacks() -> None:
    """None of the user's own."""
    every = build.build

    def built(config: Any, device: Any, team: Any) -> build.Parts:
        return replace(every(config, device, team), callbacks={})

    build.build = built


def _batches() -> None:
    """Every step gets the batch that the first step of all would get."""
    step = BatchStream.step
    first: list[tuple[float, Any]] = []

    def same(self: BatchStream) -> Iterator[tuple[float, Any]]:
        if not first:
            fetcher, plan = self._fetcher, self.plan
            pieces = next(plan.steps(0, fetcher.order))
            total = sum(piece.count for piece in pieces)
            first.extend((piece.count / total, fetcher[piece].batch) for piece in pieces)
        for _, one in zip(step(self), itertools.cycle(first), strict=False):
            yield one

    BatchStream.step = same  # type: ignore[method-assign]


def _pid() -> None:
    os.getpid = lambda: _PID


def _time() -> None:
    """The clocks that people read: each call finds them a little later than the one before, in every life alike."""
    ticks = itertools.count()

    def seconds() -> float:
        return _NOW + next(ticks) * 1e-3

    def nanoseconds() -> int:
        return int(seconds() * 1e9)

    time.time, time.perf_counter, time.monotonic = seconds, seconds, time.monotonic
    time.time_ns, time.perf_counter_ns = nanoseconds, nanoseconds


def _entropy() -> None:
    """What the system gives as chance: seeds of generators that are made without one. Ranks draw apart, since
    names of files come from it.
    """
    count, seed = itertools.count(int(os.environ.get("RANK", 0)) << 32), random.Random.seed

    def urandom(size: int) -> bytes:
        return random.Random(next(count)).randbytes(size)

    def seeded(self: random.Random, a: Any = None, version: int = 2) -> None:
        seed(self, next(count) if a is None else a, version)

    os.urandom = urandom
    random._urandom = urandom  # type: ignore[attr-defined]
    random.Random.seed = seeded  # type: ignore[method-assign]


_HOLD: dict[str, Callable[[], None]] = {
    "evaluation": _evaluation,
    "callbacks": _callbacks,
    "batches": _batches,
    "pid": _pid,
    "time": _time,
    "entropy": _entropy,
}

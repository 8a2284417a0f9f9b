"""Experiments that depend on what surrounds a process: files that outlive it, clocks, starts, caches.
``mended`` fixes them as ``runner.verify`` advises. The comment ``culprit`` marks the line that it has to name.
"""

import functools
import os
import tempfile
import time
import timeit
from pathlib import Path

import numpy as np

from mine.corpus import Scaled


class Cold(Scaled):
    """Keeps what it computes in a file, by default a temporary one, with fewer digits."""

    def __init__(self, mended, folder=None):
        super().__init__(mended)
        self.mean = float(np.sin(np.arange(100)).std())
        file = Path(folder or tempfile.gettempdir(), f"mean-{mended}.npy")
        if file.exists():
            self.mean = float(np.load(file))
        np.save(file, self.mean if self.mended else np.float16(self.mean))  # culprit

    def amount(self, x):
        return self.mean


class Restarted(Scaled):
    """Takes another seed whenever a cluster queues it again."""

    def __init__(self, mended):
        super().__init__(mended)
        self.seed = 0 if mended else int(os.environ.get("SLURM_RESTART_COUNT", 0))

    def amount(self, x):
        return self.seed


CLOCKS = {
    "number": lambda: time.clock_gettime(time.CLOCK_MONOTONIC),  # culprit
    "timeit": lambda: timeit.default_timer(),  # culprit
}


class Late(Scaled):
    """Warms up for the first minute, by a clock of another name."""

    def __init__(self, mended, clock):
        super().__init__(mended)
        self.clock = CLOCKS[clock]
        self.begun = self.clock()

    def amount(self, x):
        return 1 if self.mended or self.clock() - self.begun < 60 else 2


class Memoizes(Scaled):
    """Scales all batches by the first one, which a cache of a function remembers."""

    batch = None

    @functools.lru_cache  # noqa: B019
    def first(self):
        return float(self.batch.std())

    def amount(self, x):
        self.batch = x
        return 1 if self.mended else self.first()  # culprit

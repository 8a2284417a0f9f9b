"""What stands still, and what only looks as if it did."""

import ctypes
import threading
import time

import torch

from mine.tasks import first
from runner.datasets.digits import Digits
from runner.tasks.classification import Classification


def stuck(how):
    """Never comes back."""
    if how == "lock":
        threading.Lock().acquire() and threading.Event().wait()
    if how == "python":
        while True:
            pass
    if how == "c":
        ctypes.CDLL(None).sleep(100_000)
    if how == "gil":
        ctypes.PyDLL(None).sleep(100_000)


class Data(Digits):
    """Gets stuck at a sample, where the file ``once`` is not, which it makes."""

    def __init__(self, *, how, once, at=100, **more):
        super().__init__(**more)
        self.how, self.once, self.at = how, once, at

    def __getitem__(self, index):
        if index == self.at and first(self.once):
            stuck(self.how)
        return super().__getitem__(index)


class Slow(Classification):
    """Takes seconds to be built, in a ``step``, ``compiling``, in a ``batch`` or at the ``end`` of an
    evaluation.
    """

    def __init__(self, *, build=0.0, step=0.0, compiling=0.0, batch=0.0, end=0.0):
        super().__init__()
        time.sleep(build)
        if compiling:
            torch.compile(torch.cos, backend="eager")(torch.ones(1))  # imports the compiler, which takes seconds
        self.step, self.compiling, self.batch, self.end = step, compiling, batch, end

    def training_step(self, model, batch):
        time.sleep(self.step)
        if self.compiling:
            torch.compile(torch.sin, backend=self.backend)(batch[0])
        return super().training_step(model, batch)

    def backend(self, graph, inputs):
        time.sleep(self.compiling)
        self.compiling = 0.0
        return graph.forward

    def evaluation_step(self, model, batch):
        time.sleep(self.batch)
        return super().evaluation_step(model, batch)

    def evaluation_end(self, model, metrics):
        time.sleep(self.end)
        return super().evaluation_end(model, metrics)

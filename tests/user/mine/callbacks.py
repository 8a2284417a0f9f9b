"""Callbacks that a user might write."""

import os
import sys
import threading

import torch

from mine.tasks import first
from runner.callbacks.base import Callback
from runner.errors import StorageError


class Place(Callback):
    """Writes down what it is told of the attempt."""

    def on_build(self, setup):
        print("place", "build", setup.attempt, setup.directory)

    def on_start(self, loop):
        print("place", "start", loop.attempt, loop.start_step, loop.directory)


class Pictures(Callback):
    """Logs each kind of value at every third step, and a text at every evaluation."""

    def on_step(self, loop):
        if loop.step % 3 == 0:
            weight = next(loop.state.model.parameters()).detach()
            loop.log("histogram", weight.flatten())
            loop.log("image", weight.sigmoid())
        if loop.evaluation is not None:
            loop.log("text", f"evaluated at {loop.step}")


class Plateau(Callback):
    """Doubles the weight decay after every bad evaluation, ends the training after so many, and draws their number."""

    def __init__(self, *, most):
        self.most = most
        self.best = float("inf")
        self.bad = 0

    def on_start(self, loop):
        self.look(loop)

    def on_step(self, loop):
        self.look(loop)
        loop.metrics = {**loop.metrics, "bad": loop.metrics["loss"].new_tensor(float(self.bad))}

    def look(self, loop):
        if loop.evaluation is None:
            return
        if loop.evaluation["val/loss"] < self.best:
            self.best = loop.evaluation["val/loss"]
            return
        self.bad += 1
        for group in loop.state.optimizer.param_groups:
            group["weight_decay"] *= 2
        if self.bad == self.most:
            loop.stop = "plateau"

    def state_dict(self):
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state):
        self.best, self.bad = state["best"], state["bad"]


class Recorder:
    """Not derived from Callback."""

    def on_step(self, loop):
        pass


class Stuck(Callback):
    """In one rank, never comes back from ``at``: its ``end``, or the ``load`` of its state. Not where the file ``once``
    is, which it makes.
    """

    def __init__(self, *, rank, at, once):
        self.at = at if os.environ.get("RANK") == str(rank) else None
        self.once = once

    def on_end(self, loop):
        self.maybe("end")

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        self.maybe("load")

    def maybe(self, at):
        if at == self.at and first(self.once):
            threading.Event().wait()


class Ends(Callback):
    """Ends the training after a step, or at the start of an attempt, whether it was evaluated or not."""

    def __init__(self, *, step):
        self.step = step

    def on_step(self, loop):
        if loop.step >= self.step:
            loop.stop = "enough"


class Numbers(Callback):
    """Draws the number of its process."""

    def on_step(self, loop):
        loop.metrics = {**loop.metrics, "rank": loop.metrics["loss"].new_tensor(float(os.environ.get("RANK", "0")))}


class Tells(Callback):
    """Prints every moment, and fails at one."""

    def __init__(self, *, fails=None):
        self.fails = fails

    def tell(self, moment):
        if moment == self.fails:
            raise RuntimeError("as asked")
        print("moment", moment, flush=True)


def teller(moment):
    return lambda self, *arguments: self.tell(moment)


for name in [name for name in vars(Callback) if name.startswith("on_")]:
    setattr(Tells, name, teller(name.removeprefix("on_")))


class FailsTwice(Callback):
    """Fails in a step, and again when it hears of that."""

    def on_step(self, loop):
        raise RuntimeError("the cause")

    def on_error(self, error):
        raise KeyError("another error")


class FailsToMirror(Callback):
    """Cannot copy the checkpoint of a step elsewhere, in one rank."""

    def __init__(self, *, step, rank=0):
        self.step = step if os.environ.get("RANK", "0") == str(rank) else None

    def on_commit(self, step):
        if step == self.step:
            raise StorageError("the mirror is full")


class Exits(Callback):
    """Calls sys.exit at a moment, or os._exit with a code."""

    def __init__(self, *, at, code=None):
        setattr(self, at, lambda *_: sys.exit("enough") if code is None else os._exit(code))


class Measures(Callback):
    """Adds a metric: a number, or a tensor of any shape."""

    def __init__(self, *, shape=None):
        self.value = 0.5 if shape is None else torch.ones(*shape)

    def on_step(self, loop):
        loop.metrics = {**loop.metrics, "mine": self.value}


class Nothing(Callback):
    """Trains on the first batch of the attempt alone, by gradients of zero."""

    batch = None

    def on_batch(self, loop, number, batch):
        self.batch = self.batch or batch
        return self.batch

    def on_gradients(self, state):
        for parameter in state.model.parameters():
            parameter.grad.zero_()


class StepCount(Callback):
    """Its state is how often ``on_step`` was called."""

    calls = 0

    def on_step(self, loop):
        self.calls += 1

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Saves(Callback):
    """Has step 3 committed before training continues."""

    def on_step(self, loop):
        loop.save = loop.step == 3


class Thread(Callback):
    """Starts a thread that never ends and is no daemon."""

    def on_start(self, loop):
        threading.Thread(target=threading.Event().wait, name="endless").start()

"""Experiments with one culprit and decoys beside it. ``mended`` fixes the culprit, as the printed remedy says.
The comment ``culprit`` marks the line that ``runner.verify`` has to name.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mine.broken import Counts
from runner.models.mlp import MLP
from runner.tasks.classification import Classification


class Decoys(Classification):
    """Counts much that no step reads, and scales its inputs by one sum that a step does read."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended
        self.calls = 0
        self.total = 0.0
        self.history = []
        self.zones = {}

    def training_step(self, model, batch):
        x, y = batch
        self.calls += 1
        self.history.append(self.calls)
        self.zones[self.calls % 5] = self.calls
        self.total += 0.01  # culprit
        return super().training_step(model, (x * (1 + self.total), y))

    def state_dict(self):
        return {"total": self.total} if self.mended else {}

    def load_state_dict(self, state):
        self.total = state.get("total", 0.0)


class Turns(Classification):
    """Goes round a cycle of scales."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended
        self.taken = 0
        self.scales = itertools.cycle([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])

    def training_step(self, model, batch):
        x, y = batch
        self.taken += 1
        return super().training_step(model, (x * next(self.scales), y))  # culprit

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]
        for _ in range(self.taken if self.mended else 0):
            next(self.scales)


class Sharpen(torch.autograd.Function):
    """Scales gradients by what its class holds."""

    strength = 1.0

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * Sharpen.strength


class Sharpens(MLP):
    """Changes an attribute of a class, which no object has."""

    def __init__(self, mended, **how):
        super().__init__(**how)
        self.mended = mended
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.steps += 1
            strength = 1 + 0.1 * float(self.steps) if self.mended else Sharpen.strength + 0.1
            Sharpen.strength = strength  # culprit
        return Sharpen.apply(super().forward(x))


class Listed(MLP):
    """Has layers in a plain list, and trains them by hand."""

    def __init__(self, mended, **how):
        super().__init__(**how)
        self.extra = nn.ModuleList([nn.Linear(3, 3)]) if mended else [nn.Linear(3, 3)]

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.extra[0].weight.mul_(0.9)  # culprit
        return self.extra[0](super().forward(x))


class Rustles(MLP):
    """Draws from a generator of its own."""

    def __init__(self, mended, **how):
        super().__init__(**how)
        self.mended = mended
        self.source = torch.Generator().manual_seed(3)

    def forward(self, x):
        noise = torch.randn(x.shape, generator=self.source) if self.training else 0.0  # culprit
        return super().forward(x + 0.1 * noise)

    def get_extra_state(self):
        return self.source.get_state() if self.mended else torch.zeros(1)

    def set_extra_state(self, state):
        if self.mended:
            self.source.set_state(state)


def doubled(x):
    return 2 * x


def plain(x):
    return x


class Ops:
    scale = staticmethod(plain)


class Exchanges(Counts):
    """Puts another function in the place of one, once."""

    def before(self, model, done):
        if done == 0 or self.mended:
            Ops.scale = staticmethod(doubled)  # culprit

    def training_step(self, model, batch):
        if self.mended:
            self.before(model, self.done)
        x, y = batch
        return super().training_step(model, (Ops.scale(x), y))


class Quiets(Counts):
    """Reads what numpy does with errors, which it changes once."""

    def before(self, model, done):
        if done == 0 or self.mended:
            np.seterr(divide="ignore")

    def training_step(self, model, batch):
        if self.mended:
            self.before(model, self.done)
        x, y = batch
        return super().training_step(model, (x * (2 if np.geterr()["divide"] == "ignore" else 1), y))


class Ties(Counts):
    """Makes one parameter of two while it trains."""

    def before(self, model, done):
        if done == 0 and not self.mended:
            model.layers[4].bias = model.layers[1].bias


class Grows(Counts):
    """Adds a layer in the fourth step."""

    def before(self, model, done):
        if done >= 3 and not self.mended and not hasattr(model, "late"):
            model.late = nn.Linear(2, 2)


class Leaves(Classification):
    """Adds up in a file that outlives every run."""

    def __init__(self, mended, folder):
        super().__init__()
        self.mended = mended
        self.file = Path(folder) / "leaves.txt"

    def training_step(self, model, batch):
        x, y = batch
        seen = 0
        if not self.mended:
            seen = len(self.file.read_text()) if self.file.exists() else 0
            with open(self.file, "a") as file:  # culprit
                file.write("x")
        return super().training_step(model, (x * (1 + seen / 100), y))


class Pids(Classification):
    """Reads the pid beside the clock, of which only the pid matters."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended

    def training_step(self, model, batch):
        x, y = batch
        return super().training_step(model, (x * (1 + (0 if self.mended else os.getpid() % 1000)), y))  # culprit

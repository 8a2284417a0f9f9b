"""Tasks that ask the system, or change the process or the model while they train. ``mended`` fixes them as
``runner.verify`` advises. The comment ``culprit`` marks the line that it has to name.
"""

import os
import secrets
import subprocess
import time
import uuid

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mine.corpus import Scaled

SOURCES = {
    "uuid": lambda: uuid.uuid4().int % 1000 / 100,  # culprit
    "secret": lambda: secrets.randbelow(1000) / 100,  # culprit
    "numpy": lambda: np.random.default_rng().random(),  # culprit
    "timer": lambda: time.perf_counter() % 10,  # culprit
    "numpy clock": lambda: int(np.datetime64("now").astype(int)) // 60 % 1000 / 100,  # culprit
    "pandas clock": lambda: int(pd.Timestamp.now().timestamp()) // 3600 % 1000 / 100,  # culprit
    "process": lambda: int(subprocess.check_output(["date", "+%N"])) % 1000 / 100,  # culprit
    "kernel": lambda: float(open("/proc/uptime").read().split()[0]) % 10,  # culprit
}


class Asks(Scaled):
    """Asks the system for a number."""

    def __init__(self, mended, source):
        super().__init__(mended)
        self.source = source

    def amount(self, x):
        return 1.0 if self.mended else SOURCES[self.source]()


class Ticks(Scaled):
    """Warms up for the first minute."""

    def __init__(self, mended):
        super().__init__(mended)
        self.begun = time.time()

    def amount(self, x):
        return 1 if self.mended or time.time() - self.begun < 60 else 2  # culprit


class Runs(Scaled):
    """Warms up for the first minute, by a timer."""

    def __init__(self, mended):
        super().__init__(mended)
        self.begun = time.perf_counter()

    def amount(self, x):
        return 1 if self.mended or time.perf_counter() - self.begun < 60 else 2  # culprit


class Later(Scaled):
    """Changes something in its third step; mended, in every step from there."""

    kept = ("done",)
    done = 0

    def training_step(self, model, batch):
        self.done += 1
        if self.done >= 3 if self.mended else self.done == 3:
            self.change(model)
        return super().training_step(model, batch)

    def amount(self, x):
        return 0

    def state_dict(self):
        return {"done": self.done}


class Hurries(Later):
    def change(self, model):
        torch.set_float32_matmul_precision("high")  # culprit

    def amount(self, x):
        return torch.get_float32_matmul_precision() == "high"


class Walks(Later):
    def change(self, model):
        os.chdir("/")  # culprit

    def amount(self, x):
        return len(os.getcwd()) == 1


class Freezes(Later):
    def change(self, model):
        model.layers[1].bias.requires_grad_(False)  # culprit


class Rests(Later):
    def change(self, model):
        model.layers[3].eval()  # culprit


class Drops(Later):
    """Has more dropout later on."""

    def change(self, model):
        model.layers[3].p = 0.5  # culprit


class Swaps(Later):
    def change(self, model):
        model.layers[2] = nn.GELU()  # culprit


class Marks(Later):
    """Writes a factor on a parameter."""

    factor = 0.0

    def change(self, model):
        model.layers[1].bias.factor = 1.0  # culprit

    def training_step(self, model, batch):
        metrics = super().training_step(model, batch)
        return {**metrics, "loss": metrics["loss"] * (1 + getattr(model.layers[1].bias, "factor", 0.0))}


class Hooks(Later):
    """Has gradients of a parameter doubled."""

    hooked = False

    def change(self, model):
        if not self.hooked:
            model.layers[1].bias.register_hook(lambda gradient: 2 * gradient)  # culprit
        self.hooked = True


class Normalizes(Later):
    """Has a parametrization added while it trains."""

    def change(self, model):
        if not self.mended:
            parametrizations.weight_norm(model.layers[1])  # culprit

"""Experiments that are right, and look as if they were not."""

import functools
import os
import random
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mine.data import Rows, row
from runner.callbacks.base import Callback
from runner.models.mlp import MLP
from runner.tasks.classification import Classification


class Reports(Classification):
    """Remembers much for its reports, which no step reads: times, counts, names, the process."""

    def __init__(self):
        super().__init__()
        self.begun, self.times, self.counts = time.time(), [], Counter()
        self.name = f"{uuid.uuid4()}-{os.getpid()}-{datetime.now()}-{hash('a')}"

    def training_step(self, model, batch):
        self.times.append(time.perf_counter())
        self.counts.update(batch[1].tolist())
        return super().training_step(model, batch)


class Files(Classification):
    """Writes temporary files, starts programs, lists folders."""

    def training_step(self, model, batch):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, str(uuid.uuid4())).write_text("x")
            scale = len(os.listdir(folder)) + len(subprocess.check_output(["echo", "abc"]))
        return super().training_step(model, (batch[0] * scale / 5, batch[1]))


class Threads(Classification):
    """Adds up in threads, in order."""

    def training_step(self, model, batch):
        with ThreadPoolExecutor(4) as pool:
            energy = sum(pool.map(lambda part: part.square().sum(), batch[0].split(1)))
        return super().training_step(model, (batch[0] * energy / 100, batch[1]))


class Sets(Classification):
    """Goes through sets, in order."""

    def training_step(self, model, batch):
        names = sorted({"a", "b", "c", "d"})
        return super().training_step(model, (batch[0] * (1 + names.index("c")), batch[1]))


class Steps(Classification):
    """Makes a generator anew in every step, from a count that it saves."""

    done = 0

    def training_step(self, model, batch):
        self.done += 1
        noise = torch.Generator().manual_seed(self.done)
        self.seen = noise  # kept, and never read
        return super().training_step(model, (batch[0] + torch.randn(8, generator=noise), batch[1]))

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Draws(Classification):
    """Draws from all global generators, also to evaluate, which moves the model, too."""

    def training_step(self, model, batch):
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return super().training_step(model, (batch[0] + noise, batch[1]))

    def evaluation_step(self, model, batch):
        model.train()
        return self.training_step(model, batch)


class Meter:
    """Adds up while it evaluates, and begins anew each time, as metrics of libraries do."""

    def __init__(self):
        self.total = torch.zeros(())
        self._updates = 0

    def update(self, value):
        self.total, self._updates = self.total + value, self._updates + 1

    def compute(self):
        mean = float(self.total / max(1, self._updates))
        self.__init__()
        return mean


class Meters(Classification):
    def __init__(self):
        super().__init__()
        self.meter = Meter()

    def evaluation_step(self, model, batch):
        metrics = super().evaluation_step(model, batch)
        self.meter.update(metrics["loss"])
        return metrics

    def evaluation_end(self, model, metrics):
        return {**metrics, "mean": self.meter.compute()}


class Norms(MLP):
    """Has normalisation of batches, weights and spectra, and masks that it makes when it needs them."""

    def __init__(self, **how):
        super().__init__(**how)
        self.norm, self.masks = nn.BatchNorm1d(8), {}
        self.mixed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.bounded = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x):
        if len(x) not in self.masks:
            self.masks[len(x)] = torch.ones(len(x), 1)
        return super().forward(self.bounded(self.mixed(self.norm(x))) * self.masks[len(x)])


@functools.lru_cache
def table(index):
    return row(index) * 2


class Caches(Rows):
    """Keeps what it has computed, which is the same each time."""

    def __init__(self, size):
        super().__init__(size)
        self.cache, self.hits = {}, 0

    def __getitem__(self, index):
        self.hits += index in self.cache
        value = self.cache.setdefault(index, table(index))
        return value + 0.1 * torch.randn(8), index % 3


class Alone(Rows):
    """Holds what no other process has, as a connection or a thread would be."""

    def __init__(self, size):
        super().__init__(size)
        self.pid = os.getpid()

    def __getitem__(self, index):
        if os.getpid() != self.pid:
            raise RuntimeError("not in a worker")
        return super().__getitem__(index)


class Saves(Callback):
    """Counts, and saves the count."""

    def __init__(self):
        self.seen, self.last = 0, None

    def on_step(self, loop):
        self.seen, self.last = self.seen + 1, time.time()
        for group in loop.state.optimizer.param_groups:
            group["weight_decay"] = self.seen / 100

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Transformer(nn.Module):
    """A model of transformers on numbers in place of words."""

    def __init__(self, **how):
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.bert = BertModel(BertConfig(vocab_size=4, **sizes))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.bert(inputs_embeds=x[:, None]).last_hidden_state[:, 0])


class Metrics(Meters):
    """Evaluates with torchmetrics."""

    def __init__(self):
        super().__init__()
        from torchmetrics import MeanMetric

        self.meter = MeanMetric()

    def evaluation_end(self, model, metrics):
        mean = float(self.meter.compute())
        self.meter.reset()
        return {**metrics, "mean": mean}


class Module(MLP):
    """A model that is a LightningModule."""

    def __new__(cls, **how):
        from lightning import LightningModule

        module = LightningModule()
        module.layers = MLP(**how)
        module.forward = module.layers.forward
        return module

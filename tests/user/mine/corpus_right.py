"""Experiments that are right, and look as if they were not."""

import functools
import gc
import multiprocessing
import os
import random
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

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


class Seconds(Classification):
    """Reports how fast it is."""

    def training_step(self, model, batch):
        begun = time.perf_counter()
        metrics = super().training_step(model, batch)
        return {**metrics, "rows_per_second": torch.tensor(len(batch[0]) / (time.perf_counter() - begun))}


class Occupies(Classification):
    """Reports the memory of its process, and measures it anew in each."""

    def training_step(self, model, batch):
        size = torch.tensor(float(Path("/proc/self/statm").read_text().split()[1]) + os.getpid())
        return {**super().training_step(model, batch), "memory": size}


class Standardizes(MLP):
    """Takes mean and scale from its first batch, into buffers."""

    def __init__(self, **how):
        super().__init__(**how)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scale", torch.zeros(8))

    def forward(self, x):
        if self.training and not self.scale.any():
            self.mean.copy_(x.detach().mean(0))
            self.scale.copy_(x.detach().std(0))
        return super().forward((x - self.mean) / self.scale)


class Streams(Classification):
    """Has a second loader, and saves how much it took."""

    taken, batches = 0, None

    def stream(self):
        for epoch in range(1000):
            order = torch.Generator().manual_seed(epoch)
            yield from DataLoader(TensorDataset(torch.arange(64.0)), 4, shuffle=True, generator=order)

    def training_step(self, model, batch):
        if self.batches is None:
            self.batches = self.stream()
            for _ in range(self.taken):
                next(self.batches)
        self.taken += 1
        return super().training_step(model, (batch[0] + next(self.batches)[0].mean(), batch[1]))

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Checks(Classification):
    """Goes on only with the same file."""

    def state_dict(self):
        return {"changed": os.stat(__file__).st_mtime}

    def load_state_dict(self, state):
        if state["changed"] != os.stat(__file__).st_mtime:
            raise RuntimeError("the file is another one")


class Collects(Classification):
    """Calls the garbage collector itself."""

    def training_step(self, model, batch):
        gc.disable()
        gc.collect()
        return super().training_step(model, batch)


class Pools(Classification):
    """Computes in processes of its own."""

    def __init__(self):
        super().__init__()
        self.pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))

    def training_step(self, model, batch):
        return super().training_step(model, (batch[0] * sum(self.pool.map(abs, range(4))), batch[1]))


class Opens(Rows):
    """Opens its file in each process at the first read."""

    file, pid = None, None

    def __getitem__(self, index):
        if self.pid != os.getpid():
            self.file, self.pid = open(__file__, "rb"), os.getpid()
        self.file.seek(index)
        return row(index) * ord(self.file.read(1)) / 100 + 0.1 * torch.randn(8), index % 3


class Follows(Callback):
    """Pulls weights to an average by torch, which is saved."""

    def on_build(self, setup):
        self.average = torch.optim.swa_utils.AveragedModel(setup.state.model)

    def on_update(self, loop):
        self.average.update_parameters(loop.state.model)
        with torch.no_grad():
            for mine, mean in zip(loop.state.model.parameters(), self.average.module.parameters(), strict=True):
                mine.lerp_(mean, 0.1)

    def state_dict(self):
        return {"average": self.average.state_dict()}

    def load_state_dict(self, state):
        self.average.load_state_dict(state["average"])

"""What users really get wrong: each of these trains well, and goes on otherwise after a resume. ``mended`` fixes it."""

import copy
import functools
import os
import random
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date, datetime
from pathlib import Path

import numpy as np
import torch

from mine.data import Rows, row
from runner.callbacks.base import Callback
from runner.models.mlp import MLP
from runner.tasks.classification import Classification


class Harder(Rows):
    """A curriculum: the noise grows with the samples that were drawn."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended
        self.drawn = 0

    def __getitem__(self, index):
        self.drawn += 1
        level = index % 4 if self.mended else self.drawn // 100
        return row(index) + 0.1 * level * torch.randn(8), index % 3


class Cached(Rows):
    """Keeps the first augmentation that it draws for every tenth sample."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended
        self.cache = {}

    def __getitem__(self, index):
        found = self.cache.get(index)
        if found is None:
            found = row(index) + 0.1 * torch.randn(8)
        if index % 10 == 5 and not self.mended:
            self.cache[index] = found
        return found, index % 3


@functools.lru_cache
def noise(index):
    """Drawn once for every sample."""
    return 0.1 * torch.randn(8)


class Memoized(Rows):
    """Has every tenth sample's noise from a function that remembers it."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended

    def __getitem__(self, index):
        fixed = index % 10 == 5 and not self.mended
        return row(index) + (noise(index) if fixed else noise.__wrapped__(index)), index % 3


class Hidden(Rows):
    """Draws from a generator of its own."""

    def __init__(self, size, mended, seed=0):
        super().__init__(size)
        self.mended = mended
        self.generator = np.random.default_rng(seed)

    def __getitem__(self, index):
        noise = np.random.standard_normal() if self.mended else self.generator.standard_normal()
        return row(index) + float(noise), index % 3


class Unseeded(Hidden):
    """Draws from a generator that nobody seeded."""

    def __init__(self, size, mended):
        super().__init__(size, mended)
        self.generator = random.Random()

    def __getitem__(self, index):
        noise = random.gauss(0, 1) if self.mended else self.generator.gauss(0, 1)
        return row(index) + noise, index % 3


class Remembers(Classification):
    """A task that smooths labels the more, the more it has seen."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended
        self.seen = 0

    def training_step(self, model, batch):
        self.seen += 1
        self.label_smoothing = min(0.5, self.seen / 100)
        return super().training_step(model, batch)

    def state_dict(self):
        return {"seen": self.seen} if self.mended else {}

    def load_state_dict(self, state):
        self.seen = state.get("seen", 0)


class Decays(torch.optim.lr_scheduler.LRScheduler):
    """Lowers the rate by a factor of its own; its state has the rest."""

    def __init__(self, optimizer, mended):
        self.mended = mended
        self.factor = 1.0
        super().__init__(optimizer)

    def get_lr(self):
        self.factor *= 0.98
        return [rate * self.factor for rate in self.base_lrs]

    def state_dict(self):
        state = super().state_dict()
        return state if self.mended else {key: value for key, value in state.items() if key != "factor"}


class Noisy(Classification):
    """Adds noise to what the model gets; the amount depends on ``source``."""

    def __init__(self, mended, source):
        super().__init__()
        self.mended = mended
        self.source = source

    def training_step(self, model, batch):
        x, y = batch
        return super().training_step(model, (x + 0.01 * self.amount(), y))

    def amount(self):
        if self.mended:
            return 1.0
        if self.source == "hash":
            return hash("noise") % 1000 / 100
        return ["a", "b", "c", "d", "e", "f", "g", "h"].index(next(iter(set("abcdefgh"))))


class Weighs(Callback):
    """Lets weights decay more with every evaluation."""

    def __init__(self):
        self.seen = 0

    def on_step(self, loop):
        self.seen += loop.evaluation is not None
        for group in loop.state.optimizer.param_groups:
            group["weight_decay"] = self.seen / 10

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Scatters(Classification):
    """Writes with a kernel that has no order."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended

    def training_step(self, model, batch):
        x, y = batch
        if not self.mended:
            x = x.clone().put_(torch.tensor([0, 0]), torch.tensor([0.0, 1.0]))
        return super().training_step(model, (x, y))


class Arrives(Classification):
    """Scales by an energy that threads add up in the order in which they are done."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended

    def training_step(self, model, batch):
        x, y = batch
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(torch.sum, part * part) for part in x.flatten().split(1)]
            energy = sum(job.result() for job in (jobs if self.mended else as_completed(jobs)))
        return super().training_step(model, (x * (energy / x.numel()), y))


class Counts(Classification):
    """Knows how many steps were done, also after a resume."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended
        self.done = 0

    def training_step(self, model, batch):
        self.before(model, self.done)
        self.done += 1
        return super().training_step(model, batch)

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Declares(Counts):
    """Says in the environment, in the first step of all, how much louder losses are."""

    def before(self, model, done):
        if done == 0 or self.mended:
            os.environ["LOUDER"] = "0.5"

    def training_step(self, model, batch):
        metrics = super().training_step(model, batch)
        return {**metrics, "loss": metrics["loss"] * (1 + float(os.environ.get("LOUDER", "0")))}


class Gathers(Counts):
    """Moves the weights in every other step, by the gradients of two."""

    def before(self, model, done):
        pass

    def optimization_step(self, model, micro_batches, update):
        for _, batch in micro_batches:
            metrics = self.training_step(model, batch)
            update.backward(metrics["loss"] / 2)
        if self.mended or self.done % 2 == 0:
            update.step(metrics["loss"])
        return {name: value.detach() for name, value in metrics.items()}


class Teaches(Classification):
    """Learns from an average of its own weights."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended
        self.teacher = None

    def training_step(self, model, batch):
        self.teacher = self.teacher or copy.deepcopy(model).requires_grad_(False)
        for mean, weight in zip(self.teacher.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight.detach(), 0.1)
        metrics = super().training_step(model, batch)
        apart = (self.teacher(batch[0]) - model(batch[0])).square().mean()
        return {**metrics, "loss": metrics["loss"] + apart}

    def state_dict(self):
        return {"teacher": self.teacher and self.teacher.state_dict()} if self.mended else {}

    def load_state_dict(self, state):
        if state.get("teacher"):
            from runner.models.mlp import MLP

            self.teacher = MLP(inputs=8, hidden=[16], outputs=3, dropout=0.1).requires_grad_(False)
            self.teacher.load_state_dict(state["teacher"])


class Anchors(Counts):
    """From the tenth step on, looks back at the loss of that step."""

    def __init__(self, mended):
        super().__init__(mended)
        self.anchor = 0.0

    def before(self, model, done):
        pass

    def training_step(self, model, batch):
        metrics = super().training_step(model, batch)
        if self.done == 10:
            self.anchor = float(metrics["loss"].detach())
        return {**metrics, "loss": metrics["loss"] * (1 + self.anchor)}

    def state_dict(self):
        return {"done": self.done, "anchor": self.anchor} if self.mended else {"done": self.done}

    def load_state_dict(self, state):
        self.done, self.anchor = state["done"], state.get("anchor", 0.0)


def louder(module, inputs, output):
    return 1.1 * output


class Hooks(Counts):
    """Has the model's output made louder from the eleventh step on."""

    hooked = False

    def before(self, model, done):
        if done == 10 or (self.mended and done > 10 and not self.hooked):
            self.hooked = True
            model.register_forward_hook(louder)


class Rivals(Classification):
    """Is judged by a net of its own, which has an optimizer of its own."""

    def __init__(self, mended):
        self.label_smoothing = 0.0
        self.mended = mended
        self.rival = MLP(inputs=8, hidden=[4], outputs=3, dropout=0.0)
        self.optimizer = torch.optim.Adam(self.rival.parameters(), lr=0.01)

    def training_step(self, model, batch):
        metrics = super().training_step(model, batch)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            rival = super().training_step(self.rival, batch)["loss"]
        rival.backward()
        self.optimizer.step()
        return {**metrics, "loss": metrics["loss"] * (1 + rival.detach())}

    def evaluation_step(self, model, batch):
        return super().training_step(model, batch)

    def state_dict(self):
        state = {"rival": self.rival.state_dict()}
        return {**state, "optimizer": self.optimizer.state_dict()} if self.mended else state

    def load_state_dict(self, state):
        self.rival.load_state_dict(state["rival"])
        if self.mended:
            self.optimizer.load_state_dict(state["optimizer"])


class Loses(Callback):
    """Loses patience after the fifth evaluation."""

    def __init__(self, mended):
        self.mended = mended
        self.seen = 0

    def on_step(self, loop):
        self.seen += loop.evaluation is not None
        if self.seen == 5:
            loop.stop = "no patience"

    def state_dict(self):
        return {"seen": self.seen} if self.mended else {}

    def load_state_dict(self, state):
        self.seen = state.get("seen", 0)


class Waits(Counts):
    """Would be louder from the thousandth step on, which it counts anew in every process."""

    seen = 0

    def before(self, model, done):
        self.seen += 1
        self.label_smoothing = 0.1 if self.seen > 1000 else 0.0


class Daily(Rows):
    """Shows other samples every day: read in data workers, too."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended

    def __getitem__(self, index):
        return row(index) * (1 + self.day() / 1e4), index % 3

    def day(self):
        return 1 if self.mended else date.today().toordinal() % 1000


class Dated(Classification):
    """Smooths labels by the hour of the day."""

    def __init__(self, mended):
        super().__init__()
        self.mended = mended

    def training_step(self, model, batch):
        self.label_smoothing = 0.1 if self.mended else datetime.now().hour / 100
        return super().training_step(model, batch)


class Locks(Classification):
    """Waits for a file to go away, which it makes, and would remove at the end."""

    def __init__(self, mended):
        super().__init__()
        from hydra.core.hydra_config import HydraConfig

        file = Path(HydraConfig.get().runtime.output_dir) / "lock"
        self.locked = file.exists() and not mended
        file.touch()

    def training_step(self, model, batch):
        if self.locked:
            threading.Event().wait()
        return super().training_step(model, batch)


class Litters(Classification):
    """Leaves a temporary file, and a process in a session of its own, whose argument is the folder of the file."""

    def __init__(self):
        super().__init__()
        folder = tempfile.mkdtemp()
        program = "import sys, time; time.sleep(1000)"
        subprocess.Popen(["python3", "-S", "-c", program, folder], start_new_session=True)

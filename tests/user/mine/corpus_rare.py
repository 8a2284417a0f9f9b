"""Rare forms of memory outside of a state, and of inputs that another start may read otherwise. ``mended`` fixes them
as ``runner.verify`` advises. ``late`` forms have no effect within a proof, which then has to note them. The comment
``culprit`` marks the line that it has to name.
"""

import gc
import os
import sys
import weakref
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate, get_worker_info

from mine.corpus import Counted, Scaled
from mine.corpus_process import Later
from mine.data import Rows, row
from runner.callbacks.base import Callback
from runner.models.mlp import MLP


class Labelled(Counted):
    """Counts in a class of torch."""

    late = False

    def elsewhere(self):
        nn.Linear.calls = getattr(nn.Linear, "calls", 0) + 1  # culprit
        return nn.Linear.calls // 1000 if self.late else nn.Linear.calls


class LabelledLate(Labelled):
    late = True


class Loads(Scaled):
    """Has a second loader, whose position is not saved; mended, it is opened anew in every step."""

    kept = ("done",)
    done = 0

    def __init__(self, mended):
        super().__init__(mended)
        self.batches = self.load(0)

    def load(self, seed):
        data = TensorDataset(torch.arange(64.0))
        return iter(DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(seed)))

    def amount(self, x):
        self.done += 1
        return next(self.load(self.done) if self.mended else self.batches)[0].mean()  # culprit


def louder(module, inputs, output):
    return 1.1 * output if isinstance(module, nn.Linear) else None


class Overhears(Later):
    """Has a hook of all modules; mended, it has none."""

    def change(self, model):
        if not self.mended:
            nn.modules.module.register_module_forward_hook(louder)  # culprit


class Flushes(Later):
    def change(self, model):
        torch.set_flush_denormal(True)  # culprit

    def amount(self, x):
        return torch.tensor(1e-40) * 1e38 * 100


class Judges(Scaled):
    """Is judged by a net of its own, which moves by the gradients of two steps; mended, these are saved."""

    def __init__(self, mended):
        super().__init__(mended)
        self.done, self.judge = 0, MLP(inputs=8, hidden=[4], outputs=3, dropout=0.0)
        self.optimizer = torch.optim.SGD(self.judge.parameters(), lr=0.5)

    def training_step(self, model, batch):
        self.done += 1
        with torch.enable_grad():
            loss = F.cross_entropy(self.judge(batch[0]), batch[1])
        loss.backward()  # culprit
        if self.done % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        metrics = super().training_step(model, batch)
        return {**metrics, "loss": metrics["loss"] * (1 + loss.detach())}

    def amount(self, x):
        return 0

    def state_dict(self):
        gradients = {name: each.grad for name, each in self.judge.named_parameters() if each.grad is not None}
        state = {"done": self.done, "judge": self.judge.state_dict(), "gradients": gradients if self.mended else {}}
        return {**state, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.done = state["done"]
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in self.judge.named_parameters():
            parameter.grad = state["gradients"].get(name)


class Recents(Scaled):
    """Has a table whose order matters, and saves it in another; mended, in this."""

    def __init__(self, mended):
        super().__init__(mended)
        self.recent = {str(number): 1.0 + number for number in range(4)}

    def amount(self, x):
        name = str(int(x.sum().abs() * 10) % 4)
        self.recent[name] = self.recent.pop(name)  # culprit
        return next(iter(self.recent.values()))

    def state_dict(self):
        names = [*self.recent] if self.mended else sorted(self.recent)
        return {"recent": [[name, self.recent[name]] for name in names]}

    def load_state_dict(self, state):
        self.recent = dict(state["recent"])


class Becomes(Later):
    """Has a layer of another class."""

    def change(self, model):
        model.layers[2].__class__ = nn.Tanh  # culprit


class Flags(Later):
    def change(self, model):
        sys.loud = 1  # culprit

    def amount(self, x):
        return getattr(sys, "loud", 0)


class Stores(Counted):
    """Counts in a file of the run, which counts steps twice that are done again."""

    late = False

    def __init__(self, mended):
        super().__init__(mended)
        from hydra.core.hydra_config import HydraConfig

        self.file = Path(HydraConfig.get().runtime.output_dir, "count.txt")

    def elsewhere(self):
        count = int(self.file.read_text()) if self.file.exists() else 0
        self.file.write_text(str(count + 1))  # culprit
        return count // 1000 if self.late else count


class StoresLate(Stores):
    late = True


class Slows(Callback):
    """Changes weight decay after ten minutes of training; mended, never."""

    def __init__(self, mended):
        self.mended = mended

    def on_step(self, loop):
        for group in loop.state.optimizer.param_groups:
            group["weight_decay"] = 0.5 if loop.elapsed > 600 and not self.mended else 0.0


class Collates:
    """Adds noise with every batch; mended, none."""

    def __init__(self, mended):
        self.mended, self.batches = mended, 0

    def __call__(self, rows):
        self.batches += 1  # culprit
        x, y = default_collate(rows)
        return x * (1 + (0 if self.mended else self.batches) / 10), y


class Node:
    def __init__(self, nodes):
        self.itself = self
        nodes.add(self)


class Counts(Scaled):
    """Counts nodes that live until the garbage collector comes; mended, none."""

    def __init__(self, mended):
        super().__init__(mended)
        self.nodes = weakref.WeakSet()  # culprit

    def amount(self, x):
        for _ in range(0 if self.mended else 100):
            Node(self.nodes)
        return len(self.nodes)


class Collects(Scaled):
    """Reads how much the garbage collector has to do; mended, not."""

    def amount(self, x):
        return 0 if self.mended else gc.get_count()[0] % 10  # culprit


class Grows(Rows):
    """Augments more when a data worker has read much."""

    read = 0

    def __getitem__(self, index):
        if get_worker_info() is not None:
            self.read += 1
        return row(index) * (1 + self.read // 1000), index % 3


# What another start may read otherwise, and no step of a proof tells apart.
class Reads(Scaled):
    """Reads a folder in the order in which the system lists it."""

    def amount(self, x):
        return os.listdir(Path(__file__).parent).index(Path(__file__).name) < 0

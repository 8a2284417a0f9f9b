"""Models, optimizers, schedulers, callbacks and data that remember something outside of their state. ``mended`` fixes
it as ``runner.verify`` advises. The comment ``culprit`` marks the line that it has to name.
"""

import os
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import get_worker_info

from mine.data import Rows, row
from runner.callbacks.base import Callback
from runner.models.mlp import MLP


class Net(MLP):
    def __init__(self, mended, **how):
        super().__init__(**how)
        self.mended = mended


class Centres(Net):
    """Centres by its first batch."""

    def __init__(self, mended, **how):
        super().__init__(mended, **how)
        if mended:
            self.register_buffer("centre", torch.full((8,), torch.nan))
        else:
            self.centre = None

    def forward(self, x):
        if self.training and (self.centre is None or self.centre.isnan().any()):
            self.centre = x.detach().mean(0)  # culprit
        return super().forward(x - (0 if self.centre is None else self.centre.nan_to_num()))


class Codes(Net):
    """Has a code book that follows its inputs."""

    def __init__(self, mended, **how):
        super().__init__(mended, **how)
        if mended:
            self.register_buffer("codes", torch.zeros(8))
        else:
            self.codes = torch.zeros(8)

    def forward(self, x):
        if self.training:
            self.codes.lerp_(x.detach().mean(0), 0.1)  # culprit
        return super().forward(x + self.codes)


class Recalls(Net):
    """Has a hidden state that goes from batch to batch."""

    def __init__(self, mended, **how):
        super().__init__(mended, **how)
        self.cell = nn.GRUCell(8, 8)
        self.register_buffer("hidden", torch.zeros(1, 8), persistent=mended)

    def forward(self, x):
        hidden = self.cell(x.mean(0, keepdim=True), self.hidden)
        if self.training:
            self.hidden = hidden.detach()  # culprit
        return super().forward(x + hidden)


class Skips(Net):
    """Skips its noise by dice of its own."""

    def __init__(self, mended, **how):
        super().__init__(mended, **how)
        self.dice = random.Random(3)

    def forward(self, x):
        return super().forward(x + self.dice.random() if self.training else x)  # culprit

    def get_extra_state(self):
        version, numbers, gauss = self.dice.getstate()
        return [version, [*numbers], gauss] if self.mended else []

    def set_extra_state(self, state):
        if state:
            self.dice.setstate((state[0], tuple(state[1]), state[2]))


class Omits(Net):
    """Leaves a parameter out of its state."""

    def __init__(self, mended, **how):
        super().__init__(mended, **how)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x * self.gain)  # culprit

    def state_dict(self, *arguments, **keywords):
        state = super().state_dict(*arguments, **keywords)
        if not self.mended:
            del state["gain"]
        return state

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict(state, strict=False)


class Keeps(Net):
    """Does not take over the last bias."""

    def load_state_dict(self, state, strict=True, assign=False):  # culprit
        taken = {name: value for name, value in state.items() if self.mended or name != "layers.4.bias"}
        return super().load_state_dict(taken, strict=False)  # culprit


class Looks(torch.optim.SGD):
    """Returns half of the way to slow weights in every second step."""

    def __init__(self, params, mended, lr):
        super().__init__(params, lr=lr)
        self.mended = mended
        self.turn = 0

    def step(self, closure=None):
        self.turn += 1  # culprit
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.turn % 2:
                    parameter.grad = parameter.grad / 2
        return super().step(closure)

    def state_dict(self):
        state = super().state_dict()
        return {**state, "turn": self.turn} if self.mended else state

    def load_state_dict(self, state):
        self.turn = state.get("turn", 0)
        super().load_state_dict({name: value for name, value in state.items() if name != "turn"})


class Clips(torch.optim.SGD):
    """Clips by the norms that all its objects have seen."""

    norms = []  # noqa: RUF012

    def __init__(self, params, mended, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups if mended else []:
            group["norms"] = []

    def step(self, closure=None):
        group = self.param_groups[0]
        norms = group.get("norms", Clips.norms)
        norms.append(float(group["params"][0].grad.norm()))  # culprit
        for parameter in group["params"]:
            parameter.grad = parameter.grad / (1 + sum(norms))
        return super().step(closure)


def staircase(optimizer, mended):
    """Goes down with every call."""
    calls = 0

    def factor(epoch):
        nonlocal calls
        calls += 1  # culprit
        return 0.9**epoch if mended else 0.9**calls

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Begins(torch.optim.lr_scheduler.LinearLR):
    """Begins again when it is loaded."""

    def __init__(self, optimizer, mended):
        self.mended = mended
        super().__init__(optimizer, total_iters=20)

    def load_state_dict(self, state):
        super().load_state_dict(state if self.mended else {**state, "last_epoch": 0})  # culprit


class Saved(Callback):
    """Mended, it saves its attributes ``kept``."""

    kept = ()

    def __init__(self, mended):
        self.mended = mended

    def state_dict(self):
        return {name: getattr(self, name) for name in self.kept} if self.mended else {}

    def load_state_dict(self, state):
        vars(self).update(state)


class Cools(Saved):
    """Lowers weight decay with every evaluation that is no better."""

    kept = ("lows",)

    def __init__(self, mended):
        super().__init__(mended)
        self.lows = []

    def on_step(self, loop):
        if loop.evaluation:
            self.lows.append(loop.objective)  # culprit
        for group in loop.state.optimizer.param_groups:
            group["weight_decay"] = len(self.lows) / 10

    def state_dict(self):
        return {"lows": [*self.lows]} if self.mended else {}


class Pulls(Saved):
    """Pulls weights to their average."""

    kept = ("average",)
    average = None

    def on_update(self, loop):
        weight = loop.state.model.layers[1].weight
        before = weight.detach() if self.average is None else self.average
        self.average = before.lerp(weight.detach(), 0.1)  # culprit
        with torch.no_grad():
            weight.lerp_(self.average, 0.1)


class Jitters(Saved):
    """Adds noise from a generator of its own to gradients."""

    def __init__(self, mended):
        super().__init__(mended)
        self.source = torch.Generator().manual_seed(5)

    def on_gradients(self, state):
        for parameter in state.model.parameters():
            parameter.grad += 0.01 * torch.randn(parameter.shape, generator=self.source)  # culprit

    def state_dict(self):
        return {"source": self.source.get_state()} if self.mended else {}

    def load_state_dict(self, state):
        if state:
            self.source.set_state(state["source"])


class Greets(Saved):
    """Draws when an attempt starts."""

    def on_start(self, loop):
        if not self.mended:
            torch.rand(())  # culprit


class Folds(Callback):
    """Adds a param group while it trains."""

    def __init__(self, mended):
        self.mended = mended
        self.more = nn.Parameter(torch.ones(1))

    def on_step_start(self, loop):
        groups = loop.state.optimizer.param_groups
        if loop.step == 2 and not self.mended:
            loop.state.optimizer.add_param_group({"params": [self.more]})
        assert groups


class Sums(Rows):
    """Centres samples by the mean of all that were drawn."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended
        self.sums = np.zeros(8)

    def __getitem__(self, index):
        sample = row(index)
        if not self.mended:
            self.sums += sample.numpy()  # culprit
        return sample - torch.from_numpy(self.sums).float() / 100, index % 3


class Alters(Rows):
    """Adds noise to the rows that it holds."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended
        self.rows = torch.stack([row(index) for index in range(size)])

    def __getitem__(self, index):
        if self.mended:
            return self.rows[index] + 0.1 * torch.randn(8), index % 3
        self.rows[index] += 0.1 * torch.randn(8)  # culprit
        return self.rows[index].clone(), index % 3


RANDOM = np.random.RandomState(0)


class Global(Rows):
    """Draws from a generator of its module."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended

    def __getitem__(self, index):
        noise = np.random.standard_normal() if self.mended else RANDOM.standard_normal()  # culprit
        return row(index) + float(noise), index % 3


class Workers(Rows):
    """Has the number of its worker in a sample."""

    def __init__(self, size, mended):
        super().__init__(size)
        self.mended = mended

    def __getitem__(self, index):
        worker = get_worker_info()  # culprit
        return row(index) + (0 if self.mended or worker is None else 1 + worker.id), index % 3


class Pids(Workers):
    """Has the number of its process in a sample."""

    def __getitem__(self, index):
        return row(index) + (0 if self.mended else os.getpid() % 100), index % 3  # culprit

"""Parts that researchers write: optimizers with closures, models that compile themselves, other heads."""

import os

import torch
from torch import nn

from runner.models.mlp import MLP
from runner.tasks.classification import Classification


class Closure(Classification):
    """Calls the optimizer with a closure, as LBFGS needs it."""

    def optimization_step(self, model, micro_batches, update):
        batches = [batch for _, batch in micro_batches]
        losses = []

        def closure():
            update.optimizer.zero_grad()
            loss = sum(self.training_step(model, batch)["loss"] for batch in batches) / len(batches)
            loss.backward()
            losses.append(loss.detach())
            return loss

        update.optimizer.step(closure)
        return {"loss": losses[0]}


class Compiled(MLP):
    """Compiles its own layers, unless the environment has EAGER: their weights get another prefix."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        if not os.environ.get("EAGER"):
            self.layers = torch.compile(self.layers, backend="eager")


class OtherHead(MLP):
    """Has one more layer at its end."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.head = nn.Linear(10, 10)

    def forward(self, images):
        return self.head(super().forward(images))


class NoRates:
    """A scheduler without ``get_last_lr``."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.steps = 0

    def step(self):
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.steps)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

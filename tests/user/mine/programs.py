"""Parts that researchers write: optimizers with closures, models that compile themselves, other heads."""

import os

import torch
from torch import nn

from runner.models.mlp import MLP
from runner.task import Task
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


class StepAlone(Classification):
    """Has a step of its own and no ``training_step``."""

    training_step = Task.training_step

    def optimization_step(self, model, micro_batches, update):
        total = 0.0
        for share, (images, labels) in micro_batches:
            loss = nn.functional.cross_entropy(model(images), labels) * share
            update.backward(loss)
            total = total + loss.detach()
        update.step(total)
        return {"loss": total}


class Outer(torch.optim.SGD):
    """An optimizer with another inside, as that of SAM."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.inner = torch.optim.SGD(self.param_groups, lr)

    def last_step(self):
        self.inner.step()


class OuterStep(Classification):
    """Steps the inner optimizer."""

    def optimization_step(self, model, micro_batches, update):
        [(_, batch)] = micro_batches
        loss = self.training_step(model, batch)["loss"]
        update.backward(loss)
        update.optimizer.last_step()
        update.optimizer.zero_grad()
        return {"loss": loss.detach()}


class Collator:
    """Makes batches as an object, as collators of transformers do."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, samples):
        images, labels = torch.utils.data.default_collate(samples)
        return images * self.scale, labels


def exported():
    """What torch.export makes of a network, which cannot be trained."""
    pixels = {0: torch.export.Dim("batch")}
    return torch.export.export(
        MLP(inputs=64, hidden=[8], outputs=10), (torch.zeros(2, 64),), dynamic_shapes=(pixels,)
    ).module()

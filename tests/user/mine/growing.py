"""State that training gives another structure than the one that was built."""

import torch
from torch import nn

from runner.models.mlp import MLP
from runner.tasks.classification import Classification


class Remembers(MLP):
    """Keeps features of every step in a buffer that grows, and from the third step on a mean that was None before."""

    def __init__(self, **how):
        super().__init__(**how)
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("mean", None)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.seen = torch.cat([self.seen, x.detach().mean().reshape(1)])
            if len(self.seen) > 2:
                self.mean = self.seen.double().mean()
        return super().forward(x if self.mean is None else x - self.mean.float())


class Lazy(MLP):
    """Makes a layer by hand when it first sees data."""

    def __init__(self, **how):
        super().__init__(**how)
        self.extra = None

    def forward(self, x):
        if self.extra is None:
            self.make(x.flatten(1).shape[1])
        return super().forward(x.flatten(1) + self.extra(x.flatten(1)))

    def make(self, size):
        torch.manual_seed(3)
        self.extra = nn.Linear(size, size)


class Makes(Lazy):
    """Makes that layer also when a state has it."""

    def _load_from_state_dict(self, state, prefix, *rest):
        if self.extra is None and f"{prefix}extra.bias" in state:
            self.make(len(state[f"{prefix}extra.bias"]))
        super()._load_from_state_dict(state, prefix, *rest)


def some(named, names, **how):
    """An optimizer of the weights whose names begin so; without their names."""
    return torch.optim.AdamW([p for name, p in named if name.startswith(tuple(names))], **how)


class Changes(Classification):
    """Does ``what`` to the optimizer or the model before the step ``at``."""

    def __init__(self, *, what, at=6):
        super().__init__()
        self.what, self.at, self.steps = what, at, 0
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, model, batch):
        metrics = super().training_step(model, batch)
        return {**metrics, "loss": metrics["loss"] * self.scale.mean()}

    def optimization_step(self, model, micro_batches, update):
        self.scale.grad = None  # until the optimizer has it, nobody else does
        if self.steps == self.at:
            getattr(self, self.what)(model, update)
        self.steps += 1
        return super().optimization_step(model, micro_batches, update)

    def state_dict(self):
        more = {"more": torch.ones(2)} if self.steps > self.at else {}
        return {"steps": self.steps, "scale": self.scale.detach(), **more}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        with torch.no_grad():
            self.scale.copy_(state["scale"])

    def nothing(self, model, update):
        """Only its own state gets a new key."""

    def add(self, model, update):
        first = [p for name, p in model.named_parameters() if name.startswith("layers.1")]
        update.optimizer.add_param_group({"params": first, "lr": 1e-3, "mark": 7})

    def add_own(self, model, update):
        update.optimizer.add_param_group({"params": [self.scale], "lr": 1e-2})

    def add_foreign(self, model, update):
        update.optimizer.add_param_group({"params": [("own", nn.Parameter(torch.ones(5)))]})

    def remove(self, model, update):
        group = update.optimizer.param_groups[0]
        update.optimizer.state.pop(group["params"].pop(0), None)

    def replace(self, model, update):
        update.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def widen(self, model, update):
        model.layers[4] = nn.Linear(64, 12)
        update.optimizer.param_groups[0]["params"] = [*model.parameters()]

    def untie(self, model, update):
        """The optimizer continues with what the model no longer has."""
        model.layers[4].weight = nn.Parameter(model.layers[4].weight.detach().clone())

    def spoil(self, model, update):
        """This step's gradient is NaN, and its loss is not."""
        handle = next(iter(model.parameters())).register_hook(lambda gradient: handle.remove() or gradient * torch.nan)

    def move(self, model, update):
        """A weight gets a group of its own."""
        group = update.optimizer.param_groups[0]
        name, weight = group["param_names"].pop(0), group["params"].pop(0)
        update.optimizer.add_param_group({"params": [(name, weight)], "lr": 1e-3, "weight_decay": 0.5})

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
        return super().forward(x - (0 if self.mean is None else self.mean).float() if self.mean is not None else x)


class Lazy(MLP):
    """Makes a layer by hand when it first sees data."""

    extra: nn.Module | None = None

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
        if self.steps == self.at:
            getattr(self, self.what)(model, update)
        self.steps += 1
        if self.what == "spoil" and self.steps > self.at:
            next(iter(model.parameters())).register_hook(lambda gradient: gradient * torch.nan)
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
        first = [p for name, p in model.named_parameters() if not name.startswith("layers.2")]
        update.optimizer.add_param_group({"params": first, "lr": 1e-3, "mark": 7})

    def add_own(self, model, update):
        update.optimizer.add_param_group({"params": [self.scale], "lr": 1e-2})

    def add_foreign(self, model, update):
        update.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})

    def remove(self, model, update):
        group = update.optimizer.param_groups[0]
        update.optimizer.state.pop(group["params"].pop(0), None)

    def replace(self, model, update):
        update.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def half(self, model, update):
        model.to(torch.bfloat16).to(torch.float64)

    def spoil(self, model, update):
        """From now on the first weight has NaN for a gradient."""

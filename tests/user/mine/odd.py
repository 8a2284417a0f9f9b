"""What torch or a user keeps in an odd way, each of which was once lost by a checkpoint without a word."""

from collections import Counter, OrderedDict

import torch
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, SequentialLR

from runner.callbacks.base import Callback
from runner.models.mlp import MLP
from runner.tasks.classification import Classification


class Migrates(MLP):
    """Squares a scale that an older version of itself saved, counts in a state that is no tensor, and has weights that
    nobody trains.
    """

    _version = 2

    def __init__(self, **how):
        super().__init__(**how)
        self.scale = torch.nn.Parameter(torch.full((1,), 1.1))
        self.idle = torch.nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * self.scale * (1 + self.calls / 100) * self.idle

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}scale"] = state[f"{prefix}scale"] ** 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Centres(MLP):
    """Takes a running mean of what it sees from it, and has another tensor for it after every step."""

    def __init__(self, inputs, **how):
        super().__init__(inputs=inputs, **how)
        self.register_buffer("mean", torch.zeros(2 * inputs)[::2])

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x - self.mean)


class Shared(MLP):
    """Has a saved buffer whose elements are all the same bytes."""

    def __init__(self, inputs, **how):
        super().__init__(inputs=inputs, **how)
        self.register_buffer("mean", torch.zeros(1).expand(inputs))


class Normed(MLP):
    """Takes running averages of what it sees from it, as a batch norm does."""

    def __init__(self, inputs, **how):
        super().__init__(inputs=inputs, **how)
        self.norm = torch.nn.BatchNorm1d(inputs)

    def forward(self, x):
        return super().forward(self.norm(x.flatten(1)))


class Rotates(MLP):
    """Has complex numbers, as of rotary positions."""

    def __init__(self, inputs, **how):
        super().__init__(inputs=inputs, **how)
        self.register_buffer("turns", torch.ones(4, dtype=torch.complex64))


class Wide(torch.optim.Optimizer):
    """Keeps its moments in double precision, and its rate in a tensor."""

    def __init__(self, named, lr):
        super().__init__([p for name, p in named if "idle" not in name], {"lr": torch.tensor(lr)})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                kept = self.state[weight]
                if not kept:
                    kept["moments"] = [torch.zeros_like(weight, dtype=torch.float64)]
                kept["moments"][0].mul_(0.9).add_(weight.grad.double())
                weight.sub_(group["lr"] * kept["moments"][0])


class Decays(torch.optim.SGD):
    """Lets weights decay at a rate of its own, also where it is told to learn at a rate of zero."""

    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.detach().mul_(0.99)
        super().step()


def in_stages(optimizer):
    """Linear, then in steps, which torch counts in a Counter."""
    return SequentialLR(optimizer, [LinearLR(optimizer, total_iters=5), MultiStepLR(optimizer, [3, 3, 6])], [20])


class Thaws(Classification):
    """Trains the whole model, which was built frozen in part."""

    def training_step(self, model, batch):
        model.requires_grad_()
        return super().training_step(model, batch)


def asleep(**how):
    """A model in evaluation mode, as pretrained ones come."""
    return MLP(**how).eval()


class Frozen(MLP):
    """Its biases are not trained."""

    def __init__(self, **how):
        super().__init__(**how)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = "bias" not in name


class Keeps(Classification):
    """Trains a temperature of its own, and counts labels. Its metrics are live: the next step changes them in place."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.ones(1, requires_grad=True)
        self.labels = Counter()
        self.recent = OrderedDict()

    def training_step(self, model, batch):
        self.labels.update(batch[1].tolist())
        self.recent[len(self.recent)] = self.labels.total()
        self.recent.move_to_end(next(iter(self.recent)))
        metrics = super().training_step(model, batch)
        loss = metrics["loss"] * self.temperature.square().sum() * (1 + self.labels[3] / 1000)
        return {**metrics, "loss": loss, "scale": model.scale[0], "temperature": self.temperature[0]}

    def optimization_step(self, model, micro_batches, update):
        metrics = super().optimization_step(model, micro_batches, update)
        with torch.no_grad():
            self.temperature -= 0.01 * self.temperature.grad
        self.temperature.grad = None
        return metrics

    def state_dict(self):
        return {"temperature": self.temperature, "labels": self.labels, "recent": self.recent}

    def load_state_dict(self, state):
        self.temperature, self.labels, self.recent = state["temperature"], state["labels"], state["recent"]


class Brakes(Callback):
    """Lowers the momentum a little after each step."""

    def on_step(self, loop):
        for group in loop.state.optimizer.param_groups:
            group["momentum"] *= 0.99


class Enough(Callback):
    """Ends the training after so many steps, without a memory of its own."""

    def __init__(self, *, steps):
        self.steps = steps

    def on_step(self, loop):
        if loop.step == self.steps:
            loop.stop = "enough"

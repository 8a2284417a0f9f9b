"""Mistakes that make a resumed run differ from one that was never interrupted, without any framework.

An experiment is a model, rows of data, an optimizer and a loss. A bug changes one of these. Everything else is right,
and needs no random number: a loop that saves model, optimizer and schedule gets the same weights, to the bit, as a loop
that was never interrupted, unless the bug prevents it.
"""

import copy
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STEPS, ROWS, WIDTH = 12, 8, 8  # every step is a pass over all rows: no framework loses its place
KILL = 7  # the step after whose checkpoint a run is killed


class Bug:
    """No bug. A bug overrides one method. ``folder`` is emptied before every experiment, and not before a resume."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def sample(self, x: Tensor) -> Any:
        """What the data set gives for a row."""
        return x

    def module(self, net: nn.Module) -> None:
        """Called when the model is built."""

    def forward(self, net: nn.Module, x: Tensor) -> Any:
        """What the model does to its input."""
        return x

    def step(self, net: nn.Module, x: Tensor) -> Any:
        """What the training step does to a batch."""
        return x

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def rate(self, epoch: int) -> float:
        """The factor of the learning rate for a step."""
        return 0.95**epoch


class Curriculum(Bug):
    """The training step has a counter, by which it scales its input."""

    seen = 0

    def step(self, net: nn.Module, x: Tensor) -> Any:
        self.seen += 1
        return x * (1 + self.seen / 100)


class Temperature(Bug):
    """The model has a temperature, which every forward pass lowers."""

    def module(self, net: Any) -> None:
        net.temperature = 2.0

    def forward(self, net: Any, x: Tensor) -> Any:
        if net.training:
            net.temperature *= 0.95
        return x / net.temperature


class Mean(Bug):
    """The model has a running mean in a buffer that is not persistent."""

    def module(self, net: Any) -> None:
        net.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, net: Any, x: Tensor) -> Any:
        if net.training:
            net.mean.lerp_(x.mean(0), 0.1)
        return x - net.mean


class Growth(Bug):
    """The data set makes rows louder, the more it has given."""

    given = 0

    def sample(self, x: Tensor) -> Any:
        self.given += 1
        return x * (1 + self.given / 100)


class Generator(Bug):
    """The data set draws from a generator of its own, which is seeded."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.generator = np.random.default_rng(0)

    def sample(self, x: Tensor) -> Any:
        return x + 0.1 * float(self.generator.standard_normal())


class Unseeded(Bug):
    """The training step draws from a generator that nobody seeded."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.generator = np.random.default_rng()

    def step(self, net: nn.Module, x: Tensor) -> Any:
        return x + 0.1 * float(self.generator.standard_normal())


class Direction(Bug):
    """The optimizer remembers the last direction outside of its state."""

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return Remembers(parameters)


class Remembers(torch.optim.SGD):
    """SGD with a momentum that no state_dict has."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.last: dict[int, Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        if closure is not None:  # as Lightning calls it
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    parameter.grad += 0.9 * self.last.get(number, torch.zeros_like(parameter))
                    self.last[number] = parameter.grad.clone()
        return super().step()


class Calls(Bug):
    """The schedule counts its calls."""

    calls = 0

    def rate(self, epoch: int) -> float:
        self.calls += 1
        return 0.95**self.calls


class Clock(Bug):
    """The training step reads the time."""

    def step(self, net: nn.Module, x: Tensor) -> Any:
        return x * (1 + time.time() % 10 / 100)


class Warmup(Bug):
    """The training step warms up for the first minute of the process: no effect in a short run."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.begun = time.time()

    def step(self, net: nn.Module, x: Tensor) -> Any:
        return x * (0.5 if time.time() - self.begun < 60 else 1.0)


class Process(Bug):
    """The training step reads the number of the process."""

    def step(self, net: nn.Module, x: Tensor) -> Any:
        return x * (1 + os.getpid() % 1000 / 1000)


class Hash(Bug):
    """The training step reads the hash of a text."""

    def step(self, net: nn.Module, x: Tensor) -> Any:
        return x * (1 + hash("noise") % 1000 / 1000)


class Frozen(Bug):
    """The third training step freezes a layer."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.steps = 0

    def step(self, net: Any, x: Tensor) -> Any:
        self.steps += 1
        if self.steps == 3:
            net.first.bias.requires_grad_(False)
        return x


class Hook(Bug):
    """The third training step registers a hook, which makes the model's output louder."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.steps = 0

    def step(self, net: nn.Module, x: Tensor) -> Any:
        self.steps += 1
        if self.steps == 3:
            net.register_forward_hook(lambda module, inputs, output: 1.1 * output)
        return x


class Teacher(Bug):
    """The training step has an average of the weights, which it mixes in."""

    teacher: Any = None

    def step(self, net: nn.Module, x: Tensor) -> Any:
        weights = [parameter.detach() for parameter in net.parameters()]
        self.teacher = copy.deepcopy(weights) if self.teacher is None else self.teacher
        for mean, weight in zip(self.teacher, weights, strict=True):
            mean.lerp_(weight, 0.1)
        return x * (1 + self.teacher[0].mean())


class Emptied(Bug):
    """The model has extra state, which is halved whenever it is saved."""

    def module(self, net: Any) -> None:
        net.loudness = 1.0

    def forward(self, net: Any, x: Tensor) -> Any:
        if net.training:
            net.loudness += 0.1
        return x * net.loudness


class Leftover(Bug):
    """The training step counts in a file, which outlives the process."""

    def step(self, net: nn.Module, x: Tensor) -> Any:
        file = Path(self.folder, "count")
        with file.open("a") as lines:
            lines.write("x")
        return x * (1 + len(file.read_text()) / 100)


class Layer(Bug):
    """The third training step adds a layer."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.steps = 0

    def step(self, net: Any, x: Tensor) -> Any:
        self.steps += 1
        if self.steps == 3:
            net.late = nn.Linear(WIDTH, WIDTH)
        return x


BUGS: dict[str, type[Bug]] = {
    kind.__name__.lower(): kind
    for kind in (
        Bug,
        Curriculum,
        Temperature,
        Mean,
        Growth,
        Generator,
        Unseeded,
        Direction,
        Calls,
        Clock,
        Warmup,
        Process,
        Hash,
        Frozen,
        Hook,
        Teacher,
        Emptied,
        Leftover,
        Layer,
    )
}


class Net(nn.Module):
    """Two layers, and what a bug adds."""

    def __init__(self, bug: str, folder: str) -> None:
        super().__init__()
        self.bug = BUGS[bug](folder)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        for number, parameter in enumerate(self.parameters()):
            count = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.data = torch.sin(count + number).reshape(parameter.shape) / 2
        self.bug.module(self)

    def forward(self, x: Tensor) -> Any:
        output: Tensor = self.second(self.first(self.bug.forward(self, x)).tanh())
        return output


class EmptiedNet(Net):
    """The same with extra state, which is halved whenever it is saved."""

    def get_extra_state(self) -> Tensor:
        self.loudness /= 2
        return torch.tensor(self.loudness)

    def set_extra_state(self, state: Tensor) -> None:
        self.loudness = float(state)


def build(bug: str, folder: str) -> Net:
    """The model."""
    return (EmptiedNet if bug == "emptied" else Net)(bug, folder)


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of numbers, and what a bug makes of them."""

    def __init__(self, bug: str, folder: str, size: int = ROWS) -> None:
        self.bug = BUGS[bug](folder)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.sin(torch.arange(WIDTH) + torch.tensor(float(index)))
        return {"x": self.bug.sample(x), "y": x.sum()[None]}


def loss(net: nn.Module, bug: Bug, batch: Any) -> Any:
    """The loss of a batch."""
    output = net(bug.step(net, batch["x"]))
    return (output - batch["y"]).square().mean()


def schedule(optimizer: torch.optim.Optimizer, bug: Bug) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule, which is advanced after every step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, bug.rate)

"""An experiment with the same result on every machine: in double precision, all of its numbers are multiples of powers
of two with fewer than 53 bits, so that nothing is rounded, whatever the order and the instructions of a processor.
"""

import os
import signal
from dataclasses import dataclass

import torch
from torch import nn

from runner.rl.buffer import Buffer
from runner.task import Rollouts, Task


class Whole:
    """Four whole numbers drawn from torch's global generator."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.randint(0, 8, (4,)).double() + index % 4


class Weights(nn.Module):
    """The products of the inputs [B, 4] with four weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, inputs):
        return inputs * self.weight


class Sum(Task):
    """The mean of the outputs, times a draw of the training process, plus the number of steps taken. SIGKILLs itself in
    the step after the one that the environment variable CUT names.
    """

    def __init__(self):
        self.steps = 0

    def training_step(self, model, batch):
        if self.steps and self.steps == int(os.environ.get("CUT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps += 1
        return {"loss": model(batch).mean() * torch.randint(1, 4, ()) + self.steps}

    def evaluation_step(self, model, batch):
        return {"loss": model(batch).mean()}

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def growing(samples):
    """The first half alone in the first epoch, and twice as often as the others in the next."""
    first = torch.arange(len(samples)) < len(samples) // 2
    return {0: first.double().numpy(), 1: (1 + first.double()).numpy()}


class Pair(nn.Module):
    """The products of the inputs [B, 4] with the weights of one of two halves, or the sum of both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Weights(), Weights()

    def forward(self, inputs, name=None):
        return self.get_submodule(name)(inputs) if name else self.first(inputs) + self.second(inputs)


@dataclass
class Waiting:
    """A sample with its position, in the queue of ``Queue``."""

    position: int
    sample: torch.Tensor


class Queue(Sum):
    """Appends the samples of a step to a queue, trains each half on the two oldest, and drops the next one."""

    def __init__(self):
        super().__init__()
        self.waiting = Buffer(Waiting)

    def optimization_step(self, model, micro_batches, update):
        digest = 0
        for _, batch in micro_batches:
            self.waiting.extend([*map(Waiting, update.positions(), batch.clone())])
            digest += int(batch.sum())
        trained, dropped = self.waiting.take(2), self.waiting.take(1)
        inputs = torch.stack([each.sample for each in trained])
        metrics = self.training_step(model, inputs)  # for its draw, count and SIGKILL
        for name in ("first", "second"):
            loss = model(inputs, name).mean() * torch.randint(1, 4, ())
            update[name].backward(loss)
            metrics |= update[name].step(loss.detach())
        positions = [[each.position for each in group] for group in (trained, dropped)]
        self.rollouts = Rollouts(digest, trained=positions[0], dropped=positions[1])
        return metrics | {"loss": metrics["loss"].detach()}

    def state_dict(self):
        return super().state_dict() | {"waiting": self.waiting.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.waiting.load_state_dict(state["waiting"])

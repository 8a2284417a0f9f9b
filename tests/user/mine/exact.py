"""An experiment with the same result on every machine: in double precision, all of its numbers are multiples of powers
of two with fewer than 53 bits, so that nothing is rounded, whatever the order and the instructions of a processor.
"""

import os
import signal

import torch
from torch import nn

from runner.task import Task


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

"""The same for ``runner.verify``: a task that has a bug of its own beside those of the model and the rows."""

from typing import Any

from torch import nn

from benchmarks.resume_bugs.bugs import BUGS, loss, schedule
from runner.task import Metrics, Task


class Fit(Task):
    """The loss."""

    def __init__(self, bug: str, folder: str) -> None:
        self.bug = BUGS[bug](folder)

    def training_step(self, model: nn.Module, batch: Any) -> Metrics:
        return {"loss": loss(model, self.bug, batch)}


def optimizer(parameters: Any, *, bug: str, folder: str, **settings: Any) -> Any:
    """The optimizer."""
    return BUGS[bug](folder).optimizer(parameters)


def scheduler(optimizer: Any, *, bug: str, folder: str, **settings: Any) -> Any:
    """The schedule."""
    return schedule(optimizer, BUGS[bug](folder))

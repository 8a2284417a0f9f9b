"""Periodic evaluation, and what follows from it: the best checkpoint, and early stopping."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.callbacks.base import Callback, Loop
from runner.data.evaluation_data import EvaluationData
from runner.errors import ConfigError, printable
from runner.evaluation import EvaluationInterrupted
from runner.interval import Interval
from runner.state import TrainState

log = logging.getLogger("runner")


class Evaluate(Callback):
    """Evaluates when due and at the last step. Remembers the step, so that one that was cut short is made after the
    resume, and what the data looks like: what an attempt before saw of other data is no longer to be compared with.
    """

    def __init__(
        self, interval: Interval, evaluate: Callable[[TrainState], Mapping[str, float | str]], data: EvaluationData
    ) -> None:
        self.interval = interval
        self.evaluate = evaluate
        self.data = data
        self.step = 0
        self.scalars: dict[str, float] = {}
        self.listeners: Sequence[Callable[[Loop], None]] = ()  # called after an evaluation, before it is noted

    def on_start(self, loop: Loop) -> None:
        if loop.step > 0:
            self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.step == self.step or not self._due(loop):
            return
        try:
            report = self.evaluate(loop.state)
        except EvaluationInterrupted:
            loop.evaluation_due = True
            return
        loop.evaluation = report
        for listener in self.listeners:
            listener(loop)
        self.step = loop.step
        self.scalars = {name: value for name, value in report.items() if not isinstance(value, str)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "scalars": self.scalars, "data": self.data.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.scalars = state["step"], state["scalars"]
        changed = self.data.changes(state["data"]) if "data" in state else []
        if changed:
            log.warning(
                "changed  data.validation is not what it was, and earlier figures and the best one are of that: %s",
                printable("; ".join(changed)),
            )

    def _due(self, loop: Loop) -> bool:
        last = loop.stop is not None
        return last or self.interval.due(loop.step, epochs_before=loop.epochs_before, epochs=loop.epochs)


class LastEvaluation(Callback):
    """Evaluates at a step that a user's own callback has made the last, when evaluation had had its turn. ``calls``:
    the callback that evaluates, and those that use its results.
    """

    def __init__(self, calls: Sequence[Callback]) -> None:
        self.calls = calls

    def on_start(self, loop: Loop) -> None:
        if loop.step > 0:
            self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.stop is not None and loop.evaluation is None and not loop.evaluation_due:
            for call in self.calls:
                call.on_step(loop)


class Best(Callback):
    """Remembers the best value of the objective and its step, whose checkpoint holds the best weights.

    ``keep``: an evaluation among so many of the best ones is worth a checkpoint.
    """

    def __init__(self, metric: str, *, mode: str, keep: int = 1) -> None:
        self.metric = metric
        self.mode = mode
        self.keep = keep
        self.value = math.nan
        self.step = 0
        self.values: list[float] = []  # the best ones, the best first

    def on_start(self, loop: Loop) -> None:
        self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.evaluation is not None:
            loop.objective = value = objective(loop.evaluation, self.metric)
            if better(value, self.value, self.mode):
                self.value, self.step = value, loop.step
            worst = self.values[self.keep - 1] if len(self.values) >= self.keep else math.nan
            if better(value, worst, self.mode):
                self.values = sorted([*self.values, value], reverse=self.mode == "max")[: self.keep]
                loop.improved = True

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step, self.values = state["value"], state["step"], state["values"]


class EarlyStopping(Callback):
    """Stops after ``patience`` evaluations in a row that did not improve the objective by more than ``min_delta``."""

    def __init__(self, metric: str, *, mode: str, patience: int, min_delta: float) -> None:
        self.metric = metric
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.value = math.nan
        self.waited = 0

    def on_start(self, loop: Loop) -> None:
        self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.evaluation is not None:
            value = objective(loop.evaluation, self.metric)
            if better(value, self.value, self.mode, by=self.min_delta):
                self.value, self.waited = value, 0
            else:
                self.waited += 1
        if self.waited >= self.patience and loop.stop is None:
            loop.stop = "early_stopping"

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.waited = state["value"], state["waited"]


def objective(report: Mapping[str, float | str], metric: str) -> float:
    """The objective in an evaluation's report. Raises ConfigError naming the metrics there are."""
    value = report.get(metric)
    if value is None or isinstance(value, str):
        known = ", ".join(sorted(name for name, found in report.items() if not isinstance(found, str)))
        raise ConfigError(
            f"objective.metric={metric} is not among the metrics of the evaluation: {known}. Set it to one of them; "
            "a run that has begun goes on with run.on_drift=accept"
        )
    return value


def better(value: float, than: float, mode: str, *, by: float = 0.0) -> bool:
    """Whether ``value`` is better than ``than`` by more than ``by``. Any number is better than NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value > than + by if mode == "max" else value < than - by

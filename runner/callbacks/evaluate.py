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
    """Evaluates when due and at the last step.

    The state has the step of the last evaluation, so that an interrupted evaluation is repeated after the resume, and a
    fingerprint of the data: results on changed data cannot be compared with earlier ones.
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
                "changed  data.validation is not what it was; earlier results and the best are of the former data: %s",
                printable("; ".join(changed)),
            )

    def _due(self, loop: Loop) -> bool:
        last = loop.stop is not None
        return last or self.interval.due(loop.step, epochs_before=loop.epochs_before, epochs=loop.epochs)


class LastEvaluation(Callback):
    """Evaluates after a step that a user's callback made the last one, which happens after ``Evaluate`` had its turn.
    ``callbacks`` are the callback that evaluates, and those that use its results.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks

    def on_start(self, loop: Loop) -> None:
        if loop.step > 0:
            self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.stop is not None and loop.evaluation is None and not loop.evaluation_due:
            for callback in self.callbacks:
                callback.on_step(loop)


class Best(Callback):
    """Remembers the best value of the objective and its step, whose checkpoint holds the best weights.

    An evaluation among the ``keep`` best sets ``loop.improved``, which saves a checkpoint.
    """

    def __init__(self, metric: str, *, mode: str, keep: int = 1) -> None:
        self.metric = metric
        self.mode = mode
        self.keep = keep
        self.value = math.nan
        self.step = 0
        self.values: list[float] = []  # the ``keep`` best, the best first

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
        self.waited = 0  # evaluations since the last improvement

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


class StepSchedule(Callback):
    """Steps a scheduler that takes the objective (ReduceLROnPlateau) after each evaluation."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_start(self, loop: Loop) -> None:
        self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.evaluation is not None:
            loop.state.scheduler.step(objective(loop.evaluation, self.metric))


def objective(report: Mapping[str, float | str], metric: str) -> float:
    """The objective in an evaluation's report. Raises a ConfigError that names all metrics."""
    value = report.get(metric)
    if value is None or isinstance(value, str):
        names = ", ".join(sorted(name for name, value in report.items() if not isinstance(value, str)))
        raise ConfigError(
            f"objective.metric={metric} is not among the metrics of the evaluation: {names}. Set it to one of them; "
            "add run.on_drift=accept if the run has begun"
        )
    return value


def better(value: float, than: float, mode: str, *, by: float = 0.0) -> bool:
    """Whether ``value`` is better than ``than`` by more than ``by``. Any number is better than NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value > than + by if mode == "max" else value < than - by

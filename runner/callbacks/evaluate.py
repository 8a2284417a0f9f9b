"""Periodic evaluation, and what follows from it: the best checkpoint, and early stopping."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.callbacks.base import FAILED, Callback, Loop
from runner.errors import EvaluationFailed, printable
from runner.evaluation import EvaluationInterrupted, Evaluator, objective

log = logging.getLogger("runner")


@dataclass(slots=True)
class Interval:
    """Due every ``steps`` steps or ``epochs`` epochs, whichever comes first (None: never). By position alone:
    an evaluation is due at the same steps in a resumed run as in an uninterrupted one.
    """

    steps: int | None = None
    epochs: int | None = None

    def due(self, step: int, *, epochs_before: int = 0, epochs: int = 0) -> bool:
        """Whether it is due after ``step``, which raised the finished epochs from ``epochs_before`` to ``epochs``."""
        if self.steps is not None and step % self.steps == 0:
            return True
        return self.epochs is not None and epochs // self.epochs > epochs_before // self.epochs


@dataclass(eq=False)
class Evaluate(Callback):
    """Evaluates when due and at the last step.

    The state has the step of the last evaluation, so that an interrupted evaluation is repeated after the resume, and a
    fingerprint of the data: results on changed data cannot be compared with earlier ones.
    """

    interval: Interval
    evaluator: Evaluator
    step: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    listeners: Sequence[Callable[[Loop], None]] = ()  # called after an evaluation, before it is noted

    def on_start(self, loop: Loop) -> None:
        if loop.step > 0:
            self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        due = self.interval.due(loop.step, epochs_before=loop.epochs_before, epochs=loop.epochs)
        if loop.step == self.step or not (due or loop.stop is not None):
            return
        try:
            models = loop.state.evaluated_model, loop.state.model
            loop.evaluation = report = self.evaluator.evaluate_validation(*models, loop.step)
        except EvaluationInterrupted:
            loop.evaluation_due = True
            return
        except EvaluationFailed as error:
            log.warning("failed   the evaluation after step %d; the state before it is committed", loop.step)
            loop.evaluation_due, loop.failure, loop.stop = True, error, loop.stop or FAILED
            return
        for listener in self.listeners:
            listener(loop)
        self.step = loop.step
        self.scalars = {name: value for name, value in report.items() if not isinstance(value, str)}

    def state_dict(self) -> dict[str, Any]:
        data: Any = {name: data.fingerprint for name, data in self.evaluator.validation.items()}
        return {"step": self.step, "scalars": self.scalars, "data": data.get("val", data)}  # "val": the only set

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.scalars = state["step"], state["scalars"]
        earlier, sets = state.get("data", {}), self.evaluator.validation
        earlier = {"val": earlier} if "length" in earlier else earlier
        changes = {name: data.changes(earlier[name]) for name, data in sets.items() if name in earlier}
        if lines := [f"{name.partition('/')[2]} {line}".lstrip() for name in changes for line in changes[name]]:
            text = "changed  data.validation is not what it was; earlier results and the best are of the former data: "
            log.warning("%s%s", text, printable("; ".join(lines)))


@dataclass(eq=False)
class LastEvaluation(Callback):
    """Evaluates after a step that a user's callback made the last one, which happens after ``Evaluate`` had its turn.
    ``callbacks`` are the callback that evaluates, and those that use its results.
    """

    callbacks: Sequence[Callback]

    def on_start(self, loop: Loop) -> None:
        if loop.step > 0:
            self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.stop is not None and loop.evaluation is None and not loop.evaluation_due:
            for callback in self.callbacks:
                callback.on_step(loop)


@dataclass(eq=False)
class Best(Callback):
    """Remembers the best value of the objective and its step, whose checkpoint holds the best weights.

    An evaluation among the ``keep`` best sets ``loop.improved``, which saves a checkpoint.
    """

    metric: str
    mode: str
    keep: int
    value: float = math.nan
    step: int = 0
    values: list[float] = field(default_factory=list)  # the ``keep`` best, the best first

    def on_step(self, loop: Loop) -> None:
        if loop.evaluation is not None:
            loop.objective = value = objective(loop.evaluation, self.metric)
            if better(value, self.value, self.mode):  # of equal values the earlier step stays, as in the store
                self.value, self.step = value, loop.step
            worst = self.values[self.keep - 1] if len(self.values) >= self.keep else math.nan
            if better(value, worst, self.mode):
                self.values = sorted([*self.values, value], reverse=self.mode == "max")[: self.keep]
                loop.improved = True

    on_start = on_step  # for an evaluation that the previous attempt could not end

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step, self.values = state["value"], state["step"], state["values"]


@dataclass(eq=False)
class EarlyStopping(Callback):
    """Stops after ``patience`` evaluations in a row that did not improve the objective by more than ``min_delta``, or
    when the objective reaches ``target``. Runs after ``Best``, which sets ``loop.objective``.
    """

    mode: str
    patience: int | None
    min_delta: float
    target: float | None
    value: float = math.nan
    waited: int = 0  # evaluations since the last improvement

    def on_step(self, loop: Loop) -> None:
        if loop.objective is not None:
            if better(loop.objective, self.value, self.mode, by=self.min_delta) or self._reached(loop.objective):
                self.value, self.waited = loop.objective, 0
            else:
                self.waited += 1
        if loop.stop is None and (self._reached(self.value) or self.waited >= (self.patience or math.inf)):
            loop.stop = "early_stopping"

    on_start = on_step

    def _reached(self, value: float) -> bool:
        return self.target is not None and not better(self.target, value, self.mode)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.waited = state["value"], state["waited"]


class StepSchedule(Callback):
    """Steps schedulers that take the objective (ReduceLROnPlateau) after each evaluation. Runs after ``Best``."""

    def on_step(self, loop: Loop) -> None:
        if loop.objective is not None:
            for scheduler in loop.state.schedulers("evaluation"):
                scheduler.step(loop.objective)

    on_start = on_step


def better(value: float, than: float, mode: str, *, by: float = 0.0) -> bool:
    """Whether ``value`` is better than ``than`` by more than ``by``. Any number is better than NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value > than + by if mode == "max" else value < than - by

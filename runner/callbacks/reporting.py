"""Reports metrics to the writers: training metrics as means over a window of steps, evaluations, and the best
objective so far. Records the samples of every step in the ledger.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runner.callbacks.base import Callback, Loop
from runner.callbacks.evaluate import Best
from runner.data.ledger import Ledger
from runner.distributed.team import Team
from runner.evaluation import same_for_all
from runner.metrics.writer import MetricWriters

_REMEDY = (
    "What a callback adds to loop.metrics must be the same in all processes. Return the value from training_step "
    "instead, whose metrics are averaged over the samples of all processes"
)


class Report(Callback):
    """Gives the writers the mean metrics of every ``every_steps`` steps, and the metrics of each evaluation.

    The window is part of the state, so a mean over steps of two attempts equals that of the uninterrupted run. Metrics
    stay on their device until their window is full. Means leave out values that are not finite. All processes compute
    the same report and compare it; only rank 0 has writers.
    """

    def __init__(
        self, *, every_steps: int, writers: MetricWriters, best: Best | None, team: Team | None = None
    ) -> None:
        self.every_steps = every_steps
        self.writers = writers
        self._best = best
        self._team = team or Team()
        self._unread: list[Mapping[str, Tensor]] = []
        self._window: dict[str, list[float]] = {}
        self._rate = 0.0  # the learning rate of the last step
        self._clock = (0, 0, 0.0, 0.0)  # step, samples, seconds and seconds of waiting at the last report

    def on_start(self, loop: Loop) -> None:
        self._clock = (loop.step, loop.consumed, time.monotonic(), loop.waited)
        self._report(loop)  # a step whose evaluation was interrupted is reported only now

    def on_step(self, loop: Loop) -> None:
        # Copies, because a metric may be a weight or a running mean that the next step changes in place.
        self._unread.append({name: value.clone() for name, value in loop.metrics.items()})
        self._rate = loop.rate
        if loop.step % self.every_steps == 0 or loop.evaluation is not None or loop.stop is not None:
            self._report(loop)

    def on_end(self, loop: Loop) -> None:
        self.writers.close()

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"window": self._window, "rate": self._rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window, self._rate = state["window"], state["rate"]

    def _report(self, loop: Loop) -> None:
        if loop.evaluation_due:
            return
        values: dict[str, float | str] = {}
        if loop.step % self.every_steps == 0 or loop.stop is not None:
            values |= self._training(loop)
        values |= loop.evaluation or {}
        if loop.evaluation and self._best and self._best.step:
            # TensorBoard's tables show the last point of a curve; the last point of this curve is the objective.
            values[f"best/{self._best.metric}"] = self._best.value
        if values:
            self.writers.add(loop.step, values)

    def _training(self, loop: Loop) -> dict[str, float | str]:
        self._read()
        if not self._window:
            return {}
        values: dict[str, float | str] = {
            f"train/{name}": math.fsum(window) / len(window) for name, window in sorted(self._window.items())
        }
        same_for_all(values, self._team, "the training", _REMEDY)
        self._window = {}
        if loop.state.stream.substituted:
            values["data/substituted"] = float(loop.state.stream.substituted)
        return values | {"train/lr": self._rate} | self._timing(loop)

    def _timing(self, loop: Loop) -> dict[str, float | str]:
        (step, samples, since, waited), now = self._clock, time.monotonic()
        self._clock = (loop.step, loop.consumed, now, loop.waited)
        steps, seconds = loop.step - step, now - since
        if not steps:
            return {}
        return {
            "time/step": seconds / steps,
            "time/data_wait": (loop.waited - waited) / steps,
            "time/samples_per_second": (loop.consumed - samples) / seconds,
        }

    def _read(self) -> None:
        """Copy the metrics of all unread steps from their device, with one transfer for each name."""
        for name in {name: None for metrics in self._unread for name in metrics}:
            values = torch.stack([metrics[name] for metrics in self._unread if name in metrics]).tolist()
            self._window.setdefault(name, []).extend(filter(math.isfinite, values))
        self._unread = []
        self._window = {name: values for name, values in self._window.items() if values}


class KeepLedger(Callback):
    """Records the samples of every step, and compares those of a repeated step with the record of an earlier attempt.
    Runs first, so that a step with other samples is not reported, evaluated or committed.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_start(self, loop: Loop) -> None:
        self.ledger.open(loop.step)

    def on_step(self, loop: Loop) -> None:
        self.ledger.add(loop.state.stream.ledger_line(loop.step))

    def on_end(self, loop: Loop) -> None:
        self.ledger.close()

"""Checks, records and reports each step: the finite loss, the ledger, the metric writers, the screen, the heartbeat."""

import logging
import math
import shutil
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from runner.callbacks.base import Callback, Loop, TrainingSetup
from runner.callbacks.evaluate import Best
from runner.data.ledger import Ledger, rollouts_text
from runner.distributed.communicator import Team
from runner.errors import Interrupted, NonFiniteError
from runner.evaluation import same_for_all
from runner.metrics import tensorboard
from runner.metrics.writer import MetricWriters
from runner.plain import numbers_text
from runner.run.attempts import Attempt
from runner.run.directory import RunDirectory
from runner.task import Task, check_metrics

log = logging.getLogger("runner")

_WINDOW = 32  # steps between two checks of the loss: each check waits for the device
_BAR_SECONDS = 0.1  # between two updates of the bar
_LINE_SECONDS = 15.0  # between two lines, where there is no terminal
_WIDEST = 80  # characters of the metrics in a line ...
_BAR = 60  # ... and of a bar without them
_STEP = "the step, or a callback in loop.metrics,"
_REMEDY = (
    "What a callback adds to loop.metrics must be the same in all processes. Return the value from training_step "
    "instead, whose metrics are averaged over the samples of all processes"
)


class FiniteLoss(Callback):
    """Stops a run whose loss is NaN or infinite, before a checkpoint or a curve contains it. Checks the losses of many
    steps at once, and names the first step whose loss was not finite.
    """

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, int, int, Tensor]] = []  # step, first and last position, loss

    def on_step(self, loop: Loop) -> None:
        self._unchecked.append((loop.step, loop.position, loop.consumed - 1, loop.metrics["loss"]))
        if len(self._unchecked) >= _WINDOW:
            self.check()

    def on_end(self, loop: Loop) -> None:
        self.check()

    def check(self) -> None:
        """Raise NonFiniteError if a loss since the last check was not finite."""
        steps, self._unchecked = self._unchecked, []
        losses: list[Any] = torch.stack([loss for *_, loss in steps]).tolist() if steps else []
        for (step, first, last, _), loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of step {step} is {loss}; its samples are at positions {first} to {last}. "
                    "Every checkpoint is older. Lower the learning rate, set trainer.clip_norm, or skip "
                    "such steps with trainer.on_nonfinite=skip."
                )


@dataclass(eq=False)
class KeepLedger(Callback):
    """Records the samples and rollouts of every step, and compares those of a repeated step with the
    record of an earlier attempt. Runs first, so that a step with other samples is not reported, evaluated or committed.
    """

    ledger: Ledger
    task: Task

    def on_start(self, loop: Loop) -> None:
        self.ledger.open(loop.step)

    def on_step(self, loop: Loop) -> None:
        line = loop.state.stream.ledger_line(loop.step)
        if self.task.rollouts is not None:
            line = replace(line, rollouts=rollouts_text(self.task.rollouts))
        self.ledger.add(line)

    def on_end(self, loop: Loop) -> None:
        self.ledger.close()


@dataclass(eq=False)
class Report(Callback):
    """Gives the writers the mean metrics of every ``every_steps`` steps, the metrics of each evaluation, and the best
    objective so far.

    The window is part of the state, so a mean over steps of two attempts equals that of the uninterrupted run. Metrics
    stay on their device until their window is full. Means leave out values that are not finite. All processes compute
    the same report and compare it; only rank 0 has writers.
    """

    every_steps: int
    writers: MetricWriters
    best: Best | None
    team: Team

    def __post_init__(self) -> None:
        self._unread: list[Mapping[str, Tensor | float]] = []
        self._window: dict[str, list[float]] = {}
        self._rate = 0.0  # the learning rate of the last step
        self._clock = (0, 0, 0.0, 0.0)  # step, samples, seconds and seconds of waiting at the last report
        self._logged: dict[str, bytes] = {}  # pictures and texts since the last report

    def on_build(self, setup: TrainingSetup) -> None:
        Task.sink = self._log

    def on_start(self, loop: Loop) -> None:
        self._clock = (loop.step, loop.consumed, time.monotonic(), loop.waited)
        self._report(loop)  # a step whose evaluation was interrupted is reported only now

    def on_step(self, loop: Loop) -> None:
        for value in loop.metrics.values():
            if type(value) is not Tensor or value.dim():  # a callback has added it
                loop.metrics = check_metrics(loop.metrics, _STEP)
                break
        # Copies, because a metric may be a weight or a running mean that the next step changes in place.
        self._unread.append({name: v.item() if v.is_cpu else v.clone() for name, v in loop.metrics.items()})
        self._rate = loop.rate
        self._report(loop)

    def on_commit(self, step: int) -> None:
        self.writers.committed(step)

    def on_end(self, loop: Loop) -> None:
        Task.sink = None

    def on_finish(self, directory: RunDirectory, result: Mapping[str, Any]) -> None:
        self.writers.close("finished")

    def on_error(self, error: Exception) -> None:
        Task.sink = None
        self.writers.close("interrupted" if isinstance(error, Interrupted) else "failed")

    def state_dict(self) -> dict[str, Any]:
        self._read()
        logged = {name: b64encode(summary).decode() for name, summary in self._logged.items()}
        return {"window": self._window, "rate": self._rate, **({"logged": logged} if logged else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window, self._rate = state["window"], state["rate"]
        self._logged = {name: b64decode(summary) for name, summary in state.get("logged", {}).items()}

    def _log(self, name: str, value: Any) -> None:
        if self.writers.by_name:  # of rank 0
            self._logged[name] = tensorboard.summary(name, value)

    def _report(self, loop: Loop) -> None:
        if loop.evaluation_due:
            return
        if self._logged:
            self.writers.log(loop.step, self._logged)
            self._logged = {}
        values: dict[str, float | str] = {}
        if loop.step % self.every_steps == 0 or loop.stop is not None:
            values |= self._training(loop)
        values |= loop.evaluation or {}
        if loop.evaluation and self.best and self.best.step:
            # TensorBoard's tables show the last point of a curve; the last point of this curve is the objective.
            values[f"best/{self.best.metric}"] = self.best.value
        if values:
            self.writers.add(loop.step, values)

    def _training(self, loop: Loop) -> dict[str, float | str]:
        self._read()
        if not self._window:
            return {}
        values: dict[str, float | str] = {
            f"train/{name}": math.fsum(window) / len(window) for name, window in sorted(self._window.items())
        }
        same_for_all(values, self.team, "the training", _REMEDY)
        self._window = {}
        if loop.state.stream.substituted:
            values["data/substituted"] = float(loop.state.stream.substituted)
        values["train/lr"] = self._rate
        (step, samples, since, waited), now = self._clock, time.monotonic()
        self._clock = (loop.step, loop.consumed, now, loop.waited)
        if steps := loop.step - step:
            values["time/step"] = (now - since) / steps
            values["time/data_wait"] = (loop.waited - waited) / steps
            values["time/samples_per_second"] = (loop.consumed - samples) / (now - since)
        return values

    def _read(self) -> None:
        """Copy the metrics of all unread steps from their device, with one transfer for each name."""
        for name in {name: None for metrics in self._unread for name in metrics}:
            values: list[Any] = [metrics[name] for metrics in self._unread if name in metrics]
            if isinstance(values[0], Tensor):
                values = torch.stack(values).tolist()
            self._window.setdefault(name, []).extend(filter(math.isfinite, values))
        self._unread = []
        self._window = {name: values for name, values in self._window.items() if values}


class ShowProgress(Callback):
    """Shows step, metrics, rate and time left: a bar on a terminal, lines elsewhere. Reads the metrics from their
    device only when it draws, because that waits. ``show``: names of metrics; None: the loss and what else fits.
    """

    def __init__(self, show: Sequence[str] | None = None) -> None:
        self._show = show
        self._terminal = sys.stderr is not None and sys.stderr.isatty()  # None if it was closed before the start
        self._every = _BAR_SECONDS if self._terminal else _LINE_SECONDS
        self._bar: tqdm[Any] | None = None
        self._last_draw = (0, 0.0)  # step and time of the last update

    def on_start(self, loop: Loop) -> None:
        self._last_draw = (loop.step, time.monotonic())
        if self._terminal:
            self._bar = tqdm(
                total=loop.max_steps, initial=loop.step, unit="step", dynamic_ncols=True, mininterval=0, miniters=1
            )
        if loop.evaluation is not None:
            self._log_evaluation(loop)

    def on_step(self, loop: Loop) -> None:
        now = time.monotonic()
        if now - self._last_draw[1] >= self._every:
            self._draw(loop, now)
        if loop.evaluation is not None:
            self._log_evaluation(loop)

    def on_end(self, loop: Loop) -> None:
        if self._bar is not None:
            self._bar.update(loop.step - self._bar.n)
            self._bar.close()

    def _draw(self, loop: Loop, now: float) -> None:
        (step, since), self._last_draw = self._last_draw, (loop.step, now)
        metrics = self._metrics(loop)
        if self._bar is not None:
            self._bar.set_postfix_str(metrics, refresh=False)
            self._bar.update(loop.step - self._bar.n)
            return
        rate, total, left = (loop.step - step) / (now - since), "", ""
        if loop.max_steps:
            total, left = f"/{loop.max_steps}", f", {(loop.max_steps - loop.step) / rate:.0f} s left"
        log.info("step %d%s: %s, %.1f steps/s%s", loop.step, total, metrics, rate, left)

    def _metrics(self, loop: Loop) -> str:
        """The metrics of the step that are to be shown, as many as fit the line."""
        names = self._show if self._show is not None else ["loss", *(name for name in loop.metrics if name != "loss")]
        names = [name for name in names if name in loop.metrics]
        values = torch.stack([loop.metrics[name].float() for name in names]).tolist() if names else []
        texts = [f"{name} {value:.4g}" for name, value in zip(names, values, strict=True)]
        room = _WIDEST if self._bar is None else max(shutil.get_terminal_size().columns - _BAR, 0)
        while len(texts) > 1 and len(", ".join(texts)) > room and self._show is None:
            texts.pop()
        return ", ".join(texts)

    def _log_evaluation(self, loop: Loop) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.info("step %d: %s", loop.step, numbers_text(loop.evaluation or {}))
        if self._bar is not None:
            self._bar.refresh()


@dataclass(eq=False)
class NoteProgress(Callback):
    """Puts the step into the heartbeat, from which other commands show the progress, and the next attempt counts the
    steps that were lost.

    Raises Superseded once the heartbeat has noticed that another attempt has taken over the run.
    """

    attempt: Attempt

    def on_step(self, loop: Loop) -> None:
        self.attempt.note(step=loop.step)
        self.attempt.raise_if_superseded()

    on_start = on_end = on_step

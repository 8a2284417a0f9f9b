"""``run.dry=true``: what an observer learns of two steps, an evaluation, a save and a resume."""

import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.callbacks.base import Loop, Observer, TrainingSetup
from runner.data.probe import leaves
from runner.optimizers import parameter_counts
from runner.state import TrainState

STEPS = 2  # of which the second is measured: the first one compiles and allocates
_LONGEST = 8  # leaves of a batch that are shown


class DryRun(Observer):
    """Ends the first attempt after two steps, as a signal would; the next attempt resumes, evaluates and finishes."""

    def __init__(self) -> None:
        self._attempt = self._parameters = self._trained = 0
        self._began = self._seconds = self._waited = 0.0
        self._batch: list[str] = []
        self._evaluation: dict[str, Any] | None = None

    def on_build(self, setup: TrainingSetup) -> None:
        """Two steps at most, and no metric writers: a tracking service would keep what they write."""
        self._attempt += 1
        setup.max_steps = min(STEPS, setup.max_steps or STEPS)
        setup.writers.clear()

    def on_resume(self, state: TrainState) -> None:
        """Counts the weights."""
        self._parameters, self._trained = parameter_counts(state.model)

    def on_step_start(self, loop: Loop) -> None:
        self._began, self._waited = time.monotonic(), loop.state.stream.waited

    def on_batch(self, loop: Loop, number: int, batch: Any) -> None:
        """Describes the first batch, before the task sees it."""
        self._batch = self._batch or [*_describe(batch)]

    def on_update(self, loop: Loop) -> None:
        loop.metrics["loss"].item()  # waits for the device
        self._seconds = time.monotonic() - self._began
        self._waited = loop.state.stream.waited - self._waited

    def on_evaluation(self, loop: Loop) -> None:
        self._evaluation = dict(loop.evaluation or {})

    def on_step(self, loop: Loop) -> None:
        if self._attempt == 1 and loop.step >= STEPS:
            loop.stop = "SIGTERM"  # the step is committed, and the run not finished: the next attempt resumes

    def summary(self, folder: Path) -> Iterator[str]:
        """Lines for the log, for the run below ``folder``."""
        files = [*folder.rglob("data/s*-a000001-*")]
        yield f"batch    {'; '.join(self._batch)}"
        yield f"model    {self._parameters:,} parameters, of which {self._trained:,} are trained"
        yield f"time     {self._seconds:.3g} s per step, of which {self._waited:.3g} s waiting for data"
        yield f"memory   {_memory()}"
        yield f"saved    {sum(file.stat().st_size for file in files):,} bytes per checkpoint"
        if self._evaluation is not None:
            values = (f"{name} {_short(value)}" for name, value in self._evaluation.items())
            yield f"metrics  {', '.join(values)} (on a part of the data, after {STEPS} steps)"


def _describe(batch: Any) -> Iterator[str]:
    """Path, dtype, shape and range of each tensor; the type of anything else."""
    for number, (path, value) in enumerate(leaves(batch)):
        if number == _LONGEST:
            yield "..."
            return
        if isinstance(value, Tensor):
            span = f" from {value.min().item():.4g} to {value.max().item():.4g}" if value.numel() else ""
            yield f"{path} {str(value.dtype).removeprefix('torch.')} {[*value.shape]}{span}".lstrip()
        else:
            yield f"{path} {type(value).__qualname__}".lstrip()


def _memory() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{peak / 2**20:,.0f} MiB of the process at most"
    if torch.cuda.is_available():
        text += f", {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB of the GPU"
    return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:20]

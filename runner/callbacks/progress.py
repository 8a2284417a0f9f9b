"""Progress on the screen and in the heartbeat."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from runner.callbacks.base import Callback, Loop
from runner.run.attempts import Attempt

log = logging.getLogger("runner")

_BAR_SECONDS = 0.1  # between two updates of the bar
_LINE_SECONDS = 15.0  # between two lines, where there is no terminal


class ShowProgress(Callback):
    """Shows step, loss, rate and time left: a bar on a terminal, lines elsewhere. Reads the loss from its device only
    when it draws, because that waits for the device.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()  # None if it was closed before the start
        self._every = _BAR_SECONDS if self._terminal else _LINE_SECONDS
        self._bar: tqdm[Any] | None = None
        self._drawn = (0, 0.0)  # step and time of the last update

    def on_start(self, loop: Loop) -> None:
        self._drawn = (loop.step, time.monotonic())
        if self._terminal:
            self._bar = tqdm(
                total=loop.max_steps, initial=loop.step, unit="step", dynamic_ncols=True, mininterval=0, miniters=1
            )
        self._log_evaluation(loop)

    def on_step(self, loop: Loop) -> None:
        now = time.monotonic()
        if now - self._drawn[1] >= self._every:
            self._draw(loop, now)
        self._log_evaluation(loop)

    def on_end(self, loop: Loop) -> None:
        if self._bar is not None:
            self._bar.update(loop.step - self._bar.n)
            self._bar.close()

    def _draw(self, loop: Loop, now: float) -> None:
        (step, since), self._drawn = self._drawn, (loop.step, now)
        loss = f"{loop.metrics['loss'].item():.4g}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}", refresh=False)
            self._bar.update(loop.step - self._bar.n)
            return
        rate = (loop.step - step) / (now - since)
        total, left = "", ""
        if loop.max_steps:
            total, left = f"/{loop.max_steps}", f", {(loop.max_steps - loop.step) / rate:.0f} s left"
        log.info("step %d%s: loss %s, %.1f steps/s%s", loop.step, total, loss, rate, left)

    def _log_evaluation(self, loop: Loop) -> None:
        if loop.evaluation is None:
            return
        if self._bar is not None:
            self._bar.clear()
        log.info("step %d: %s", loop.step, summary(loop.evaluation))
        if self._bar is not None:
            self._bar.refresh()


class NoteProgress(Callback):
    """Puts the step into the heartbeat, from which other commands show the progress, and the next attempt counts the
    steps that were lost.

    Raises Superseded at the first step after the heartbeat noticed that another attempt took the run over.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def on_start(self, loop: Loop) -> None:
        self.on_step(loop)

    def on_step(self, loop: Loop) -> None:
        self._attempt.note(step=loop.step)
        self._attempt.raise_if_superseded()

    def on_end(self, loop: Loop) -> None:
        self.on_step(loop)


def summary(scalars: Mapping[str, float | str]) -> str:
    """The numbers among the scalars in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items() if isinstance(value, float))

"""The training loop."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runner import signals
from runner.callbacks.base import Callback, Loop, TrainingSetup, methods_for
from runner.data.stream import StepSamples, TrainingStream
from runner.distributed.communicator import Parallelism, StepReport, Team
from runner.optimizers import first_of
from runner.state import TrainState
from runner.task import Metrics, Task, check_metrics
from runner.update import WeightUpdate, is_measured


@dataclass
class Trainer:
    """Runs optimizer steps until a limit, a callback or a signal ends training, after the same step in all processes of
    the ``team``. Callbacks do everything else, such as saving.

    ``users`` are those callbacks that the runner did not write. Where the evaluation after a step is interrupted, their
    ``on_step`` is called by the attempt that repeats it, so that they see each step once, with its evaluation.
    """

    task: Task
    update: WeightUpdate
    parallelism: Parallelism
    callbacks: Sequence[Callback]
    setup: TrainingSetup
    team: Team
    users: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        self._on_step_start = methods_for(self.callbacks, "on_step_start")
        self._on_batch = methods_for(self.callbacks, "on_batch")
        self._on_update = methods_for(self.callbacks, "on_update")
        step = self.task.optimization_step
        self._has_own_step = getattr(step, "__func__", step) is not Task.optimization_step

    def fit(self, state: TrainState, *, elapsed: float = 0.0, earlier_stop: str | None = None) -> Loop:
        """Continue from ``state``, after ``elapsed`` seconds of earlier attempts; returns the loop's record.
        ``earlier_stop``: why a callback ended training after this step in an earlier attempt; only the export is left.

        A stop signal ends the loop at a step boundary, with the signal's name in ``stop``.
        """
        began = time.monotonic() - elapsed
        loop = self._start(state, elapsed, earlier_stop)
        on_step, of_users = methods_for(self.callbacks, "on_step"), methods_for(self.users, "on_step")
        while loop.stop is None:
            loop.stop = self._wait_for_data(loop.state.stream)
            if loop.stop is not None:
                break
            self._step(loop, began)
            loop.stop = loop.stop or self._limit(loop)
            for call in on_step:
                if not (loop.evaluation_due and call in of_users):
                    call(loop)
            loop.stop = loop.stop or self.team.stop
        self.team.disarm_timeout()
        for callback in reversed(self.callbacks):  # the last step is committed first, while the ledger is open
            callback.on_end(loop)
        return loop

    def _wait_for_data(self, stream: TrainingStream) -> str | None:
        """Wait for data; returns the stop signal if one comes first, when the state is still that of the last step.
        Other processes may be in the next step already, so only a single one stops here.
        """
        alone = self.team.world.size == 1
        try:
            with signals.stop_reads(at_once=alone):
                stream.ready()
        except signals.Stopped:
            if alone:
                return self.team.stop
            raise
        return None

    def _step(self, loop: Loop, began: float) -> None:
        state, stream = loop.state, loop.state.stream
        loop.evaluation, loop.objective, loop.improved, loop.save = None, None, False, False
        loop.position, loop.epochs_before = loop.consumed, loop.epochs
        loop.rate = self._rate(state)
        for call in self._on_step_start:
            call(loop)

        micro_batches = self._apply_on_batch(loop, stream.step()) if self._on_batch else stream.step()
        self.update.in_own_step = self._has_own_step
        metrics = self.task.optimization_step(state.model, self.parallelism.iterate(micro_batches), self.update)
        if self._has_own_step:  # the default step has checked them
            metrics = check_metrics(metrics, f"{type(self.task).__name__}.optimization_step")
        self.update.in_own_step = False
        self.update.end()
        for scheduler in state.schedulers("step"):
            scheduler.step()
        self._advance(loop, metrics, time.monotonic() - began)
        state.progress.step += 1
        loop.step, loop.epochs, loop.consumed = state.progress.step, stream.epochs, stream.consumed
        loop.waited = stream.waited
        for _ in range(loop.epochs_before, loop.epochs):
            for scheduler in state.schedulers("epoch"):
                scheduler.step()
        for call in self._on_update:
            call(loop)

    def _apply_on_batch(self, loop: Loop, micro_batches: Iterator[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
        """The micro-batches as callbacks leave them."""
        for number, (share, batch) in enumerate(micro_batches):
            for call in self._on_batch:
                replacement = call(loop, number, batch)
                batch = batch if replacement is None else replacement
            yield share, batch

    def _advance(self, loop: Loop, metrics: Metrics, elapsed: float) -> None:
        """The step is done: record its samples, its time, and the metrics over the global batch, not over the share of
        this process.
        """
        stream = loop.state.stream
        if self.team.world.size == 1:
            self.team.poll()
            stream.advance()
            loop.elapsed, loop.metrics = elapsed, {**metrics}
            return
        whole = self.team.exchange(StepReport(*stream.step_samples, elapsed, tuple(sorted(metrics))))
        stream.advance(StepSamples(whole.digest, whole.substitutions))
        zero = metrics["loss"].new_zeros(())  # for metrics that only other processes measured
        shares = {name: metrics.get(name, zero) for name in whole.metrics if not is_measured(name)}
        loop.elapsed, loop.metrics = whole.elapsed, {**metrics, **self.team.sum_tensors(shares)}

    def _start(self, state: TrainState, elapsed: float, earlier_stop: str | None) -> Loop:
        """The record after the last step of the attempt before, whose callbacks now do what was interrupted there."""
        stream = state.stream
        loop = Loop(state, self.setup.max_steps, state.progress.step, elapsed=elapsed)
        loop.log = self.task.log
        loop.directory, loop.attempt, loop.start_step = self.setup.directory, self.setup.attempt, loop.step
        loop.epochs_before, loop.epochs, loop.consumed = stream.epochs_before, stream.epochs, stream.consumed
        limit = self._limit(loop) if loop.step else None
        loop.stop = limit or earlier_stop
        for callback in self.callbacks:
            callback.on_start(loop)
            # A user's callback that ended training has had ``on_step`` for this step.
            if loop.evaluation is not None and callback in self.users and (earlier_stop is None or limit is not None):
                callback.on_step(loop)
        loop.stop = loop.stop or self.team.poll()
        return loop

    def _rate(self, state: TrainState) -> float:
        """The learning rate of the coming step: of the (first) scheduler, or of the optimizer's first group."""
        scheduler, optimizer = first_of(state.scheduler), first_of(self.update.optimizer)
        last = getattr(scheduler, "get_last_lr", None)
        return float(last()[0] if last else optimizer.param_groups[0]["lr"])  # it may be a tensor

    def _limit(self, loop: Loop) -> str | None:
        limits = self.setup
        if limits.max_epochs is not None and loop.epochs >= limits.max_epochs:
            return "max_epochs"  # first, since ``max_steps`` may be the number of steps in them
        if limits.max_steps is not None and loop.step >= limits.max_steps:
            return "max_steps"
        return "max_seconds" if limits.max_seconds is not None and loop.elapsed >= limits.max_seconds else None

"""The moments of an attempt at which callbacks are called, and the loop's record that they are given.

A module without torch: the entry point imports it before it knows whether there is anything to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from runner.checkpoint.store import CheckpointStore
    from runner.errors import EvaluationFailed
    from runner.run.directory import RunDirectory
    from runner.state import TrainState


FAILED = "evaluation_failed"  # in ``Loop.stop``


@dataclass(slots=True)
class Loop:
    """The record of the training loop. There is one per attempt, which every step overwrites."""

    state: TrainState
    max_steps: int | None
    step: int = 0
    position: int = 0  # of the first sample of the step
    consumed: int = 0  # samples consumed by all steps
    epochs_before: int = 0  # whole epochs consumed before the step ...
    epochs: int = 0  # ... and after it
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # of the step, on their device; empty in on_start
    rate: float = 0.0  # the learning rate of the step
    evaluation: Mapping[str, float | str] | None = None  # the report of an evaluation after this step
    evaluation_due: bool = False  # the evaluation after this step was interrupted; the resumed run repeats it
    failure: EvaluationFailed | None = None  # of the evaluation after this step, which is then also due
    objective: float | None = None  # its value in this evaluation
    improved: bool = False  # this evaluation is one of the best so far by the objective
    save: bool = False  # set in on_step, in all processes: commit this step, and wait until that is done
    stop: str | None = None  # why this step is the last, in a word; None if it is not
    elapsed: float = 0.0  # seconds of training in all attempts
    waited: float = 0.0  # seconds spent waiting for data in this attempt
    log: Callable[[str, Any], None] = lambda name, value: None  # see ``Task.log``
    directory: Path = Path()  # of the run, for files; for a remote run.root a folder of this machine
    attempt: int = 0  # its number, from 1
    start_step: int = 0  # the step that this attempt started after; 0: from scratch


@dataclass(slots=True)
class TrainingSetup:
    """The parts of an attempt before its state is restored. ``on_build`` may change their public attributes, replace
    ``store.location``, remove ``callbacks`` that the configuration names (``own.NAME``, ``observer.NAME``), remove
    metric ``writers``, and lower the limits.
    """

    state: TrainState
    callbacks: dict[str, Callback]  # in the order in which they are called; "checkpoint" is the last
    store: CheckpointStore
    max_steps: int | None
    max_epochs: int | None
    max_seconds: float | None
    writers: dict[str, Any]  # name -> configuration of a metric writer, which is constructed after the restore
    directory: Path = Path()  # and ``attempt``: as those of ``Loop``
    attempt: int = 0


class Callback:
    """Base class that does nothing: override the methods for the moments you need, in this order. A callback with
    ``state_dict`` and ``load_state_dict`` is saved and restored; the tensors that it is given are on the CPU.

    The configuration's ``callbacks`` are called in their order, in every process of the run, in the training thread
    (except ``on_commit``). An exception ends the attempt as failed; the next one resumes from the last commit. Nothing
    is called for a moment whose method no callback overrides.

    Example::

        class GradientNoise(Callback):
            def on_gradients(self, state):
                for parameter in state.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad += 1e-3 * torch.randn_like(parameter.grad)
    """

    def on_build(self, setup: TrainingSetup) -> None:
        """All parts are built, and nothing is restored yet."""

    def on_resume(self, state: TrainState) -> None:
        """The state is restored (or initialised, at step 0); the random generators are set. Draw no random numbers."""

    def on_start(self, loop: Loop) -> None:
        """Before the first step of this attempt: at step 0, or right after a restore. ``loop.evaluation`` is set if the
        previous attempt did not finish the evaluation after the restored step; ``on_step`` then follows for this step.
        """

    def on_step_start(self, loop: Loop) -> None:
        """Before a step, whose data is there. ``loop.step`` is still that of the last one; ``position`` and ``rate``
        are those of the coming step.
        """

    def on_batch(self, loop: Loop, number: int, batch: Any) -> Any:
        """A micro-batch of this process, the ``number``-th of the step from 0, on the device, before the task sees it.
        Returns the batch to use instead, or None to leave it as it is.
        """

    def on_gradients(self, state: TrainState) -> None:
        """Before the optimizer step: gradients are summed over all processes and unscaled, and not clipped yet. They
        may be changed in place, alike in all processes. Not called by a task that makes its own optimizer steps.
        """

    def on_update(self, loop: Loop) -> None:
        """The step is done and its metrics are known; nothing is evaluated, and no ``on_step`` was called."""

    def on_evaluation(self, loop: Loop) -> None:
        """After an evaluation, whose report is ``loop.evaluation``; ``loop.objective`` and ``loop.improved`` are set
        only in ``on_step``.
        """

    def on_step(self, loop: Loop) -> None:
        """After every step and its evaluation, before anything is written. May add to ``loop.metrics``, request a
        commit of this step by ``loop.save = True``, and end training by setting ``loop.stop`` to a word: then all
        processes must do so, and the step is evaluated if it was not.
        """

    def on_save(self, loop: Loop) -> None:
        """The state of this step has been copied, and is about to be committed by the commit thread."""

    def on_commit(self, step: int) -> None:
        """A copy of the state of ``step`` is durable, and a resume would begin with it. Called in the commit thread,
        beside later steps: look at nothing that training changes. What it raises ends training after its next step.
        """

    def on_end(self, loop: Loop) -> None:
        """After the last step of this attempt, which is committed; ``loop.stop`` says why it is the last. The callbacks
        are called in reverse order.
        """

    def on_finish(self, directory: RunDirectory, result: Mapping[str, Any]) -> None:
        """The run is finished: weights are exported and the ``result`` is written."""

    def on_error(self, error: Exception) -> None:
        """The attempt ends with an error (Interrupted after a stop signal), in this process at least: make no call that
        waits for other processes. What this method raises is logged.
        """


class Observer(Callback):
    """A callback that does not affect what is computed: it is in neither the run's identity nor its checkpoints.
    The configuration's ``observers`` name it, or ``observed_by`` registers it for all attempts of a process.

    It is called after the configuration's callbacks (but before the step is saved), and has three moments more.
    For a registered one ``on_finish`` is called also if the run was finished before.
    """

    def on_command(self, directory: RunDirectory) -> None:
        """A command names a run. To a registered observer: nothing is read or written yet, and SystemExit ends the
        command. To a configured one: the attempt is claimed.
        """

    def on_instance(self, key: str, instance: Any) -> None:
        """An object was made from the configuration's ``key``, such as ``model`` or ``data.train``."""


observers: list[Observer] = []  # of this process, in the order in which they are called


@contextmanager
def observed_by(*more: Observer) -> Iterator[None]:
    """Within the block, these observers see every attempt of this process.

    Example::

        with observed_by(MyObserver()):
            runner.app.main()
    """
    observers.extend(more)
    try:
        yield
    finally:
        for observer in more:
            observers.remove(observer)


def methods_for(callbacks: Iterable[Callback], moment: str) -> list[Callable[..., Any]]:
    """The methods for a ``moment``, such as ``"on_step"``, of the callbacks that override it, by their class or by an
    attribute of the instance, in their order.
    """
    base = getattr(Observer, moment)
    methods = [getattr(each, moment, base) for each in callbacks]  # a Callback has no moments of an Observer
    return [method for method in methods if getattr(method, "__func__", method) is not base]


def notify(callbacks: Iterable[Callback], moment: str, *arguments: Any) -> None:
    """Call the methods for a ``moment``."""
    for call in methods_for(callbacks, moment):
        call(*arguments)

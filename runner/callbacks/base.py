"""The record of the loop and the moments at which callbacks are called."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from runner.state import TrainState


@dataclass(slots=True)
class Loop:
    """What the loop knows after a step. There is one record per attempt, which every step overwrites."""

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
    objective: float | None = None  # its value in this evaluation
    improved: bool = False  # this evaluation is one of the best so far by the objective
    stop: str | None = None  # why this step is the last, in a word; None if it is not
    elapsed: float = 0.0  # seconds of training in all attempts
    waited: float = 0.0  # seconds spent waiting for data in this attempt


class Callback:
    """Base class that does nothing: override the methods you need. A callback with ``state_dict`` and
    ``load_state_dict`` is saved and restored; the tensors that it is given are on the CPU.

    The configuration's ``callbacks`` are called in their order, in every process of the run, after an evaluation and
    before anything is written. They may add to ``loop.metrics``, and end training by setting ``loop.stop`` to a word;
    all processes must then do so, and the step is evaluated if it was not.
    """

    def on_start(self, loop: Loop) -> None:
        """Before the first step of this attempt: at step 0, or right after a restore. ``loop.evaluation`` is set if the
        previous attempt was interrupted before or during it.
        """

    def on_step(self, loop: Loop) -> None:
        """After every step."""

    def on_end(self, loop: Loop) -> None:
        """After the last step of this attempt; ``loop.stop`` says why it is the last."""

"""The record of the loop and the moments at which callbacks are called."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from runner.state import TrainState


@dataclass(slots=True)
class Loop:
    """What the loop knows after a step. One record for the whole run; it is overwritten, not made anew."""

    state: TrainState
    max_steps: int | None
    step: int = 0
    position: int = 0  # of the first sample of the step
    consumed: int = 0  # samples consumed by all steps
    epochs_before: int = 0  # whole epochs consumed before the step, and after it
    epochs: int = 0
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # of the step, on their device; empty on a resume
    rate: float = 0.0  # the learning rate of the step
    evaluation: Mapping[str, float | str] | None = None  # made after this step
    evaluation_due: bool = False  # an evaluation of this step was interrupted and will be made after the resume
    objective: float | None = None  # its value in the evaluation
    improved: bool = False  # the evaluation is one of the best so far by the objective
    stop: str | None = None  # why this step is the last
    elapsed: float = 0.0  # seconds of training in all attempts
    waited: float = 0.0  # seconds spent waiting for data in this attempt


class Callback:
    """Does nothing; override what matters. One with ``state_dict`` and ``load_state_dict`` is part of the state.

    Those of ``callbacks`` in the configuration are called in their order, in every process of the run: after an
    evaluation has been made, and before anything is written. They may add to ``loop.metrics``, and end the training
    with a word in ``loop.stop``; in all processes alike.
    """

    def on_start(self, loop: Loop) -> None:
        """Before the first step of this attempt: at step 0, or right after a restore. ``loop.evaluation`` is then the
        one that the attempt before should have made and could not.
        """

    def on_step(self, loop: Loop) -> None:
        """After every step."""

    def on_end(self, loop: Loop) -> None:
        """After the last step of this attempt; ``loop.stop`` says why it is the last."""

"""What a kill costs an experiment, and how often it pays to save."""

import math
from dataclasses import dataclass
from statistics import median

from runner.verify.run import Run

_SHARE = 0.01  # of the time, for saving


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, as measured: of a ``step``, ``resume`` (from the start of a process to its first step), ``stall`` of
    training in a save, and ``commit`` until it is durable; and the steps that the kills of the proof lost.
    """

    step: float
    resume: float
    stall: float
    commit: float
    lost_steps: int

    @property
    def every_steps(self) -> int:
        """The fewest steps between two checkpoints that keep their stalls below a hundredth of the time and let one
        be written before the next is due.
        """
        return max(1, math.ceil(self.stall / (_SHARE * self.step)), math.ceil(self.commit / self.step))

    def text(self) -> str:
        """The same for people."""
        return (
            f"a kill costs {self.resume:.1f} s until training goes on, and half of the steps between two checkpoints;\n"
            f"a save stalls training for {_time(self.stall)}, a step takes {_time(self.step)}: "
            f"checkpoint.every_steps={self.every_steps} keeps that\n"
            "below 1 %, as checkpoint.every=auto does by itself."
        )


def cost(undisturbed: Run, killed: Run, *, imports: float) -> Cost:
    """What the lives of a proof cost. ``imports`` are the seconds that a process takes before it reads its command."""
    lives = [*undisturbed.lives, *killed.lives]
    resumes = [life.of("resumed")[0]["seconds"] for life in lives if life.of("resumed")]
    steps = [event["took"] for life in undisturbed.lives for event in life.of("step")]
    beside = [life for life in killed.lives if "checkpoint.background=true" in life.ended.life.arguments]
    stalls = [event["stall"] for life in beside for event in life.of("save")]
    commits = [event["took"] for life in lives for event in life.of("committed")]
    pairs = zip(killed.lives, killed.lives[1:], strict=False)
    return Cost(
        step=_middle(steps[1:] or steps),
        resume=imports + _middle(resumes),
        stall=_middle(stalls),
        commit=_middle(commits),
        lost_steps=sum(max(0, before.last - after.first) for before, after in pairs),
    )


def _middle(seconds: list[float]) -> float:
    return median(seconds) if seconds else 1e-9


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"

"""What a kill costs an experiment, and how often it pays to save.

What was proven, or the first thing that was not: for people, for programs.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from runner.errors import printable
from runner.verify.causes import Cause
from runner.verify.diagnosis import Diagnosis
from runner.verify.difference import FirstDifference
from runner.verify.execution import RunTrace

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


def cost(undisturbed: RunTrace, killed: RunTrace, *, imports: float) -> Cost:
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one proof.

    It holds if there is no ``difference``, no ``refusal`` (what a life that failed said) and no problem in the
    ``audit`` of what the runs were trained on. ``cause`` belongs to any of them. ``scratch`` is where the runs are, if
    they were kept.
    """

    command: Sequence[str]
    undisturbed: RunTrace
    killed: RunTrace
    seconds: float
    difference: FirstDifference | None = None
    refusal: str = ""
    cause: Cause | None = None
    diagnosis: Diagnosis | None = None
    audit: Sequence[str] = ()
    cost: Cost | None = None
    checkpoints: int = 0
    scratch: str | None = None
    notes: Sequence[str] = ()
    html: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the experiment resumes exactly."""
        return self.difference is None and not self.refusal and not self.audit

    @property
    def proven(self) -> dict[str, Any]:
        """How much was tried."""
        evidence = self.undisturbed.evidence or {}
        lives = self.killed.lives
        moments = Counter(life.killed for life in lives if life.killed)
        return {
            "steps": max((life.last for life in self.undisturbed.lives), default=0),
            "samples": evidence.get("audit", {}).get("positions", 0),
            "kills": sum(moments.values()),
            "moments": dict(moments),
            "kills_of_one_process": sum(life.victim is not None for life in lives),
            "processes": max((life.ended.life.processes for life in self.undisturbed.lives), default=1),
            "attempts": len(lives),
            "workers": sorted({life.workers for life in [*self.undisturbed.lives, *lives]}),
            "checkpoints": self.checkpoints,
            "steps_done_again": self.cost.lost_steps if self.cost else 0,
            "seconds": round(self.seconds, 1),
        }

    def plain(self) -> dict[str, Any]:
        """The verdict as plain values."""
        found = self.difference
        return {
            "verdict": "PASS" if self.holds else "FAIL",
            "command": [*self.command],
            "proven": self.proven,
            "difference": None
            if found is None
            else {
                "step": found.step,
                "attempt": found.life + 1,
                "part": found.part,
                "where": found.where,
                "expected": found.expected,
                "found": found.found,
                "size": "; ".join(self._sizes(found)),
                "right_after_loading": found.restored,
            },
            "refusal": self.refusal or None,
            "cause": None if self.cause is None else {key: getattr(self.cause, key) for key in self.cause.__slots__},
            "tried": [*self.diagnosis.tried] if self.diagnosis else [],
            "audit": [*self.audit],
            "cost": None if self.cost is None else self._costs(self.cost),
            "lives": [
                {"first": life.first, "last": life.last, "workers": life.workers, "killed": life.killed}
                for life in self.killed.lives
            ],
            "notes": [*self.notes],
            "scratch": self.scratch,
            "html": self.html,
        }

    def text(self) -> str:
        """The verdict for people: in one look, and then the reasons."""
        proven = self.proven
        one, processes = proven["kills_of_one_process"], proven["processes"]
        many = f" ({one} of one process alone), {processes} processes" if processes > 1 else ""
        tried = (
            f"{proven['kills']} kills{many}, {proven['steps']} steps, {proven['attempts']} attempts, "
            f"{proven['samples']} samples, {' and '.join(map(str, proven['workers']))} workers, "
            f"{proven['seconds']:.0f} s"
        )
        said = (
            [f"PASS     {tried}", _PROVEN.format(**proven)] if self.holds else [f"FAIL     {tried}", *self._failure()]
        )
        said += [f"note     {note}" for note in self.notes]
        if self.cost is not None and self.holds:
            said.append(_indented("cost     ", self.cost.text()))
        if self.html:
            said.append(f"report   {self.html}")
        if self.scratch:
            said.append(f"kept     {self.scratch}: the runs, what each attempt printed (*.log) and noted (*.jsonl)")
        return printable("\n".join(said))

    def _failure(self) -> list[str]:
        said = []
        found = self.difference
        if found is not None:
            when = "right after loading" if found.restored else "the first that differs"
            said.append(f"step     {found.step}, {when}; attempt {found.life + 1}")
            said.append(f"part     {found.part}: {found.where}")
            said.append(f"differs  {_short(found.expected)} undisturbed, {_short(found.found)} killed")
            said += [f"         {line}" for line in self._sizes(found)]
        if self.refusal:
            said.append(_indented("error    ", self.refusal))
        said += [f"audit    {problem}" for problem in self.audit[:5]]
        if self.cause is not None:
            said.append(_indented("cause    " if self.cause.sure else "perhaps  ", self.cause.what))
            said.append(_indented("remedy   ", self.cause.remedy))
        return said

    def _sizes(self, found: FirstDifference) -> list[str]:
        """By how much, as far as it is known."""
        return [*filter(None, [found.size(), self.diagnosis.magnitude if self.diagnosis else ""])]

    def _costs(self, cost: Cost) -> dict[str, Any]:
        return {name: getattr(cost, name) for name in cost.__slots__} | {"every_steps": cost.every_steps}


_PROVEN = (
    "         Equal to the bit: losses, gradients and samples of every step, the state after steps and loads,\n"
    "         {checkpoints} checkpoints, evaluations, metric lines and final weights."
)


def json_text(verdict: Verdict) -> str:
    """The verdict as JSON."""
    return json.dumps(verdict.plain(), indent=1, default=str)


def _indented(label: str, text: str) -> str:
    return label + text.replace("\n", "\n" + " " * len(label))


def _short(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 90 else f"{text[:87]}..."

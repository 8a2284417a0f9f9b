"""The outcome of a proof, for people and for programs; and what a kill and a save cost."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    """Seconds, as measured: of a ``step``, of a ``resume`` (from the start of a process to its first step), for which
    a save ``stalls`` training, and until its ``commit`` is durable; and the steps that the kills of the proof lost.
    """

    step: float
    resume: float
    stall: float
    commit: float
    lost_steps: int

    @property
    def every_steps(self) -> int:
        """The fewest steps between two checkpoints for which their stalls take less than a hundredth of the time, and
        each is written before the next is due.
        """
        return max(1, math.ceil(self.stall / (_SHARE * self.step)), math.ceil(self.commit / self.step))

    def text(self) -> str:
        """The costs for people."""
        return (
            f"a kill costs {self.resume:.1f} s to resume, and half of the steps between two checkpoints;\n"
            f"a save stalls training for {_time(self.stall)}, a step takes {_time(self.step)}: "
            f"checkpoint.every_steps={self.every_steps} keeps that\n"
            "below 1 %, as checkpoint.every=auto does by itself."
        )


def cost(undisturbed: RunTrace, killed: RunTrace, *, imports: float) -> Cost:
    """The cost measured in two runs. ``imports``: seconds that a process takes before it reads its command."""
    attempts = [*undisturbed.attempts, *killed.attempts]
    steps = [event["took"] for _, event in undisturbed.steps()]
    background = [each for each in killed.attempts if "checkpoint.background=true" in each.request.arguments]
    pairs = zip(killed.attempts, killed.attempts[1:], strict=False)
    return Cost(
        step=_median(steps[1:] or steps),
        resume=imports + _median([each.select("resumed")[0]["seconds"] for each in attempts if each.select("resumed")]),
        stall=_median([event["stall"] for each in background for event in each.select("save")]),
        commit=_median([event["took"] for each in attempts for event in each.select("committed")]),
        lost_steps=sum(max(0, before.last - after.first) for before, after in pairs),
    )


def _median(seconds: list[float]) -> float:
    return median(seconds) if seconds else 1e-9


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one proof.

    It holds if there is no ``difference``, no ``refusal`` (the message of an attempt that failed) and no problem in the
    ``audit`` of the samples of the runs. ``cause`` belongs to any of these. ``scratch`` says where the runs are, if
    they were kept.
    """

    command: Sequence[str]
    undisturbed: RunTrace
    killed: RunTrace
    seconds: float = 0.0
    difference: FirstDifference | None = None
    refusal: str = ""
    cause: Cause | None = None
    diagnosis: Diagnosis | None = None
    audit: Sequence[str] = ()
    cost: Cost | None = None
    scratch: str | None = None
    notes: Sequence[str] = ()
    html: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the experiment resumes exactly."""
        return self.difference is None and not self.refusal and not self.audit

    @property
    def tried(self) -> Sequence[str]:
        """The repetitions that led to the cause, with their outcomes."""
        return self.diagnosis.tried if self.diagnosis else ()

    @property
    def proven(self) -> dict[str, Any]:
        """How much was tried."""
        evidence = [run.evidence or {} for run in (self.undisturbed, self.killed)]
        undisturbed, killed = self.undisturbed.attempts, self.killed.attempts
        moments = Counter(attempt.killed for attempt in killed if attempt.killed)
        return {
            "steps": max((attempt.last for attempt in undisturbed), default=0),
            "samples": evidence[0].get("audit", {}).get("positions", 0),
            "kills": sum(moments.values()),
            "moments": dict(moments),
            "kills_of_one_process": sum(attempt.victim is not None for attempt in killed),
            "processes": max((attempt.request.processes for attempt in undisturbed), default=1),
            "attempts": len(killed),
            "workers": sorted({attempt.workers for attempt in [*undisturbed, *killed]}),
            "checkpoints": sum(len(each.get("checkpoints", {})) for each in evidence) if killed else 0,
            "steps_done_again": self.cost.lost_steps if self.cost else 0,
            "seconds": round(self.seconds, 1),
        }

    def json(self) -> str:
        """The verdict for programs."""
        return json.dumps(self._plain(), indent=1, default=str)

    def _plain(self) -> dict[str, Any]:
        difference = self.difference
        return {
            "verdict": "PASS" if self.holds else "FAIL",
            "command": [*self.command],
            "proven": self.proven,
            "difference": difference
            and {
                "step": difference.step,
                "attempt": difference.attempt + 1,
                "part": difference.part,
                "where": difference.path,
                "expected": difference.expected,
                "found": difference.actual,
                "size": "; ".join(self._sizes(difference)),
                "right_after_loading": difference.restored,
            },
            "refusal": self.refusal or None,
            "cause": self.cause and asdict(self.cause),
            "tried": [*self.tried],
            "audit": [*self.audit],
            "cost": self.cost and asdict(self.cost) | {"every_steps": self.cost.every_steps},
            "lives": [
                {"first": each.first, "last": each.last, "workers": each.workers, "killed": each.killed}
                for each in self.killed.attempts
            ],
            "notes": [*self.notes],
            "scratch": self.scratch,
            "html": self.html,
        }

    def text(self) -> str:
        """The verdict for people: the result in one line, then the reasons."""
        proven = self.proven
        alone, processes = proven["kills_of_one_process"], proven["processes"]
        several = f" ({alone} of one process alone), {processes} processes" if processes > 1 else ""
        tried = (
            f"{proven['kills']} kills{several}, {proven['steps']} steps, {proven['attempts']} attempts, "
            f"{proven['samples']} samples, {' and '.join(map(str, proven['workers']))} workers, "
            f"{proven['seconds']:.0f} s"
        )
        lines = (
            [f"PASS     {tried}", _EQUAL.format(**proven)] if self.holds else [f"FAIL     {tried}", *self._failure()]
        )
        lines += [f"note     {note}" for note in self.notes]
        if self.cost is not None and self.holds:
            lines.append(_indented("cost     ", self.cost.text()))
        if self.html:
            lines.append(f"report   {self.html}")
        if self.scratch:
            lines.append(f"kept     {self.scratch}: the runs, output (*.log) and record (*.jsonl) of each attempt")
        return printable("\n".join(lines))

    def _failure(self) -> list[str]:
        lines = []
        difference = self.difference
        if difference is not None:
            when = "right after loading" if difference.restored else "the first that differs"
            lines.append(f"step     {difference.step}, {when}; attempt {difference.attempt + 1}")
            lines.append(f"part     {difference.part}: {difference.path}")
            lines.append(f"differs  {_short(difference.expected)} undisturbed, {_short(difference.actual)} killed")
            lines += [f"         {line}" for line in self._sizes(difference)]
        if self.refusal:
            lines.append(_indented("error    ", self.refusal))
        lines += [f"audit    {problem}" for problem in self.audit[:5]]
        if self.cause is not None:
            lines.append(_indented("cause    " if self.cause.sure else "perhaps  ", self.cause.what))
            lines.append(_indented("remedy   ", self.cause.remedy))
            lines += [f"where    {self.cause.where}"] if self.cause.where else []
        return lines

    def _sizes(self, difference: FirstDifference) -> list[str]:
        return [*filter(None, [difference.size(), self.diagnosis.magnitude if self.diagnosis else ""])]


_EQUAL = (
    "         Equal to the bit: losses, gradients and samples of every step, the state after steps and loads,\n"
    "         {checkpoints} checkpoints, evaluations, metric lines and final weights."
)


def _indented(label: str, text: str) -> str:
    return label + text.replace("\n", "\n" + " " * len(label))


def _short(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 90 else f"{text[:87]}..."

"""Why two runs differ: the run is repeated, undisturbed and killed once, with one thing after another held constant,
until the difference goes away.

Every repetition ends soon after the step that differed first, so together they cost about as much as the proof.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from runner.verify.campaign import ENDS, SHIFT_SECONDS, KillPlan, Progress, save_every
from runner.verify.causes import CAUSES, Cause, has_callbacks, of_callbacks, of_part, of_workers, unexplained
from runner.verify.difference import FirstDifference, first_difference
from runner.verify.execution import Executor, Kill, RunTrace

_MORE_STEPS = 8  # after the first that differed: what varies by chance may be equal in one step
_OF_WORKERS = ("data order", "augmentation", "generators", "data")  # parts that data workers have a hand in
# What may make two undisturbed runs differ, and how it is held constant: the cause, pins of the process, overrides.
_PINS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("pid", ("pid",), ()),
    ("time", ("time",), ()),
    ("entropy", ("entropy",), ()),
    ("threads", (), ("runtime.num_threads=1",)),
    ("turns", ("turns",), ()),
    ("kernel", (), ("runtime.deterministic=true",)),
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The cause of a difference, the repetitions that led to it, and by how much the states differ."""

    cause: Cause
    tried: tuple[str, ...]
    magnitude: str = ""


class Investigation:
    """Repeats a run until the cause of a difference is known."""

    def __init__(self, executor: Executor, plan: KillPlan, base: RunTrace, progress: Progress) -> None:
        self._executor = executor
        self._plan = plan
        self._base = base
        self._progress = progress
        self._tried: list[str] = []
        self._runs = 0
        self._until = 0  # the last step that is compared

    def diagnose(self, run: RunTrace, difference: FirstDifference) -> Diagnosis:
        """Find the cause of a difference between a killed run and the undisturbed one."""
        self._until = min(difference.step + _MORE_STEPS, self._plan.steps)
        cause = self._without_kills() or self._without_resume()
        magnitude = ""
        if cause is None:
            self._until = max(difference.step, 1)
            cause, magnitude = self._with_resume(run, difference)
        return Diagnosis(cause, tuple(self._tried), magnitude)

    def _without_kills(self) -> Cause | None:
        """The cause if runs differ although none is killed."""
        again = self._run()
        if self._difference("undisturbed, a second time", again):
            return self._hold(again)
        silent = self._run(silent=True)
        if difference := self._difference("undisturbed, its state taken for checkpoints alone", silent):
            return CAUSES["saving"].seen_in(difference.part, difference.path)
        other = self._run(server=1)
        if difference := self._difference("undisturbed, in a process with another hash seed", other):
            if self._difference("the same again", self._run(server=1), other):
                return self._hold(other)
            return CAUSES["hash"].seen_in(difference.part)
        later = self._run(shift=SHIFT_SECONDS)
        if difference := self._difference("undisturbed, at another time of another day", later):
            return CAUSES["time"].seen_in(difference.part, difference.path)
        for workers in {*self._plan.workers} - {self._base.attempts[0].workers}:
            again = self._run(workers=workers)
            if difference := self._difference(f"undisturbed, {workers} data workers", again):
                # With equal data it is something else, which happens to differ now.
                return of_workers(difference) if difference.part in _OF_WORKERS else self._hold(again)
        return None

    def _hold(self, again: RunTrace) -> Cause:
        """The cause whose pin makes undisturbed runs equal."""
        difference = first_difference(again, self._base, until=self._until)
        assert difference is not None
        for name, pins, overrides in _PINS:
            first, second = (self._run(*overrides, pins=pins) for _ in range(2))
            if first.failure and first.failure.kind == "kernel":
                self._note(f"undisturbed, {name} held constant", "refused by torch")
                return CAUSES[name].seen_in(difference.part)
            if first.failure:
                self._note(f"undisturbed twice, {name} held constant", "does not run")
                continue
            equal = not self._difference(f"undisturbed twice, {name} held constant", second, first)
            if equal and not self._difference("the same once more", self._run(*overrides, pins=pins), first):
                return CAUSES[name].seen_in(difference.part, difference.path)
        return unexplained(difference).seen_in(difference.part, _paths(difference))

    def _without_resume(self) -> Cause | None:
        """The cause if a run differs that is killed before the first step, and started again."""
        run = self._new()
        for kill in (Kill("start"), Kill("start"), None):
            self._attempt(run, kill=kill)
        difference = self._difference("killed before the first step and started again", run)
        return CAUSES["attempts"].seen_in(difference.part, difference.path) if difference else None

    def _with_resume(self, run: RunTrace, difference: FirstDifference) -> tuple[Cause, str]:
        """The cause of the difference after a single kill and resume, with one thing after another left out."""
        step = run.attempts[difference.attempt].first or max(1, self._until // 2)
        reproduced, magnitude = self._kill("killed once and resumed", step)
        if reproduced is None:
            return self._with_stop(run, difference)
        if has_callbacks(reproduced):
            without, _ = self._kill("the same without your callbacks", step, pins=("callbacks",))
            if without is None:
                return of_callbacks(reproduced), magnitude
        evaluated = any(event["evaluation"] for _, event in self._base.steps() if event["step"] <= step)
        if difference.part != "data order" and evaluated:
            without, _ = self._kill("the same without evaluation", step, pins=("evaluation",))
            if without is None:
                return CAUSES["evaluation"].seen_in(reproduced.part, _paths(reproduced)), magnitude
        if reproduced.part == "augmentation":
            self._kill("the same with one batch for all steps", step, pins=("batches",))
        return of_part(reproduced), magnitude

    def _with_stop(self, run: RunTrace, difference: FirstDifference) -> tuple[Cause, str]:
        """The cause of a difference that SIGKILL does not reproduce: the last stop by SIGTERM, or an unsure one."""
        stopped = [attempt for attempt in run.attempts[: difference.attempt] if attempt.stopped]
        if stopped:
            kill = Kill(str(stopped[-1].killed), stopped[-1].last)
            again, magnitude = self._kill(f"{ENDS[kill.moment]} once and resumed", kill.step, kill=kill)
            if again is not None:
                return CAUSES["stopping"].seen_in(again.part, again.path), magnitude
        return replace(of_part(difference), sure=False), ""

    def _kill(
        self, trial: str, step: int, *, pins: tuple[str, ...] = (), kill: Kill | None = None
    ) -> tuple[FirstDifference | None, str]:
        """Kill after ``step`` is committed, resume, and compare with an undisturbed run under the same pins."""
        base, run = self._new(), self._new()
        self._attempt(base, pins=pins, dump=self._until)
        self._attempt(run, pins=pins, kill=kill or Kill("step", step + 1), every=step)
        self._attempt(run, pins=pins, dump=self._until, every=step)
        difference = self._difference(trial, run, base)
        magnitude = _magnitude(run, base) if difference else ""
        self._executor.remove_large_files(run, base)
        return difference, magnitude

    def _run(self, *overrides: str, **fields: Any) -> RunTrace:
        run = self._new()
        self._attempt(run, *overrides, **fields)
        self._executor.remove_large_files(run)
        return run

    def _attempt(
        self, run: RunTrace, *overrides: str, workers: int | None = None, every: int | None = None, **fields: Any
    ) -> None:
        self._executor.attempt(
            run,
            "checkpoint.background=false",
            *save_every(every or self._plan.every),
            *overrides,
            workers=self._plan.workers[0] if workers is None else workers,
            steps=min(self._until + 1, self._plan.limit),
            **fields,
        )

    def _new(self) -> RunTrace:
        self._runs += 1
        return RunTrace(f"again-{self._runs}")

    def _difference(self, trial: str, run: RunTrace, base: RunTrace | None = None) -> FirstDifference | None:
        difference = first_difference(run, base or self._base, until=self._until)
        self._note(trial, f"differs at step {difference.step}: {difference.part}" if difference else "equal")
        return difference

    def _note(self, trial: str, outcome: str) -> None:
        self._tried.append(f"{trial}: {outcome}")
        self._progress(f"  {self._tried[-1]}")


def _paths(difference: FirstDifference) -> str:
    return ", ".join(path for path, _, _ in difference.remembered[:3])


def _magnitude(run: RunTrace, base: RunTrace) -> str:
    """By how much the dumped states of two runs differ."""
    before, after = (_dumped(each) for each in (base, run))
    sizes = {
        name: float((tensor.double() - after[name].double()).abs().max())
        for name, tensor in before.items()
        if name in after and tensor.shape == after[name].shape and tensor.numel() and tensor.is_floating_point()
    }
    differing = {name: size for name, size in sizes.items() if size > 0}
    if not differing:
        return ""
    name = max(differing, key=lambda each: differing[each])
    return (
        f"{len(differing)} of {len(sizes)} tensors after that step, most of all {name} by up to {differing[name]:.3g}"
    )


def _dumped(run: RunTrace) -> dict[str, torch.Tensor]:
    file = run.attempts[-1].request.dumped
    return torch.load(file, weights_only=True) if file.exists() else {}

"""Why two runs differ: the run is repeated, undisturbed and killed once, with one thing after the other held fast,
until the difference goes away.

Every repetition ends soon after the step that differed first, so together they cost about as much as the proof.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from runner.verify.campaign import KillPlan, Tell, saving
from runner.verify.causes import CAUSES, Cause, has_callbacks, of_callbacks, of_chance, of_part, of_process
from runner.verify.difference import FirstDifference, first
from runner.verify.execution import Executor, Kill, RunTrace, dumped

_ONE_THREAD = ("runtime.num_threads=1",)
_STRICT = ("runtime.deterministic=true",)
_MORE = 8  # steps after the first that differed: what varies may be equal in one by chance
_OF_WORKERS = ("data order", "augmentation", "generators", "data")  # parts that data workers have a hand in
# What may make two undisturbed runs differ, and how it is held fast: pins of the process, overrides.
_PINS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("pid", ("pid",), ()),
    ("time", ("time",), ()),
    ("entropy", ("entropy",), ()),
    ("threads", (), _ONE_THREAD),
    ("turns", ("turns",), ()),
    ("kernel", (), _STRICT),
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The difference that was reproduced, its cause, and how that was found."""

    difference: FirstDifference
    cause: Cause
    tried: tuple[str, ...]
    magnitude: str = ""


class Investigation:
    """Repeats a run until it knows what makes it differ."""

    def __init__(self, stage: Executor, plan: KillPlan, base: RunTrace, tell: Tell) -> None:
        self.stage = stage
        self.plan = plan
        self.base = base
        self.tried: list[str] = []
        self._tell = tell
        self._runs = 0
        self._until = 0

    def diagnose(self, run: RunTrace, difference: FirstDifference) -> Diagnosis:
        """Find the cause of a difference between a killed run and the undisturbed one."""
        self._until = min(difference.step + _MORE, self.plan.steps)
        cause = self._of_undisturbed() or self._of_restarting()
        magnitude = ""
        if cause is None:
            self._until = max(difference.step, 1)
            cause, magnitude = self._of_resuming(run, difference)
        return Diagnosis(difference, cause, tuple(self.tried), magnitude)

    def _of_undisturbed(self) -> Cause | None:
        """Whether it differs although nothing was killed."""
        again = self._run()
        if self._differs("undisturbed, a second time", again):
            return self._held(again)
        found = self._differs("undisturbed, its state taken for checkpoints alone", self._run(silent=True))
        if found:
            return CAUSES["saving"].at(found.part, found.where)
        other = self._run(server=1)
        found = self._differs("undisturbed, in a process with another hash seed", other)
        if found and not self._differs("the same again", self._run(server=1), other):
            return CAUSES["hash"].at(found.part)
        if found:
            return self._held(other)
        for workers in {*self.plan.workers} - {self.base.lives[0].workers}:
            again = self._run(workers=workers)
            found = self._differs(f"undisturbed, {workers} data workers", again)
            if found and found.part in _OF_WORKERS:
                return of_process(found)
            if found:  # the same data makes something else, as it happens
                return self._held(again)
        return None

    def _held(self, again: RunTrace) -> Cause:
        """What has to be held fast for two undisturbed runs to be equal."""
        found = first(again, self.base, until=self._until)
        assert found is not None
        for name, pins, overrides in _PINS:
            one, other = (self._run(*overrides, pins=pins) for _ in range(2))
            if one.failed and "deterministic implementation" in one.failed.output:
                self._note(f"undisturbed, {name} held fast", "refused by torch")
                return CAUSES[name].at(found.part)
            if one.failed:
                self._note(f"undisturbed twice, {name} held fast", "does not run")
                continue
            equal = not self._differs(f"undisturbed twice, {name} held fast", other, one)
            if equal and not self._differs("the same once more", self._run(*overrides, pins=pins), one):
                return CAUSES[name].at(found.part, found.where)
        return of_chance(found).at(found.part, _names(found))

    def _of_restarting(self) -> Cause | None:
        """Whether it differs although nothing was resumed: killed before the first step, and begun again."""
        run = self._new()
        for kill in (Kill("start"), Kill("start"), None):
            self._live(run, kill=kill)
        found = self._differs("killed before the first step and started again", run)
        return CAUSES["attempts"].at(found.part, found.where) if found else None

    def _of_resuming(self, run: RunTrace, difference: FirstDifference) -> tuple[Cause, str]:
        """What a single kill and resume changes, with one thing after the other held fast."""
        life = run.lives[difference.life]
        cut = life.first or max(1, self._until // 2)
        found, magnitude = self._killed("killed once and resumed", cut)
        if found is None:
            return replace(of_part(difference), sure=False), ""
        if has_callbacks(found):
            without, _ = self._killed("the same without your callbacks", cut, pins=("callbacks",))
            if without is None:
                return of_callbacks(found), magnitude
        if difference.part != "data order" and self._evaluated(cut):
            without, _ = self._killed("the same without evaluation", cut, pins=("evaluation",))
            if without is None:
                return CAUSES["evaluation"].at(found.part, _names(found)), magnitude
        if found.part == "augmentation":
            self._killed("the same with one batch for all steps", cut, pins=("batches",))
        return of_part(found), magnitude

    def _killed(self, what: str, cut: int, *, pins: tuple[str, ...] = ()) -> tuple[FirstDifference | None, str]:
        """Kill after step ``cut`` is committed, resume, compare with an undisturbed run under the same pins."""
        base, run = self._new(), self._new()
        self._live(base, pins=pins, dump=self._until)
        self._live(run, pins=pins, kill=Kill("step", cut + 1), every=cut)
        self._live(run, pins=pins, dump=self._until, every=cut)
        found = self._differs(what, run, base)
        magnitude = _magnitude(run, base) if found else ""
        self.stage.forget(run, base)
        return found, magnitude

    def _evaluated(self, cut: int) -> bool:
        return any(e["evaluation"] for _, e in self.base.steps() if e["event"] == "step" and e["step"] <= cut)

    def _run(self, *overrides: str, **how: Any) -> RunTrace:
        run = self._new()
        self._live(run, *overrides, **how)
        self.stage.forget(run)
        return run

    def _live(
        self, run: RunTrace, *overrides: str, workers: int | None = None, every: int | None = None, **how: Any
    ) -> None:
        count = self.plan.workers[0] if workers is None else workers
        more = ("checkpoint.background=false", *saving(every or self.plan.every), *overrides)
        self.stage.live(run, *more, workers=count, steps=min(self._until + 1, self.plan.limit), **how)

    def _new(self) -> RunTrace:
        self._runs += 1
        return RunTrace(f"again-{self._runs}")

    def _differs(self, what: str, run: RunTrace, base: RunTrace | None = None) -> FirstDifference | None:
        found = first(run, base or self.base, until=self._until)
        self._note(what, f"differs at step {found.step}: {found.part}" if found else "equal")
        return found

    def _note(self, what: str, came_of_it: str) -> None:
        self.tried.append(f"{what}: {came_of_it}")
        self._tell(f"  {self.tried[-1]}")


def _names(found: FirstDifference) -> str:
    return ", ".join(path for path, _, _ in found.remembered[:3])


def _magnitude(run: RunTrace, base: RunTrace) -> str:
    """By how much the states of two runs differ where both wrote them down."""
    one, other = (_dumped(each) for each in (base, run))
    sizes = {
        name: float((one[name].double() - other[name].double()).abs().max())
        for name in one
        if name in other
        and one[name].shape == other[name].shape
        and one[name].numel()
        and one[name].is_floating_point()
    }
    differing = {name: size for name, size in sizes.items() if size > 0}
    if not differing:
        return ""
    name = max(differing, key=lambda each: differing[each])
    return (
        f"{len(differing)} of {len(sizes)} tensors after that step, most of all {name} by up to {differing[name]:.3g}"
    )


def _dumped(run: RunTrace) -> dict[str, torch.Tensor]:
    file = dumped(run.lives[-1])
    return torch.load(file, weights_only=True) if file.exists() else {}

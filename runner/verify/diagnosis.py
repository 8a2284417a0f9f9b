"""Why two runs differ: the run is repeated, undisturbed and killed once, with one thing after another held constant,
until the difference goes away.

Then memory is tried: what the undisturbed run remembers at the kill is put into the resumed process, before its first
step. Only memory that makes the two go on alike is the cause.

Every repetition ends soon after the step that differed first, so together they cost about as much as the proof.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from runner.verify import source
from runner.verify.campaign import ENDS, SHIFT_SECONDS, KillPlan, Progress, save_every
from runner.verify.causes import CAUSES, Cause, of_memory, of_part, of_workers, unexplained
from runner.verify.difference import FirstDifference, first_difference, suspects
from runner.verify.execution import Executor, Kill, RunTrace
from runner.verify.fingerprint import UNSEEN
from runner.verify.memory import PROCESS

_SINGLE = 8  # suspects that are tried one by one
# Where to look first for the memory behind a part, and the method behind a cause.
_NEAREST = {
    "data order": ("data.",),
    "augmentation": ("data.",),
    "generators": ("data.",),
    "scheduler": ("scheduler",),
    "model": ("optimizer",),
    "optimizer": ("optimizer",),
    "end": ("callbacks.",),
}
_METHODS = {
    "saving": "state_dict",
    "restoring": "load_state_dict",
    "stopping": "load_state_dict",
    "evaluation": "evaluation_step",
}
_SETTERS = {"getcwd": "chdir"}  # of settings of the process; for others "set" stands where "get" does
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
        self._first = self._until = 0  # steps: the first that differs, and the last that is compared
        self._killed = base  # the last run that was killed and resumed
        made = base.attempts[0].select("made")
        self._sources = {key: places for event in made for key, places in event["sources"].items()}
        reached = base.attempts[0].select("reached")
        self._reached: dict[str, str] = reached[0]["reached"] if reached else {}

    def diagnose(self, run: RunTrace, difference: FirstDifference) -> Diagnosis:
        """Find the cause of a difference between a killed run and the undisturbed one."""
        self._until = min(difference.step + _MORE_STEPS, self._plan.steps)
        self._first = max(difference.step, 1)
        cause = self._without_kills() or self._without_resume()
        magnitude = ""
        if cause is None:
            self._until = self._first
            cause, magnitude = self._with_resume(run, difference)
        self._executor.remove_large_files(self._base)
        where = cause.where or self._line(cause.kind, difference.part)
        return Diagnosis(replace(cause, where=where), tuple(self._tried), magnitude)

    def _line(self, kind: str, part: str) -> str:
        """The line of the user's object in which a part is made."""
        data = ("data order", "augmentation", "data")
        key = "data.train" if part in data else part.replace("callback.own.", "callbacks.")
        names = [_METHODS[kind]] if kind in _METHODS else []
        return source.line_of(names, self._sources.get(key) or self._sources.get("task", []))

    def _without_kills(self) -> Cause | None:
        """The cause if runs differ although none is killed. Makes a run of the same length the one to compare with."""
        again = self.run(dump=self._first)
        if difference := self.differs("undisturbed, a second time", again):
            if self._equal("the same again", 2, again):
                whole = self.run(steps=self._plan.limit)
                if self.differs("undisturbed, with as many steps as the killed run", whole):
                    return CAUSES["length"].seen_in(difference.part, difference.path)
            else:
                return self.hold(difference)
        self._base = again
        silent = self.run(silent=True)
        if difference := self.differs("undisturbed, its state taken for checkpoints alone", silent):
            return CAUSES["saving"].seen_in(difference.part, difference.path)
        rest = {*self._plan.workers} - {self._plan.workers[0]}
        workers = max(rest, default=None)
        elsewhere = self.run(server=1, shift=SHIFT_SECONDS, workers=workers)
        trial = "undisturbed, another hash seed, time, day and number of workers at once"
        return self._elsewhere(rest) if self.differs(trial, elsewhere) or len(rest) > 1 else None

    def _elsewhere(self, workers: Iterable[int]) -> Cause | None:
        """The cause if an undisturbed run differs in another process, at another time, or with other ``workers``."""
        other = self.run(server=1)
        if difference := self.differs("undisturbed, in a process with another hash seed", other):
            if self._equal("the same again", 1, other, server=1) and self._equal("with the first hash seed again", 1):
                return CAUSES["hash"].seen_in(difference.part)
            return self.hold(difference)
        later = self.run(shift=SHIFT_SECONDS)
        if difference := self.differs("undisturbed, at another time of another day", later):
            return replace(CAUSES["time"].seen_in(difference.part, difference.path), where=_asked(later))
        for number in workers:
            again = self.run(workers=number)
            if difference := self.differs(f"undisturbed, {number} data workers", again):
                # With equal data it is something else, which happens to differ now.
                same = difference.part in _OF_WORKERS and self._equal("the same again", 1, again, workers=number)
                return of_workers(difference) if same else self.hold(difference)
        return None

    def _equal(self, trial: str, times: int, base: RunTrace | None = None, **fields: Any) -> bool:
        """Whether so many more runs are equal."""
        return not any(self.differs(trial, self.run(**fields), base) for _ in range(times))

    def hold(self, difference: FirstDifference) -> Cause:
        """The cause whose pin makes undisturbed runs equal, which are not so without: neither before nor after."""
        varies = True
        for name, pins, overrides in _PINS:
            first, second = (self.run(*overrides, pins=pins) for _ in range(2))
            if first.failure and first.failure.kind == "kernel":
                self._note(f"undisturbed, {name} held constant", "refused by torch")
                return replace(CAUSES[name].seen_in(difference.part), where=first.failure.where)
            if first.failure:
                self._note(f"undisturbed twice, {name} held constant", "does not run")
                continue
            equal = not self.differs(f"undisturbed twice, {name} held constant", second, first)
            if equal and not self.differs("the same once more", self.run(*overrides, pins=pins), first):
                varies = not self._equal("undisturbed again, nothing held constant", 2)
                if varies:
                    cause = CAUSES[name].seen_in(difference.part, difference.path)
                    return replace(cause, where=_asked(first))
        cause = replace(unexplained(difference), sure=varies).seen_in(difference.part, _paths(difference))
        return cause.reaching(self._reached)

    def _without_resume(self) -> Cause | None:
        """The cause if a run differs that is killed before the first step, and started again."""
        run = self._new()
        for kill in (Kill("start"), Kill("start"), None):
            self._attempt(run, kill=kill)
        difference = self.differs("killed before the first step and started again", run)
        if difference is None:
            return None
        return CAUSES["attempts"].seen_in(difference.part, difference.path).reaching(self._reached)

    def _with_resume(self, run: RunTrace, difference: FirstDifference) -> tuple[Cause, str]:
        """The cause of the difference after a single kill and resume, with one thing after another left out."""
        step = run.attempts[difference.attempt].first or max(1, self._until // 2)
        reproduced, magnitude = self._kill("killed once and resumed", step)
        if reproduced is None:
            return self._with_stop(run, difference)
        cause = None if reproduced.restored else self._convict(reproduced, step)
        evaluated = any(event["evaluation"] for _, event in self._base.steps() if event["step"] <= step)
        if difference.part != "data order" and evaluated and (cause is None or cause.kind != "callback memory"):
            without, _ = self._kill("the same without evaluation", step, pins=("evaluation",))
            if without is None:
                evaluation = CAUSES["evaluation"].seen_in(reproduced.part, _paths(reproduced))
                return replace(evaluation, where=cause.where if cause else ""), magnitude
        return cause or of_part(reproduced), magnitude

    def _convict(self, difference: FirstDifference, step: int) -> Cause | None:
        """The memory that makes a resumed process go on as the undisturbed one does; else, as a guess, memory that
        cannot be tried.
        """
        resumed = self._killed.attempts[-1].select("resumed")
        groups = suspects(difference, resumed[0] if resumed else {})
        unseen = {path: words for path, words in self._base.by_step()[step]["memory"].items() if UNSEEN in words}
        trial = _Trial(self, step, [*groups, *(path for path in unseen if path not in groups)])
        paths = trial.minimal(difference.part)
        if paths:
            cause = of_memory([entry for path in paths for entry in groups.get(path, [(path, unseen.get(path), None)])])
        elif rest := [path for path in groups if path not in trial.tested]:
            cause = of_memory([entry for path in rest for entry in groups[path]], sure=False)
        else:
            rest = [path for path in unseen if path not in trial.tested][:3]
            opaque = ", ".join(f"{path} ({unseen[path]})" for path in rest)
            cause = of_part(difference)
            if not opaque:
                return cause
            cause = replace(cause, what=f"{cause.what}. Not looked into: {opaque}")
        return replace(cause, where=self._line_of((paths or rest)[0]))

    def _line_of(self, path: str) -> str:
        """The line that changes memory: of the object that has it, or else of another."""
        root = next((key for key in self._sources if path.startswith(key)), "task")
        names = re.findall(r"\w+", re.sub(r" \((its (value|position|object)|a .*?)\)", "", path))[::-1]
        if path.startswith(PROCESS):
            names = [_SETTERS.get(name, name.replace("get", "set", 1)) for name in names]
        others = sorted((key for key in self._sources if key != root), key=lambda key: key.startswith("data."))
        places = [place for key in others for place in self._sources[key]]
        return source.line_of(names, self._sources.get(root, []), places)

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
        base, run = self._base, self._new()
        if pins:
            base = self.run(pins=pins, dump=self._until)
        self._attempt(run, pins=pins, kill=kill or Kill("step", step + 1), every=step)
        self._attempt(run, pins=pins, dump=self._until, every=step)
        self._killed = run
        difference = self.differs(trial, run, base)
        magnitude = _magnitude(run, base) if difference else ""
        self._executor.remove_large_files(run, *([base] if pins else []))
        return difference, magnitude

    def resumed(self, step: int, **fields: Any) -> RunTrace:
        """A run that is killed after ``step`` is committed, and resumed by an attempt with ``fields``."""
        run = self._new()
        self._attempt(run, kill=Kill("step", step + 1), every=step)
        self._attempt(run, every=step, **fields)
        return run

    def run(self, *overrides: str, **fields: Any) -> RunTrace:
        run = self._new()
        self._attempt(run, *overrides, **fields)
        if not {"take", "dump"} & {*fields}:
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
            **{"steps": min(self._until + 1, self._plan.limit), **fields},
        )

    def _new(self) -> RunTrace:
        self._runs += 1
        return RunTrace(f"again-{self._runs}")

    def differs(self, trial: str, run: RunTrace, base: RunTrace | None = None) -> FirstDifference | None:
        difference = first_difference(run, base or self._base, until=self._until)
        failure = run.failure
        if difference is None and failure:
            last = len(run.attempts) - 1
            difference = FirstDifference(run.attempts[last].last, last, "error", failure.message, "none", "refused")
        self._note(trial, f"differs at step {difference.step}: {difference.part}" if difference else "equal")
        return difference

    def _note(self, trial: str, outcome: str) -> None:
        self._tried.append(f"{trial}: {outcome}")
        self._progress(f"  {self._tried[-1]}")


class _Trial:
    """Memory on trial: ``paths`` are taken from an undisturbed run after ``step``, and put into resumed ones."""

    def __init__(self, lives: Investigation, step: int, paths: list[str]) -> None:
        self._lives = lives
        self._step = step
        self._paths = paths
        self.tested: set[str] = set()  # which could be put into another process
        self._base = lives.run(take=step, suspects=tuple(paths)) if paths else None

    def minimal(self, part: str) -> list[str]:
        """The fewest paths that make the difference go away; none if all of them do not."""
        paths = sorted(self._paths, key=lambda path: not path.startswith(_NEAREST.get(part, ("task", "model"))))
        if not paths or not self._equal(paths):
            single = paths[:_SINGLE] if len(paths) > 1 else []  # one of them may have broken the process
            return next(([path] for path in single if path in self.tested and self._equal([path])), [])
        while len(paths) > 1:
            half = len(paths) // 2
            better = next((each for each in (paths[:half], paths[half:]) if self._equal(each)), None)
            if better is None:
                break
            paths = better
        for path in reversed(paths[:_SINGLE]) if len(paths) > 1 else ():
            others = [each for each in paths if each != path]
            if others and self._equal(others):
                paths = others
        return [path for path in paths if path in self.tested]

    def _equal(self, paths: list[str]) -> bool:
        assert self._base is not None
        taken = str(self._base.attempts[-1].request.record)
        run = self._lives.resumed(self._step, put=taken, suspects=tuple(paths))
        put = {path for event in run.attempts[-1].select("put") for path in event["paths"]}
        self.tested |= put
        names = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        return bool(put) and not self._lives.differs(f"the same with {names} of the undisturbed run", run, self._base)


def _asked(run: RunTrace) -> str:
    """The user's lines that asked for what was held constant or shifted in a run."""
    lines = [line for event in run.attempts[-1].select("reached") for line in event["pinned"]]
    return ", ".join(lines[:3])


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

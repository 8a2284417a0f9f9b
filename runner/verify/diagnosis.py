"""Why two runs differ: the run is repeated, undisturbed and killed once, with one thing after another held constant,
until the difference goes away.

Then memory is tried: memory that the undisturbed run has at the kill is put into the resumed process, before its first
step. Only memory that makes the two go on alike is the cause.

Every repetition ends soon after the step that differed first, so together they cost about as much as the proof.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from runner.verify import source
from runner.verify.campaign import ENDS, SHIFT_SECONDS, KillPlan, Progress, save_every
from runner.verify.causes import CAUSES, Cause, of_memory, of_part, of_workers, unexplained
from runner.verify.difference import FirstDifference, first_difference, suspects
from runner.verify.execution import Executor, Kill, RunTrace
from runner.verify.fingerprint import UNSEEN
from runner.verify.memory import HOOKS, PROCESS

_CHUNKS = 8  # suspects, or groups of them, that are tried or left out one by one
# Where to look first for the memory behind a part, and the methods behind a cause.
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
    "gc": "__del__ finalize get_objects get_count WeakSet WeakValueDictionary",
}
_SETTERS = {"getcwd": "chdir"}  # other settings of the process have "set" for "get"
_MORE_STEPS = 8  # compared after the first that differed: chance may give equal values in a single step
_OF_WORKERS = ("data order", "augmentation", "generators", "data")  # parts that data workers compute
# Causes by which two undisturbed runs may differ, and the override that holds each constant; None: a pin does.
_CONSTANT = {
    "pid": None,
    "time": None,
    "entropy": None,
    "gc": None,
    "threads": "runtime.num_threads=1",
    "kernel": "runtime.deterministic=true",
}


class Investigation:
    """Repeats a run until the cause of a difference is known. ``tried`` has the repetitions with their outcomes."""

    def __init__(self, executor: Executor, plan: KillPlan, base: RunTrace, progress: Progress) -> None:
        self.tried: list[str] = []
        self._executor = executor
        self._plan = plan
        self._base = base
        self._progress = progress
        self._runs = 0
        self._until = 0  # the last step that is compared
        self._new_machine = False  # whether resumed attempts lack the temporary files of attempts before
        self._killed = base  # the last run that was killed and resumed
        self._sources = base.sources
        self._reached: dict[str, str] = (base.evidence or {}).get("reached", {})

    def diagnose(self, run: RunTrace, difference: FirstDifference) -> Cause:
        """Find the cause of a difference between a killed run and the undisturbed one."""
        self._until = min(difference.step + _MORE_STEPS, self._plan.steps)
        self._new_machine = run.attempts[difference.attempt].request.new_machine
        cause = self._without_kills() or self._without_resume()
        if cause is None:
            self._until = max(difference.step, 1)
            cause = self._with_resume(run, difference)
        self._executor.remove_files(self._base)
        return replace(cause, where=cause.where or self._line(cause.kind, difference.part))

    def _line(self, kind: str, part: str) -> str:
        """The line of the user's object in which a part is computed."""
        data = ("data order", "augmentation", "data")
        key = "data.train" if part in data else part.replace("callback.own.", "callbacks.")
        return source.line_of(_METHODS.get(kind, "").split(), self._sources.get(key) or self._sources.get("task", []))

    def _without_kills(self) -> Cause | None:
        """The cause if runs differ although none is killed. Others are then compared with a run of the same length."""
        again = self.run()
        if difference := self.differs("undisturbed, a second time", again):
            if self._equal("the same again", 2, again):  # only the first run of all differs
                whole = self.run(steps=self._plan.limit)
                if self.differs("undisturbed, with as many steps as the killed run", whole):
                    if self._equal("the same with fewer steps", 1, whole, steps=self._until):
                        return CAUSES["files"].seen_in(difference.part, difference.path).reaching(self._reached)
                    if self._base.attempts[0].request.steps != self._plan.limit:
                        return CAUSES["length"].seen_in(difference.part, difference.path)
                    return self.cause_by_pin(difference)
            else:
                return self.cause_by_pin(difference)
        self._base = again
        silent = self.run(silent=True)
        if difference := self.differs("undisturbed, its state taken for checkpoints alone", silent):
            pinned = self.run(pins=("gc",), silent=True)
            of_gc = not self.differs("the same, garbage collected in every step", pinned, self.run(pins=("gc",)))
            of_gc = of_gc or "the garbage collector" in self._reached
            return CAUSES["gc" if of_gc else "saving"].seen_in(difference.part, difference.path)
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
            return self.cause_by_pin(difference)
        later = self.run(shift=SHIFT_SECONDS)
        if difference := self.differs("undisturbed, at another time of another day", later):
            return replace(CAUSES["time"].seen_in(difference.part, difference.path), where=_callers(later))
        for number in workers:
            again = self.run(workers=number)
            if difference := self.differs(f"undisturbed, {number} data workers", again):
                # With equal data it is something else, which happens to differ now.
                same = difference.part in _OF_WORKERS and self._equal("the same again", 1, again, workers=number)
                return of_workers(difference) if same else self.cause_by_pin(difference)
        return None

    def _equal(self, trial: str, times: int, base: RunTrace | None = None, **fields: Any) -> bool:
        """Whether so many more runs are equal."""
        return not any(self.differs(trial, self.run(**fields), base) for _ in range(times))

    def cause_by_pin(self, difference: FirstDifference) -> Cause:
        """The cause whose pin makes undisturbed runs equal, if they differ without the pin, before and after."""
        varies = True
        for name, override in _CONSTANT.items():
            overrides, pins = ([override], ()) if override else ([], (name,))
            first, second = (self.run(*overrides, pins=pins) for _ in range(2))
            if first.failure and first.failure.kind == "kernel":
                self._note(f"undisturbed, {name} held constant", "refused by torch")
                return replace(CAUSES[name].seen_in(difference.part), where=first.failure.where)
            if first.failure:
                self._note(f"undisturbed twice, {name} held constant", "does not run")
                continue
            # Chance may make two runs equal: a cause is named only if runs differ again once its pin is taken away.
            equal = not self.differs(f"undisturbed twice, {name} held constant", second, first)
            if equal and not self.differs("the same once more", self.run(*overrides, pins=pins), first):
                varies = not self._equal("undisturbed again, nothing held constant", 2)
                if varies:
                    cause = CAUSES[name].seen_in(difference.part, difference.path)
                    return replace(cause, where=_callers(first))
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

    def _with_resume(self, run: RunTrace, difference: FirstDifference) -> Cause:
        """The cause of the difference after a single kill and resume, with one thing after another left out."""
        # The step that the attempt began with; halfway if it had loaded nothing.
        step = run.attempts[difference.attempt].first or max(1, self._until // 2)
        reproduced = self._kill("killed once and resumed", Kill("step", step + 1), step)
        if reproduced is None:
            return self._with_stop(run, difference)
        cause = None if reproduced.restored else self._convict(reproduced, step)
        if not reproduced.restored and (cause is None or not cause.sure):
            kill = Kill("step", step + 1)
            if self._kill("the same, garbage collected in every step", kill, step, pins=("gc",)) is None:
                return CAUSES["gc"].seen_in(reproduced.part, _paths(reproduced))
        evaluated = any(event["evaluation"] for _, event in self._base.steps() if event["step"] <= step)
        if difference.part != "data order" and evaluated and (cause is None or cause.kind != "callback memory"):
            without = self._kill("the same without evaluation", Kill("step", step + 1), step, pins=("evaluation",))
            if without is None:
                evaluation = CAUSES["evaluation"].seen_in(reproduced.part, _paths(reproduced))
                return replace(evaluation, where=cause.where if cause else "")
        guess = of_part(reproduced)
        return cause or (guess if guess.sure else guess.reaching(self._reached))

    def _convict(self, difference: FirstDifference, step: int) -> Cause | None:
        """The cause by the memory with which a resumed process goes on like the undisturbed one; or else a guess."""
        groups = suspects(difference, next(iter(self._killed.attempts[-1].select("resumed")), {}))
        unseen = {path: words for path, words in self._base.by_step()[step]["memory"].items() if UNSEEN in words}
        trial = _Trial(self, step, [*groups, *(path for path in unseen if path not in groups)])
        paths = trial.minimal(difference.part)
        untried = [path for path in groups if path not in trial.tested]
        if paths:
            cause = of_memory([entry for path in paths for entry in groups.get(path, [(path, unseen.get(path), None)])])
        elif untried:
            entries = [entry for path in untried for entry in groups[path]]
            cause = of_memory(sorted(entries, key=lambda entry: "._" in entry[0] and HOOKS not in entry[0]), sure=False)
        else:
            untried, cause = [path for path in unseen if path not in trial.tested][:3], of_part(difference)
            if not untried:
                return None
            opaque = ", ".join(f"{path} ({unseen[path]})" for path in untried)
            cause = replace(cause, description=f"{cause.description}. Not looked into: {opaque}")
        return replace(cause, where=self._line_of((paths or untried)[0]))

    def _line_of(self, path: str) -> str:
        """The line that changes memory: of the object that holds it, or else of another object."""
        root = next((key for key in self._sources if path.startswith(key)), "task")
        names = re.findall(r"\w+", re.sub(r" \((its (value|position|object|order|class)|a .*?)\)", "", path))[::-1]
        if path.startswith(PROCESS):
            names = [_SETTERS.get(name, name.replace("get", "set", 1)) for name in names]
        others = sorted((key for key in self._sources if key != root), key=lambda key: key.startswith("data."))
        elsewhere = [lines for key in others for lines in self._sources[key]]
        return source.line_of(names, self._sources.get(root, []), elsewhere)

    def _with_stop(self, run: RunTrace, difference: FirstDifference) -> Cause:
        """The cause of a difference that SIGKILL does not reproduce: the last stop by SIGTERM, or a guess."""
        stopped = [attempt for attempt in run.attempts[: difference.attempt] if attempt.stopped]
        if stopped:
            kill = Kill(str(stopped[-1].killed), stopped[-1].last)
            again = self._kill(f"{ENDS[kill.moment]} once and resumed", kill, kill.step)
            if again is not None:
                return CAUSES["stopping"].seen_in(again.part, again.path)
        return replace(of_part(difference), sure=False)

    def _kill(self, trial: str, kill: Kill, step: int, *, pins: tuple[str, ...] = ()) -> FirstDifference | None:
        """Kill a run whose ``step`` is committed, resume, and compare with an undisturbed run under the same pins."""
        base = self.run(pins=pins) if pins else self._base
        self._killed = run = self.resumed(step, kill, pins=pins)
        difference = self.differs(trial, run, base)
        self._executor.remove_files(run)
        return difference

    def resumed(self, step: int, kill: Kill, *, pins: tuple[str, ...] = (), **fields: Any) -> RunTrace:
        """A run that is killed after ``step`` is committed, and resumed by an attempt with ``fields``."""
        run = self._new()
        self._attempt(run, kill=kill, every=step, pins=pins)
        self._attempt(run, every=step, pins=pins, new_machine=self._new_machine, **fields)
        return run

    def run(self, *overrides: str, **fields: Any) -> RunTrace:
        run = self._new()
        self._attempt(run, *overrides, **fields)
        if "take" not in fields:
            self._executor.remove_files(run)
        return run

    def _attempt(
        self, run: RunTrace, *overrides: str, workers: int | None = None, every: int | None = None, **fields: Any
    ) -> None:
        self._executor.attempt(
            run,
            "checkpoint.background=false",
            "run.on_drift=accept",  # the ledger refuses other rollouts, before their effect can be compared
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
        self.tried.append(f"{trial}: {outcome}")
        self._progress(f"  {self.tried[-1]}")


class _Trial:
    """Memory on trial: ``paths`` are taken from an undisturbed run after ``step``, and put into resumed runs."""

    def __init__(self, investigation: Investigation, step: int, paths: list[str]) -> None:
        self._investigation = investigation
        self._step = step
        self._paths = paths
        self.tested: set[str] = set()  # paths that could be put into another process
        self._base = investigation.run(take=step, suspects=tuple(paths)) if paths else None

    def minimal(self, part: str) -> list[str]:
        """The fewest paths that suffice to make the difference go away; none if even all of them do not."""
        paths = sorted(self._paths, key=lambda path: not path.startswith(_NEAREST.get(part, ("task", "model"))))
        if not paths or not self._equal(paths):
            single = paths[:_CHUNKS] if len(paths) > 1 else []  # a value may have broken the process
            return next(([path] for path in single if path in self.tested and self._equal([path])), [])
        size = len(paths) // 2
        # Delta debugging: leave out halves, then quarters, and so on; each trial is a run, so chunks stay few.
        while size and len(paths) <= _CHUNKS * size:
            chunks = [paths[first : first + size] for first in range(0, len(paths), size)]
            rests = ([path for path in paths if path not in chunk] for chunk in reversed(chunks))
            rest = next((rest for rest in rests if rest and self._equal(rest)), None)
            paths = rest or paths
            size = min(size, len(paths) // 2) if rest else size // 2
        return [path for path in paths if path in self.tested]

    def _equal(self, paths: list[str]) -> bool:
        assert self._base is not None
        copies = self._base.attempts[-1].request.file
        run = self._investigation.resumed(self._step, Kill("step", self._step + 1), put=copies, suspects=tuple(paths))
        put = {path for event in run.attempts[-1].select("put") for path in event["paths"]}
        self.tested |= put
        names = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        trial = f"the same with {names} of the undisturbed run"
        return bool(put) and not self._investigation.differs(trial, run, self._base)


def _callers(run: RunTrace) -> str:
    """The user's lines that asked for values that were held constant or shifted in a run."""
    return ", ".join((run.evidence or {}).get("callers", ()))


def _paths(difference: FirstDifference) -> str:
    return ", ".join(path for path, _, _ in difference.remembered[:3])

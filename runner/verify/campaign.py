"""The two runs of a proof: one that is not disturbed, and one that is killed again and again."""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice, pairwise

from runner.verify import difference
from runner.verify.execution import AttemptTrace, Executor, Kill, RunTrace
from runner.verify.options import Options

_STEPS = 100  # unless verify.steps is given
_SECONDS = 20.0  # the undisturbed run trains no longer, unless verify.steps is given
_SAVES = 8  # about so many checkpoints in a run, besides the checkpoints before kills
_SMALL = 64 << 20  # bytes of a state: the killed run keeps all smaller checkpoints, and they are compared
_PERIODS = range(2, 9)  # steps after which memory may come and go, such as accumulated gradients
_AT_ANY_STEP = ("committed", "save", "step", "stop")
# The user's clocks go ahead by so much from attempt to attempt, so that no hour, date or month stays the same.
SHIFT_SECONDS = ((37 * 24 + 5) * 60 + 17) * 60 + 13
_TRAINING_SHARE = 0.15  # the undisturbed run trains for this share of verify.minutes
_SPARE = 1.5  # kills are given up once the time left is not enough for this many undisturbed runs and an attempt
_CLOCK_SHARE = 0.2  # a kill by the clock comes within this share of the time of all steps

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class KillPlan:
    """The plan of the killed run: ``steps``, a checkpoint ``every`` so many steps, the ``kills``, and the numbers of
    data ``workers`` that attempts take in turn. ``limit`` ends a run that would not end after these steps by itself.
    """

    steps: int
    limit: int
    every: int
    kills: tuple[Kill, ...]
    workers: tuple[int, ...]


def save_every(steps: int, *, keep: bool = False) -> tuple[str, ...]:
    """Overrides for a checkpoint every ``steps`` steps; with ``keep``, none is removed."""
    retention = f"checkpoint.keep_every_steps={steps if keep else 'null'}"
    return "checkpoint.every=null", "checkpoint.every_seconds=null", f"checkpoint.every_steps={steps}", retention


def run_undisturbed(executor: Executor, options: Options) -> RunTrace:
    """The run with which others are compared."""
    run = RunTrace("undisturbed")
    steps = options.steps or _STEPS
    executor.evaluations = max(1, steps // 3)  # so that every run has evaluations
    overrides = ("checkpoint.background=false", *save_every(_save_interval(steps)))
    seconds = None if options.steps else _SECONDS
    if options.minutes is not None:
        seconds = min(seconds or math.inf, _TRAINING_SHARE * 60 * options.minutes)
    executor.attempt(run, *overrides, workers=options.workers[0], steps=steps, seconds=seconds)
    return run


def _save_interval(steps: int) -> int:
    """Steps between two checkpoints: no multiple of 2, 3 or 5, or resumes would miss memory with such a period."""
    return next(every for every in count(max(2, steps // _SAVES)) if all(every % small for small in (2, 3, 5)))


def plan_kills(run: RunTrace, options: Options) -> KillPlan:
    """As many steps as the undisturbed run did, with kills at moments of every kind that it had."""
    attempt, draws = run.attempts[0], random.Random(options.seed)
    observed = _Observed(run, draws)
    kills = [
        kill._replace(victim=draws.randrange(options.processes) if options.processes > 1 and number % 2 else None)
        for number, kill in enumerate(observed.kills(options))  # all processes and a single one in turn
    ]
    ends_itself = attempt.select("finished")[0]["result"]["reason"] not in ("max_steps", "max_epochs")
    workers = options.workers[:1] if attempt.select("built")[0]["epoch"] is None else options.workers
    limit = observed.steps + 1 if ends_itself else observed.steps
    return KillPlan(observed.steps, limit, observed.every, tuple(kills), workers)


def run_killed(
    executor: Executor, plan: KillPlan, undisturbed: AttemptTrace, progress: Progress, name: str = "killed"
) -> RunTrace:
    """The same run, killed as planned. Attempts alternate between hash seeds and numbers of workers, and begin at later
    and later times of the user's clocks. Kills for which too little time is left are omitted. Raises OutOfTime.
    """
    run = RunTrace(name)
    kills = deque(plan.kills)
    keep = undisturbed.select("finished")[0]["size"] <= _SMALL
    for number in count():
        attempt = executor.attempt(
            run,
            *save_every(plan.every, keep=keep),
            f"checkpoint.background={'true' if number % 2 else 'false'}",
            workers=plan.workers[(number + 1) % len(plan.workers)],  # the undisturbed run had the first number
            server=(number + 1) % 2,
            steps=plan.limit,
            kill=kills.popleft() if kills else None,
            shift=(number + 1) * SHIFT_SECONDS,
            new_machine=number % 2 == 0,  # every second attempt has the temporary files of the attempt before
            silent=number % 4 == 3,  # what recording changes must not be the same in both runs
        )
        if attempt.failure:
            break
        if attempt.request.kill and executor.seconds_left() < _SPARE * undisturbed.seconds + attempt.seconds:
            kills.clear()  # the next attempt goes to the end
        progress(summary(attempt))
        if attempt.status == 0:
            break
    return run


ENDS = {
    None: "to the end",
    "step": "killed after a step",
    "committed": "killed right after a save",
    "save": "killed in a save",
    "loaded": "killed right after loading",
    "evaluation": "killed in an evaluation",
    "stop": "stopped in a step by SIGTERM",
    "evaluating": "stopped in an evaluation by SIGTERM",
    "start": "killed before the first step",
    "clock": "killed by the clock",
}


def summary(attempt: AttemptTrace) -> str:
    """An attempt in one line."""
    end = ENDS.get(attempt.killed, "killed") if attempt.failure is None else "ended with an error"
    alone = "" if attempt.victim is None else f", rank {attempt.victim} alone"
    return f"steps {attempt.first:>5} to {attempt.last:>5}, {attempt.workers} workers, {end}{alone}"


class _Observed:
    """The undisturbed run as the plan sees it: its steps, among them the ends of epochs and steps with evaluations.

    ``losable``: for each step but the last, the memory outside the state that a kill after it loses: paths of values
    that have changed since the start, and the periods with which invisible memory may come and go.
    """

    def __init__(self, run: RunTrace, draws: random.Random) -> None:
        events = run.attempts[0].select("step")
        changes = difference.changes_by_step(run)
        self.steps = run.attempts[0].last
        self.every = _save_interval(self.steps)
        self._draws = draws
        before = [event for event in events if event["step"] < self.steps]
        self._borders = [now["step"] for last, now in pairwise(before) if last["epochs"] < now["epochs"]]
        self._evaluated = [event["step"] for event in before if event["evaluation"]]
        self._seconds = sum(event["took"] for event in events)
        self._losable: dict[int, set[object]] = {
            step: {path.partition("[")[0] for path, _, _ in changes[step]}
            | {period for period in _PERIODS if step % period}
            for step in range(1, self.steps)
        }

    def kills(self, options: Options) -> list[Kill]:
        """Kills at the moments of the options, in an order in which the run makes progress between them."""
        steps = {"border": self._borders, "evaluation": self._evaluated, "evaluating": self._evaluated}
        moments = [*islice(cycle(options.moments), options.kills)]
        moments = ["step" if steps.get(moment) == [] else moment for moment in moments]
        by_step = deque(sorted(self._at_steps(moments), key=lambda kill: kill.step))
        kills = []
        for moment in moments:
            if moment == "loaded":
                kills.append(Kill("loaded"))
            elif moment == "clock":  # and at the latest after the step of the next kill
                limit = next((kill.after for kill in by_step if kill.after), self.steps)
                milliseconds = round(self._draws.uniform(0, _CLOCK_SHARE * self._seconds) * 1000)
                kills.append(Kill("clock", milliseconds, limit))
            else:
                kills.append(by_step.popleft())
        return kills

    def _at_steps(self, moments: Sequence[str]) -> Iterator[Kill]:
        """The kills at a step. Kills that may come at any step divide all steps among them, and choose first."""
        free = [moment for moment in moments if moment in _AT_ANY_STEP]
        for number, moment in reversed([*enumerate(free)]):  # late steps leave the least choice
            low, high = (self.steps * part // len(free) for part in (number, number + 1))
            after = self._choose(range(max(1, low), max(2, low + 1, high)))
            yield Kill(moment, after if moment in ("committed", "stop") else after + 1, after)  # save: the next save
        for moment in moments:
            if moment == "border":  # when an epoch has just ended
                after = self._choose([self._draws.choice(self._borders)])
                yield Kill("committed", after, after)
            elif moment == "evaluation":
                step = self._draws.choice(self._evaluated)
                before = range(max(1, (step - 1) // self.every * self.every), step)
                yield Kill("evaluation", step, self._choose(before) if before else None)
            elif moment == "evaluating":
                yield Kill("evaluating", self._choose([self._draws.choice(self._evaluated)]))

    def _choose(self, steps: Sequence[int]) -> int:
        """The step whose kill loses the most memory that no earlier kill has lost, if possible with steps after it."""

        def worth(step: int) -> tuple[int, int, int, float]:
            visible = sum(isinstance(memory, str) for memory in self._losable[step])
            rest = min(self.steps - step, _PERIODS[-1])
            return visible, rest, len(self._losable[step]) - visible, self._draws.random()

        best = max(steps, key=worth)
        lost = {*self._losable[best]}
        for memories in self._losable.values():
            memories -= lost
        return best

"""A run that nobody disturbs, and one that is killed again and again: when, and with how many workers."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from runner.verify import difference
from runner.verify.execution import AttemptEnd, AttemptTrace, Executor, Kill, RunTrace
from runner.verify.options import Options

_STEPS = 100  # unless verify.steps says more
_SECONDS = 20.0  # of training in which as many of them are done as can be
_SAVES = 8  # checkpoints in a run, about, beside those that a kill is to come after
_SMALL = 64 << 20  # bytes of a state of which all checkpoints are kept, to be compared
_PERIODS = range(2, 9)  # of memory that comes and goes, as that of accumulated gradients does
_MOMENTS = ("committed", "save", "loaded", "border", "evaluation", "step", "clock")
_ANYWHERE = ("committed", "save", "step")  # at whatever step is chosen
_ELSEWHERE = ("loaded", "clock")
_PROMPT = 0.2  # a kill by the clock comes within such a part of the time of all steps

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class KillPlan:
    """The runs of a proof: so many ``steps`` (with a ``limit`` from outside, where they do not end by themselves), a
    checkpoint of ``size`` bytes ``every`` so many, and the ``kills``. Of each kill a rank may be the only one of the
    ``victims``; None: all are.
    """

    steps: int
    limit: int
    every: int
    size: int
    epoch: int | None
    kills: tuple[Kill, ...]
    victims: tuple[int | None, ...]
    workers: tuple[int, ...]


def saving(every: int, *, kept: bool = False) -> tuple[str, ...]:
    """Overrides for a checkpoint every so many steps, all of which are ``kept``, or the last ones."""
    return (
        "checkpoint.every=null",
        "checkpoint.every_seconds=null",
        f"checkpoint.every_steps={every}",
        f"checkpoint.keep_every_steps={every if kept else 'null'}",
    )


def evaluations(options: Options) -> int:
    """Steps after which there is an evaluation at the latest, so that some are seen."""
    return max(1, (options.steps or _STEPS) // 3)


def undisturbed(stage: Executor, options: Options) -> RunTrace:
    """The run to which others are compared."""
    run = RunTrace("undisturbed")
    wanted = options.steps or _STEPS
    limit = None if options.steps else _SECONDS
    more = ("checkpoint.background=false", *saving(interval(wanted)))
    stage.live(run, *more, workers=options.workers[0], steps=wanted, seconds=limit)
    return run


def interval(steps: int) -> int:
    """Steps between two checkpoints; a number that is no multiple of a small one, so that the checkpoints are not
    either.
    """
    return next(every for every in count(max(2, steps // _SAVES)) if all(every % small for small in (2, 3, 5)))


def plan(run: RunTrace, options: Options) -> KillPlan:
    """What the undisturbed run showed to be worth trying: as many steps as it did, kills at moments of every kind."""
    life = run.lives[0]
    built = life.of("built")[0]
    steps = life.last
    workers = options.workers if built["indexed"] else options.workers[:1]
    every = interval(steps)
    evaluated = [event["step"] for event in life.of("step") if event["evaluation"] and event["step"] < steps]
    chance = random.Random(options.seed)
    borders = [border for border in _borders(life.of("step")) if border < steps]
    took = sum(event["took"] for event in life.of("step"))
    shown = _Shown(steps, every, borders, evaluated, _losable(run, steps), took)
    kills = tuple(_kills(options.kills, shown, chance))
    victims = _victims(options, chance)
    ended = life.of("finished")[0]["result"]["reason"]
    limit = steps if ended == "max_steps" else steps + 1
    size = max((event["bytes"] for event in life.of("committed")), default=0)
    return KillPlan(steps, limit, every, size, built["epoch"], kills, victims, workers)


def disturbed(stage: Executor, found: KillPlan, tell: Tell) -> RunTrace:
    """The same run, killed at every moment of the plan."""
    run = RunTrace("killed")
    for number, (kill, victim) in enumerate([*zip(found.kills, found.victims, strict=True), (None, None)]):
        workers = found.workers[(number + 1) % len(found.workers)]
        background = f"checkpoint.background={'true' if number % 2 else 'false'}"
        life = stage.live(
            run,
            *saving(found.every, kept=found.size <= _SMALL),
            background,
            workers=workers,
            server=(number + 1) % 2,
            steps=found.limit,
            kill=kill,
            victim=victim,
            silent=number % 4 == 3,  # what is changed by looking would else change in both runs alike
        )
        if life.ended.status not in (None, 0):
            break
        tell(summary(life))
        if life.ended.status == 0:
            break
    return run


def summary(life: AttemptTrace) -> str:
    """A life in words."""
    how = {
        None: "to the end",
        "step": "killed after a step",
        "committed": "killed right after a save",
        "save": "killed in a save",
        "loaded": "killed right after loading",
        "evaluation": "killed in an evaluation",
        "start": "killed before the first step",
        "clock": "killed by the clock",
    }.get(life.killed, "killed")
    alone = "" if life.victim is None else f", rank {life.victim} alone"
    return f"steps {life.first:>5} to {life.last:>5}, {life.workers} workers, {how}{alone}"


def failure(ended: AttemptEnd) -> str:
    """The last lines of a life that failed, without a traceback's frames."""
    lines = [line for line in ended.output.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    if starts:
        lines = [line for line in lines[starts[-1] + 1 :] if not line.startswith("  ")]
    else:
        lines = [line for line in lines if line.split(" ")[0] not in _SAID]
    return "\n".join(lines[-12:])


_SAID = {"run", "attempt", "data", "device", "model", "step", "moved", "workers"}


def _borders(steps: Sequence[dict[str, int]]) -> list[int]:
    """The steps in which an epoch ends."""
    return [after["step"] for before, after in pairwise(steps) if after["epochs"] > before["epochs"]]


def _losable(run: RunTrace, steps: int) -> dict[int, set[object]]:
    """By step before the last, what would be lost in a process that ended there, as far as it is in no state: what
    objects remember that is not as it was at first, and what cannot be seen but may come and go every few steps.
    """
    moved = difference.moved(run)
    return {
        step: {*(path.partition("[")[0] for path, _, _ in moved[step])}
        | {period for period in _PERIODS if step % period}
        for step in range(1, steps)
    }


@dataclass(slots=True)
class _Shown:
    """What the undisturbed run has: steps, a checkpoint every so many, steps in which an epoch ends, steps that were
    evaluated, what may be lost after each step (less what a kill is planned for), seconds.
    """

    steps: int
    every: int
    borders: Sequence[int]
    evaluated: Sequence[int]
    losable: dict[int, set[object]]
    seconds: float

    def telling(self, steps: Sequence[int], chance: random.Random) -> int:
        """The one of the steps after which most would be lost that no other kill has lost yet, if possible with steps
        left in which that shows.
        """

        def worth(step: int) -> tuple[int, int, int, float]:
            seen = sum(isinstance(what, str) for what in self.losable[step])
            return seen, min(self.steps - step, _PERIODS[-1]), len(self.losable[step]) - seen, chance.random()

        found = max(steps, key=worth)
        lost = {*self.losable[found]}
        for left in self.losable.values():
            left -= lost
        return found


def _kills(many: int, shown: _Shown, chance: random.Random) -> list[Kill]:
    """Moments of all kinds, in an order in which the run gets on between them."""
    lacking = [name for name, steps in (("border", shown.borders), ("evaluation", shown.evaluated)) if not steps]
    wanted = [_MOMENTS[number % len(_MOMENTS)] for number in range(many)]
    moments = ["step" if moment in lacking else moment for moment in wanted]
    in_order = deque(sorted(_at_steps(moments, shown, chance), key=lambda kill: kill.step))
    return [
        in_order.popleft() if moment not in _ELSEWHERE else _elsewhere(moment, in_order, shown, chance)
        for moment in moments
    ]


def _elsewhere(moment: str, later: Sequence[Kill], shown: _Shown, chance: random.Random) -> Kill:
    """A kill at whatever step it is; by the clock before those that come ``later`` are passed."""
    if moment == "loaded":
        return Kill("loaded")
    limit = next((kill.after for kill in later if kill.after), shown.steps)
    return Kill("clock", round(chance.uniform(0, _PROMPT * shown.seconds) * 1000), limit)


def _at_steps(moments: Sequence[str], shown: _Shown, chance: random.Random) -> Iterator[Kill]:
    """The kills that are at a step. Those that may be at any share all steps between them, and choose first."""
    free = [moment for moment in moments if moment in _ANYWHERE]
    for place, moment in reversed([*enumerate(free)]):  # what comes late leaves the least choice
        low, high = (shown.steps * part // len(free) for part in (place, place + 1))
        after = shown.telling(range(max(1, low), max(2, low + 1, high)), chance)
        yield Kill(moment, after if moment == "committed" else after + 1, after)  # ``save``: the next one
    for moment in moments:
        if moment == "border":  # when an epoch has just ended
            after = shown.telling([chance.choice(shown.borders)], chance)
            yield Kill("committed", after, after)
        elif moment == "evaluation":
            step = chance.choice(shown.evaluated)
            before = range(max(1, (step - 1) // shown.every * shown.every), step)
            yield Kill("evaluation", step, shown.telling(before, chance) if before else None)


def _victims(options: Options, chance: random.Random) -> tuple[int | None, ...]:
    """All processes and a single one in turn; every moment has both in time, since their number is odd."""
    if options.processes == 1:
        return (None,) * options.kills
    return tuple(chance.randrange(options.processes) if number % 2 else None for number in range(options.kills))

"""A run that nobody disturbs, and one that is killed again and again: when, and with how many workers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from runner.verify import difference
from runner.verify.lives import Ended
from runner.verify.options import Options
from runner.verify.run import Lived, Run, Stage

_STEPS = 100  # unless verify.steps says more
_SECONDS = 20.0  # of training in which as many of them are done as can be
_SAVES = 16  # checkpoints in a run, about
_MOMENTS = ("committed", "save", "loaded", "border", "evaluation", "step", "clock")
_AT_A_STEP = {"step", "committed", "save", "evaluation"}
_PROMPT = 0.2  # a kill by the clock comes within such a part of the time of all steps

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a proof: so many ``steps`` (with a ``limit`` from outside, where they do not end by themselves), a
    checkpoint ``every`` so many, and the ``kills`` as (moment, step). Of each kill a rank may be the only one of the
    ``victims``; None: all are.
    """

    steps: int
    limit: int
    every: int
    epoch: int | None
    kills: tuple[tuple[str, int], ...]
    victims: tuple[int | None, ...]
    workers: tuple[int, ...]


def saving(every: int) -> tuple[str, ...]:
    """Overrides for a checkpoint every so many steps, all of which are kept."""
    return (
        "checkpoint.every=null",
        "checkpoint.every_seconds=null",
        f"checkpoint.every_steps={every}",
        f"checkpoint.keep_every_steps={every}",
    )


def evaluations(options: Options) -> int:
    """Steps after which there is an evaluation at the latest, so that some are seen."""
    return max(1, (options.steps or _STEPS) // 3)


def undisturbed(stage: Stage, options: Options) -> Run:
    """The run to which others are compared."""
    run = Run("undisturbed")
    wanted = options.steps or _STEPS
    limit = None if options.steps else _SECONDS
    more = ("checkpoint.background=false", *saving(interval(wanted)))  # so that none is passed over
    stage.live(run, *more, workers=options.workers[0], steps=wanted, seconds=limit)
    return run


def interval(steps: int) -> int:
    """Steps between two checkpoints."""
    return max(1, steps // _SAVES)


def plan(run: Run, options: Options) -> Plan:
    """What the undisturbed run showed to be worth trying: as many steps as it did, kills at moments of every kind."""
    life = run.lives[0]
    built = life.of("built")[0]
    steps = life.last
    workers = options.workers if built["indexed"] else options.workers[:1]
    every = interval(steps)
    evaluated = [event["step"] for event in life.of("step") if event["evaluation"] and event["step"] < steps]
    chance = random.Random(options.seed)
    shown = _Shown(
        steps,
        every,
        _borders(life.of("step")),
        evaluated,
        _telling(run, steps),
        sum(event["took"] for event in life.of("step")),
    )
    kills = tuple(_kills(options.kills, shown, chance))
    victims = _victims(options, chance)
    ended = life.of("finished")[0]["result"]["reason"]
    return Plan(steps, steps if ended == "max_steps" else steps + 1, every, built["epoch"], kills, victims, workers)


def disturbed(stage: Stage, found: Plan, tell: Tell) -> Run:
    """The same run, killed at every moment of the plan."""
    run = Run("killed")
    for number, (kill, victim) in enumerate([*zip(found.kills, found.victims, strict=True), (None, None)]):
        workers = found.workers[(number + 1) % len(found.workers)]
        background = f"checkpoint.background={'true' if number % 2 else 'false'}"
        life = stage.live(
            run,
            *saving(found.every),
            background,
            workers=workers,
            server=(number + 1) % 2,
            steps=found.limit,
            kill=kill,
            victim=victim,
        )
        if life.ended.status not in (None, 0):
            break
        tell(told(life))
        if life.ended.status == 0:
            break
    return run


def told(life: Lived) -> str:
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


def failure(ended: Ended) -> str:
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


def _telling(run: Run, steps: int) -> list[int]:
    """The steps before the last after which most of what objects remember is not as it was at first: what lies in no
    checkpoint is missed after a resume from there, and perhaps, where it comes and goes, from nowhere else.
    """
    moved = {step: len(entries) for step, entries in difference.moved(run).items() if 0 < step < steps or step == 1}
    return [step for step, many in moved.items() if many == max(moved.values())]


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the undisturbed run has: steps, a checkpoint every so many, steps in which an epoch ends, steps that were
    evaluated, steps after which most is remembered that a new process does not know, seconds.
    """

    steps: int
    every: int
    borders: Sequence[int]
    evaluated: Sequence[int]
    telling: Sequence[int]
    seconds: float


def _kills(count: int, shown: _Shown, chance: random.Random) -> list[tuple[str, int]]:
    """Moments of all kinds, in an order in which the run gets on between them."""
    found = []
    for number in range(count):
        low, high = (shown.steps * part // (count + 1) for part in (number, number + 1))
        step = max(1, min(shown.steps - 1, chance.randint(low, high)))
        found.append(_kill(_MOMENTS[number % len(_MOMENTS)], step, shown, chance))
    steady = iter(sorted((kill for kill in found if kill[0] in _AT_A_STEP), key=lambda kill: kill[1]))
    return [next(steady) if kill[0] in _AT_A_STEP else kill for kill in found]


def _victims(options: Options, chance: random.Random) -> tuple[int | None, ...]:
    """All processes and a single one in turn; every moment has both in time."""
    if options.processes == 1:
        return (None,) * options.kills
    alone = [(number + number // len(_MOMENTS)) % 2 for number in range(options.kills)]
    return tuple(chance.randrange(options.processes) if one else None for one in alone)


def _kill(moment: str, step: int, shown: _Shown, chance: random.Random) -> tuple[str, int]:
    if moment == "clock":
        return "clock", round(chance.uniform(0, _PROMPT * shown.seconds) * 1000)
    if moment == "loaded":
        return "loaded", 0
    if moment == "border" and shown.borders:  # resumed from where an epoch has just ended
        return "committed", min(shown.steps - 1, _nearest(shown.borders, step))
    if moment == "evaluation" and shown.evaluated:
        return "evaluation", _nearest(shown.evaluated, step)
    if moment == "committed":
        return "committed", _nearest(shown.telling, step)
    if moment == "save" and shown.steps > shown.every:
        return "save", min(step, shown.steps - shown.every)
    return "step", step


def _nearest(steps: Sequence[int], step: int) -> int:
    return min(steps, key=lambda each: abs(each - step))

"""The first thing in which a run differs from the one that nobody disturbed.

A step is compared in the order in which it happens: its samples, what became of them, the generators, the rate, the
loss, the gradients, then the state part by part. So the first difference is the nearest to its cause.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.verify.execution import Event, RunTrace, by_step

# Fields of a record, and what they are called.
_GIVEN = {"samples": "data order", "batch": "augmentation", "generators": "generators", "rate": "scheduler"}
_MADE = {"metrics": "loss", "gradients": "gradients"}

# A path, and its value in words then and now; None where it is absent.
Remembered = tuple[str, str | None, str | None]


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """At ``step``, in the run's life of number ``life`` (from 0), ``part`` differs at ``where``.

    ``restored``: in the state right after loading, before any step. ``remembered`` is what objects remembered beside
    the state at the last common moment, as (path, expected, found); ``moving`` is what changes there while the
    undisturbed run trains, as (path, first, last).
    """

    step: int
    life: int
    part: str
    where: str
    expected: Any
    found: Any
    restored: bool = False
    remembered: tuple[Remembered, ...] = ()
    moving: tuple[Remembered, ...] = ()

    def size(self) -> str:
        """By how much, for numbers."""
        if not (isinstance(self.expected, float) and isinstance(self.found, float)):
            return ""
        gap = abs(self.found - self.expected)
        relative = gap / abs(self.expected) if self.expected else math.inf
        return f"a difference of {gap:.3g}, which is {relative:.2g} of it"


def first(run: RunTrace, undisturbed: RunTrace, *, until: int | None = None) -> FirstDifference | None:
    """The first difference in time in what the lives of ``run`` noted, up to a step."""
    known, begun, lasts = by_step(undisturbed), _begun(undisturbed), _lasts(run, undisturbed)
    remembered: tuple[Remembered, ...] = ()
    changing = moving(undisturbed)
    for life, event in run.steps():
        step, restored = event["step"], event["event"] == "resumed"
        expected = begun if restored and step == 0 else known.get(step)
        if expected is None or event.get("cut") or (until is not None and step > until):
            continue
        if restored:
            remembered = tuple(_unequal(expected["memory"], event["memory"])) if "memory" in event else ()
        parted = bool(lasts) and step == min(lasts)
        for part, where, was, now in _compared(expected, event, restored=restored, parted=parted):
            return FirstDifference(step, life, part, where, was, now, restored, remembered, changing)
    if not lasts or (until is not None and min(lasts) >= until):
        return None
    return FirstDifference(
        min(lasts) + 1, len(run.lives) - 1, "end", "the last step", lasts[0], lasts[1], False, remembered, changing
    )


def _lasts(run: RunTrace, undisturbed: RunTrace) -> tuple[int, ...]:
    """The last steps of the undisturbed run and of the other, where both ended by themselves, but not after the same
    step.
    """
    if run.evidence is None or undisturbed.evidence is None:
        return ()
    lasts = undisturbed.lives[-1].last, run.lives[-1].last
    return lasts if lasts[0] != lasts[1] else ()


def at_the_end(run: RunTrace, undisturbed: RunTrace) -> FirstDifference | None:
    """The first difference in what finished runs left: every checkpoint against the state that the undisturbed run had
    at that step, then metric lines and result.
    """
    expected, found = undisturbed.evidence, run.evidence
    if expected is None or found is None:
        return None
    known, life = by_step(undisturbed), len(run.lives) - 1
    for evidence in (expected, found):
        for step, state in evidence["checkpoints"].items():
            for path, was, now in _unequal(known[int(step)]["state"], state):
                return FirstDifference(int(step), life, "checkpoint", path, was, now)
    for was, now in zip(_padded(expected["lines"], found["lines"]), found["lines"], strict=False):
        for tag, one, other in _unequal(was, now):
            return FirstDifference(now.get("step", 0), life, "metric lines", tag, one, other)
    if len(expected["lines"]) != len(found["lines"]):
        lengths = len(expected["lines"]), len(found["lines"])
        return FirstDifference(found["result"]["step"], life, "metric lines", "how many", *lengths)
    for path, was, now in _unequal(_flat(expected["result"]), _flat(found["result"])):
        return FirstDifference(found["result"].get("step", 0), life, "result", path, was, now)
    return None


def forgotten(run: RunTrace, undisturbed: RunTrace) -> tuple[Remembered, ...]:
    """What training changes in objects, and was not there any more after a load, as (path, expected, found): of every
    container one entry.
    """
    known, changing = by_step(undisturbed), {path for path, _, _ in moving(undisturbed)}
    loads = [event for _, event in run.steps() if event["event"] == "resumed" and "memory" in event]
    found = [
        entry
        for event in loads
        if event["step"] in known
        for entry in _unequal(known[event["step"]]["memory"], event["memory"])
        if entry[0] in changing
    ]
    return tuple({entry[0].partition("[")[0]: entry for entry in found}.values())


def checkpoints(*runs: RunTrace) -> int:
    """How many checkpoints they left."""
    return sum(len((run.evidence or {}).get("checkpoints", {})) for run in runs)


def _compared(expected: Event, found: Event, *, restored: bool, parted: bool) -> Iterator[tuple[str, str, Any, Any]]:
    """The parts that differ, with path and values. ``parted``: one of the runs ended with this step, and for that alone
    may have an evaluation, and callbacks in another state.
    """
    if not restored:
        for name, part in (_GIVEN | _MADE).items():
            for where, was, now in _unequal(_mapping(expected, name), _mapping(found, name)):
                yield "metrics" if name == "metrics" and where != "loss" else part, where, was, now
    callbacks = []
    looked = "state" in expected and "state" in found
    states = [event["state"] | event.get("others", {}) if looked else {} for event in (expected, found)]
    for path, was, now in _unequal(*states):
        # The rate of the next step stands in the optimizer, and the scheduler has put it there.
        part = "scheduler" if path.startswith("optimizer/param_groups") else path.partition("/")[0]
        if part.startswith("callback."):
            callbacks.append((part, path, was, now))
        else:
            yield part, path, was, now
    if not restored and (not parted or (expected["evaluation"] and found["evaluation"])):
        yield from (("evaluation", *rest) for rest in _unequal(expected["evaluation"], found["evaluation"]))
    if not parted:
        yield from callbacks


def _mapping(event: Event, name: str) -> Mapping[str, Any]:
    value = event.get(name, {})
    return value if isinstance(value, dict) else {name: value}


def _unequal(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in {**expected, **found}:
        was, now = expected.get(key), found.get(key)
        if was != now and not (was != was and now != now):  # NaN is as good as NaN
            yield key, was, now


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {key: leaf for name, inner in tree.items() for key, leaf in _flat(inner, f"{path}/{name}").items()}
    return {path.strip("/"): tree}


def _padded(lines: list[Event], others: list[Event]) -> list[Event]:
    return [*lines, *([{}] * (len(others) - len(lines)))]


def _begun(run: RunTrace) -> Event | None:
    return next((event for _, event in run.steps() if event["event"] == "resumed"), None)


def moving(run: RunTrace) -> tuple[Remembered, ...]:
    """What the objects of a run remember and change."""
    last = {entry[0]: entry for entries in moved(run).values() for entry in entries}
    return tuple(last.values())


def moved(run: RunTrace) -> dict[int, list[Remembered]]:
    """By step, what the objects of a run remember that is not as it was at first."""
    remembered = [(event["step"], event["memory"]) for _, event in run.steps()]
    return {step: [*_unequal(remembered[0][1], memory)] for step, memory in remembered}

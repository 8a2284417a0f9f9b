"""The first difference between a run and the undisturbed one.

A step is compared in the order in which it happens: its samples, their transformation, the generators, the rate, the
loss, the gradients, then the state part by part. So the first difference is the nearest to its cause.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from runner.config.identity import flatten
from runner.verify.execution import Event, RunTrace
from runner.verify.memory import PROCESS

# Fields of a record in the order of a step, and the parts they stand for.
_PARTS = {
    "samples": "data order",
    "batch": "augmentation",
    "generators": "generators",
    "rate": "scheduler",
    "metrics": "loss",
    "gradients": "gradients",
}

# A path, and its value in words before and after; None where it is absent.
Remembered = tuple[str, str | None, str | None]


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """At ``step``, in attempt number ``attempt`` (from 0), ``part`` differs at ``path``.

    ``restored``: in the state right after loading, before any step. ``remembered`` is memory beside the state that
    differs at the last common moment, as (path, undisturbed, killed); ``changing`` is memory that changes while the
    undisturbed run trains, as (path, first, last).
    """

    step: int
    attempt: int
    part: str
    path: str
    expected: Any
    actual: Any
    restored: bool = False
    remembered: tuple[Remembered, ...] = ()
    changing: tuple[Remembered, ...] = ()

    def size(self) -> str:
        """By how much numbers differ; empty for anything else."""
        if not (isinstance(self.expected, float) and isinstance(self.actual, float)):
            return ""
        gap = abs(self.actual - self.expected)
        relative = gap / abs(self.expected) if self.expected else math.inf
        return f"a difference of {gap:.3g}, {relative:.2g} of the undisturbed value"


def first_difference(run: RunTrace, undisturbed: RunTrace, *, until: int | None = None) -> FirstDifference | None:
    """The first difference in time in the records of the attempts, up to a step."""
    steps, ends = undisturbed.by_step(), _different_ends(run, undisturbed)
    start = next((event for _, event in undisturbed.compared() if event["event"] == "resumed"), None)
    remembered: tuple[Remembered, ...] = ()
    changing = changes(undisturbed)
    for attempt, event in run.compared():
        step, restored = event["step"], event["event"] == "resumed"
        # No step has number 0: an attempt from the beginning is compared with the undisturbed run's beginning.
        expected = start if restored and step == 0 else steps.get(step)
        if expected is None or event.get("cut") or (until is not None and step > until):
            continue
        if restored:
            remembered = tuple(unequal(expected["memory"], event["memory"])) if "memory" in event else ()
        one_run_ends = ends is not None and step == min(ends)
        for part, path, was, now in _compare(expected, event, restored=restored, one_run_ends=one_run_ends):
            return FirstDifference(step, attempt, part, path, was, now, restored, remembered, changing)
    if ends is None or (until is not None and min(ends) >= until):
        return None
    attempt = len(run.attempts) - 1
    return FirstDifference(min(ends) + 1, attempt, "end", "the last step", *ends, False, remembered, changing)


def _different_ends(run: RunTrace, undisturbed: RunTrace) -> tuple[int, int] | None:
    """The last steps of the undisturbed run and of the other, if both ended by themselves, but at different steps."""
    if run.evidence is None or undisturbed.evidence is None:
        return None
    ends = undisturbed.attempts[-1].last, run.attempts[-1].last
    return ends if ends[0] != ends[1] else None


def difference_of_results(run: RunTrace, undisturbed: RunTrace) -> FirstDifference | None:
    """The first difference in checkpoints (against the state at their step), metric lines and results."""
    expected, actual = undisturbed.evidence, run.evidence
    if expected is None or actual is None:
        return None
    steps = undisturbed.by_step()
    compared: list[tuple[int, str, Mapping[str, Any], Mapping[str, Any]]] = []
    for evidence in (expected, actual):
        for number, state in evidence["checkpoints"].items():
            step = int(number)  # 0 for the checkpoint with which the child of another run begins
            before = steps[step]["state"] if step in steps else expected["checkpoints"].get(number, state)
            compared.append((step, "checkpoint", before, state))
    for old, new in zip_longest(expected["lines"], actual["lines"], fillvalue=Event()):
        compared.append((new.get("step", 0), "metric lines", old, new))
    compared.append((actual["result"].get("step", 0), "result", flatten(expected["result"]), flatten(actual["result"])))
    for step, part, before, after in compared:
        for path, was, now in unequal(before, after):
            return FirstDifference(step, len(run.attempts) - 1, part, path, was, now)
    return None


def lost_memory(run: RunTrace, undisturbed: RunTrace) -> tuple[Remembered, ...]:
    """Memory that training changes and that a load lost, as (path, undisturbed, killed), also of data workers: one
    entry for a container; of data sets, whose samples were compared, only numbers; without the internals of libraries,
    and of an iterable, which is loaded with its first sample.
    """
    steps, changing = undisturbed.by_step(), {path for path, _, _ in changes(undisturbed)}
    internals = [*(undisturbed.evidence or {}).get("private", ())]
    if undisturbed.attempts[0].select("built")[0]["epoch"] is None:
        internals.append("data.train")
    entries = [
        entry
        for _, event in run.compared()
        if event["event"] == "resumed" and "memory" in event and event["step"] in steps
        for entry in unequal(steps[event["step"]]["memory"], event["memory"])
        if entry[0] in changing
    ]
    entries += [(path, now, was) for event in worker_events(undisturbed, run) for path, was, now in event["changes"]]
    lost = {
        path.partition("[")[0]: (path, was, now)
        for path, was, now in entries
        if not path.startswith((*internals,)) and (not path.startswith("data.") or _NUMBER.fullmatch(was or ""))
    }
    return tuple(lost.values())


def worker_events(*runs: RunTrace) -> list[Event]:
    """The records of data workers that came to their ends."""
    return [event for run in runs for attempt in run.attempts for event in attempt.select("worker")]


def in_words(entries: Iterable[Remembered], change: str = " and is {} after loading") -> str:
    """Memory that differs, for people."""
    words = [f"{path} was {was or 'absent'}{change.format(now or 'absent')}" for path, was, now in entries]
    return "; ".join([*words[:3], *([f"and {len(words) - 3} more"] if len(words) > 3 else [])])


def suspects(difference: FirstDifference, resumed: Event) -> dict[str, list[Remembered]]:
    """The values that a process lacked after loading, by the path at which they can be put into it: the path of a whole
    container, or of the outermost object that the process (as ``resumed``) does not have.
    """
    changed = {path for path, _, _ in difference.changing}
    of_model = [path.replace("/", ".") for path in resumed.get("state", {}) if path.startswith("model/")]
    present = {prefix for path in [*resumed.get("memory", {}), *of_model] for prefix in _prefixes(path)}
    entries = [entry for entry in difference.remembered if entry[0] in changed or not entry[0].startswith(PROCESS)]
    groups: dict[str, list[Remembered]] = {}
    for entry in sorted(entries, key=lambda entry: entry[0] not in changed):
        prefixes = _prefixes(entry[0])
        path = next((prefix for prefix in prefixes[1:] if prefix not in present), prefixes[-1])
        groups.setdefault(path, []).append(entry)
    # A value inside another is put into the process with it.
    inner = [path for path in groups if any(each != path and each in groups for each in _prefixes(path))]
    for path in inner:
        outer = next(each for each in _prefixes(path) if each in groups)
        groups[outer] += groups.pop(path)
    return groups


_ROOT = re.compile(r"process: .*|[\w.]+ \((?!its )[^)]*\)|(?:data|callbacks)\.\w+|\w+", re.DOTALL)
_PART = re.compile(r"\.\w+(?: \(a [^)]*\))?| \(its \w+\)")


def _prefixes(path: str) -> list[str]:
    """A path and the paths of the objects that hold it, the outermost first; a container is not entered."""
    root = _ROOT.match(path)
    prefixes = [root[0] if root else path]
    while part := _PART.match(path, len(prefixes[-1])):
        prefixes.append(prefixes[-1] + part[0])
    return prefixes


_NUMBER = re.compile(r"-?[\d.e+-]+")


def changes(run: RunTrace) -> tuple[Remembered, ...]:
    """Memory of the objects of a run that training changes, as (path, first, last)."""
    return tuple({entry[0]: entry for entries in changes_by_step(run).values() for entry in entries}.values())


def changes_by_step(run: RunTrace) -> dict[int, list[Remembered]]:
    """For each step, the memory that differs from the memory at the start, as (path, first, now)."""
    memories = [(event["step"], event["memory"]) for _, event in run.compared()]
    return {step: [*unequal(memories[0][1], memory)] for step, memory in memories}


def _compare(
    expected: Event, actual: Event, *, restored: bool, one_run_ends: bool
) -> Iterator[tuple[str, str, Any, Any]]:
    """The parts that differ, with path and values. ``one_run_ends``: one of the runs ended with this step, and may
    therefore have an evaluation, and callbacks in another state.
    """
    if not restored:
        for field, part in _PARTS.items():
            for path, was, now in unequal(expected.get(field, {}), actual.get(field, {})):
                yield "metrics" if field == "metrics" and path != "loss" else part, path, was, now
    callbacks = []
    recorded = "state" in expected and "state" in actual
    states = [event["state"] | event.get("others", {}) if recorded else {} for event in (expected, actual)]
    for path, was, now in unequal(*states):
        # The scheduler puts the rate of the next step into the optimizer.
        part, _, inner = path.partition("/")
        kind = part.partition(".")[0]  # optimizer.generator, if there are several
        if kind in ("optimizer", "scheduler"):
            part = "scheduler" if inner.startswith("param_groups") else kind
        if part.startswith("callback."):
            callbacks.append((part, path, was, now))
        else:
            yield part, path, was, now
    if not restored and (not one_run_ends or (expected["evaluation"] and actual["evaluation"])):
        yield from (("evaluation", *rest) for rest in unequal(expected["evaluation"], actual["evaluation"]))
    if not one_run_ends:
        yield from callbacks


def unequal(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys whose values differ, with both values; None where one is absent."""
    for key in {**expected, **actual}:
        was, now = expected.get(key), actual.get(key)
        if was != now and not (was != was and now != now):  # NaN equals NaN here
            yield key, was, now

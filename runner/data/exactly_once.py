"""What a ledger proves: how many samples of every epoch were seen, repeated and missed, and whether repeated steps had
the same samples as before.

The order of the samples is reconstructed from the stored plan. A line counts only if its digest is that of the samples
at its positions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from runner.data.ledger import Line, Segment
from runner.data.order import Indices, Order, digests, groups, stretches
from runner.data.plan import Plan

CHUNK_POSITIONS = 1 << 18  # positions looked at together
_MOST_EPOCHS = 1 << 16  # in a step
_PATIENCE = 1 << 22  # positions of lines that prove nothing, after which the others are not looked at
_EPOCH_COST = 256  # an epoch costs as much as so many positions
_Passes = dict[tuple[int, int], "_Pass"]


@dataclass(slots=True)
class _Pass:
    """How often each sample of a source was seen in one pass over it; only the sums once it is closed."""

    first: int
    size: int
    counts: "np.ndarray[Any, np.dtype[np.uint16]] | None"
    seen: int = 0
    times: int = 0
    substituted: int = 0

    def add(self, indices: Indices) -> None:
        self.times += len(indices)
        if self.counts is not None:
            np.add.at(self.counts, indices - self.first, 1)

    def close(self) -> None:
        if self.counts is not None:
            self.seen, self.counts = int(np.count_nonzero(self.counts)), None


@dataclass(frozen=True, slots=True)
class Proof:
    """The verdict over one run. ``epochs`` has a row for every pass over every source; ``problems`` are in words."""

    steps: int
    positions: int
    epochs: list[dict[str, Any]]
    again: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether no sample was repeated or missed, and everything done again was the same."""
        return not self.problems


def prove(segments: Sequence[Segment], plan: Plan | None, *, begun: int, committed: int) -> Proof:
    """Judge the lineage of a run that began after step ``begun`` (0 unless it is a fork), up to its last committed one.

    Without a plan (data that is not indexed) only the continuity of positions and what was done again can be judged.
    """
    lines, again, problems = lineage(segments, committed=committed)
    problems += _gaps([Line(begun, 0, lines[0].first - 1 if begun and lines else -1, 0), *lines])
    if committed > (lines[-1].step if lines else begun):
        problems.append(f"the ledger ends before step {committed}, which is committed")
    epochs: list[dict[str, Any]] = []
    if plan is not None and lines:
        found, unproven = _count(lines, plan)
        problems += unproven
        epochs = [*_rows(found, plan, lines[0].first)]
        problems += [
            f"epoch {row['epoch']}: {row['repeated']} repeated, {row['missed']} missed"
            for row in epochs
            if row["repeated"] or row["missed"]
        ]
    positions = sum(line.last - line.first + 1 for line in lines)
    return Proof(lines[-1].step if lines else 0, positions, epochs, again, problems)


def lineage(segments: Iterable[Segment], *, committed: int) -> tuple[list[Line], dict[str, int], list[str]]:
    """The lines of the steps that count; how many were done again (and how many positions); what did not agree."""
    kept: dict[int, Line] = {}
    undone: dict[int, tuple[Line, int]] = {}  # and how often the positions had become others by then
    again = {"steps": 0, "positions": 0, "differing": 0}
    problems: list[str] = []
    attempt = grouping = groupings = 0
    for segment in segments:
        if segment.attempt != attempt:
            while kept and next(reversed(kept)) > segment.step:
                step, line = kept.popitem()
                undone[step] = line, groupings
            groupings += segment.grouping != grouping
            attempt, grouping = segment.attempt, segment.grouping
        for line in segment.lines:
            if line.step in undone:
                before, then = undone[line.step]
                again["steps"] += 1
                again["positions"] += line.last - line.first + 1
                if then == groupings and before != line:
                    again["differing"] += 1
                    problems.append(f"step {line.step} was done again with other samples: {before}, then {line}")
            kept[line.step] = line
    return [kept[step] for step in sorted(kept) if step <= committed], again, problems


def _gaps(lines: Sequence[Line]) -> Iterator[str]:
    for before, line in pairwise(lines):
        if line.step != before.step + 1:
            yield f"steps {before.step + 1} to {line.step - 1} are not in the ledger"
        if line.first > before.last + 1:
            yield f"positions {before.last + 1} to {line.first - 1} were passed over before step {line.step}"
        elif line.first <= before.last:
            yield f"positions {line.first} to {min(before.last, line.last)} were trained again in step {line.step}"


def _count(lines: Sequence[Line], plan: Plan) -> tuple[_Passes, list[str]]:
    """How often every sample was seen, pass by pass; lines whose digest is another are no evidence."""
    order, found, unproven, wasted, end = plan.order(), _Passes(), list[str](), 0, -1
    for some in _together(lines, plan):
        positions = np.concatenate([np.arange(line.first, line.last + 1) for line in some])
        epochs, places = np.divmod(positions, plan.epoch_size)
        source, passed, index = _looked_up(order, epochs, places)
        ends = np.cumsum([line.last - line.first + 1 for line in some])
        right = digests(positions, index, ends) == np.array([line.digest for line in some], dtype=np.uint64)
        unproven += [
            f"step {line.step} has other samples than the plan says: digest {line.digest:016x}"
            for line, ok in zip(some, right, strict=True)
            if not ok
        ]
        proven = np.repeat(right, np.diff(ends, prepend=0))
        _add(found, plan, source[proven], passed[proven], index[proven])
        for line, ok in zip(some, right, strict=True):
            _substitute(found, line, positions, source, passed)
            wasted += 0 if ok and line.first > end else _cost(line, plan)
            end = line.last
        if wasted > _PATIENCE and some[-1] is not lines[-1]:
            return found, [*unproven, f"the steps after {some[-1].step} are not looked at: too much is wrong before"]
    return found, unproven


def _cost(line: Line, plan: Plan) -> int:
    """How much work a line makes, in positions."""
    epochs = line.last // plan.epoch_size - line.first // plan.epoch_size + 1
    if epochs > _MOST_EPOCHS:
        raise ValueError(f"step {line.step} has {epochs} epochs, which no run has")
    return line.last - line.first + 1 + _EPOCH_COST * epochs


def _together(lines: Sequence[Line], plan: Plan) -> Iterator[list[Line]]:
    some: list[Line] = []
    size = 0
    for line in lines:
        some.append(line)
        size += _cost(line, plan)
        if size >= CHUNK_POSITIONS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _looked_up(order: Order, epochs: Indices, places: Indices) -> tuple[Indices, Indices, Indices]:
    source, passed, index = np.empty_like(places), np.empty_like(places), np.empty_like(places)
    for here in stretches(epochs):
        epoch = int(epochs[here.start])
        source[here], passed[here] = order.passes(epoch, places[here])
        index[here] = order(epoch, places[here])
    return source, passed, index


def _add(found: _Passes, plan: Plan, source: Indices, passed: Indices, index: Indices) -> None:
    for some in groups(source, passed):
        key = int(source[some[0]]), int(passed[some[0]])
        first, size = _extent(plan, key[0])
        if key not in found:
            found[key] = _Pass(first, size, np.zeros(size, dtype=np.uint16))
            older = found.get((key[0], key[1] - 2))
            if older is not None:
                older.close()
        found[key].add(index[some])


def _substitute(found: _Passes, line: Line, positions: Indices, source: Indices, passed: Indices) -> None:
    for swap in line.bad.split():
        at = int(np.searchsorted(positions, int(swap.partition(":")[0])))
        one = found.get((int(source[at]), int(passed[at])))
        if one is not None:
            one.substituted += 1


def _extent(plan: Plan, source: int) -> tuple[int, int]:
    """The first index of a source and its samples."""
    if not plan.sources:
        return 0, plan.samples
    return sum(before.samples for before in plan.sources[:source]), plan.sources[source].samples


def _rows(found: _Passes, plan: Plan, start: int) -> Iterator[dict[str, Any]]:
    """A row for every pass. In one that did not begin or end in this run nothing counts as missed: gaps are found by
    position.
    """
    newest = dict(sorted(found))
    oldest = dict(sorted(found, reverse=True)) if start else {}
    for (source, passed), one in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        one.close()
        row: dict[str, Any] = {"epoch": passed, "seen": one.seen, "repeated": one.times - one.seen}
        dropped = plan.samples - plan.epoch_size
        left = one.size - dropped - one.seen
        whole = left == 0 or oldest.get(source, -1) < passed < newest[source]
        row["missed"] = left if whole else 0
        row |= {"dropped": dropped} if dropped else {}
        row |= {"whole": whole, "substituted": one.substituted}
        yield row | ({"source": source} if plan.sources else {})

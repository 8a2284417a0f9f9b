"""Whether every sample was used exactly once, from the ledger of a run.

The order of the samples is reconstructed from the stored plan. A line counts only if its digest is the digest of the
samples at its positions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.data.ledger import LedgerLine, Segment
from runner.data.order import Indices, Order, digest_pieces, equal_runs, group_rows
from runner.data.plan import Plan

# A ledger may be damaged or hostile, so the work is limited.
CHUNK_POSITIONS = 1 << 18  # positions that are checked together
_MAX_EPOCHS = 1 << 16  # in a step
_MAX_WASTED = 1 << 22  # positions of lines that prove nothing, after which the check stops
_EPOCH_COST = 256  # an epoch costs as much work as so many positions


@dataclass(slots=True)
class _PassCounts:
    """How often each sample of a source was seen in a pass over it; a closed pass keeps only the sums."""

    first: int
    size: int
    counts: NDArray[np.uint16] | None
    distinct: int = 0  # samples seen at least once, of a closed pass
    times: int = 0
    substituted: int = 0

    def add(self, indices: Indices) -> None:
        self.times += len(indices)
        if self.counts is not None:
            np.add.at(self.counts, indices - self.first, 1)

    def close(self) -> None:
        if self.counts is not None:
            self.distinct, self.counts = int(np.count_nonzero(self.counts)), None


_Passes = dict[tuple[int, int], _PassCounts]  # by source and number of the pass


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """The verdict over a run. ``epochs`` has a row for every pass over every source; ``again`` counts the repeated
    steps, their positions and the steps that differed; ``problems`` are messages.
    """

    steps: int
    positions: int
    epochs: list[dict[str, Any]]
    again: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether no sample was repeated or missed, and every repeated step had the same samples."""
        return not self.problems


def check_exactly_once(segments: Sequence[Segment], plan: Plan | None, *, begun: int, committed: int) -> LedgerReport:
    """Check a run that began after step ``begun`` (0 unless it is a fork), up to its last committed step.

    Without a plan (for an iterable) only the continuity of positions and the repeated steps can be checked.
    """
    lines, again, problems = lineage(segments, committed=committed)
    problems += _gaps([LedgerLine(begun, 0, lines[0].first - 1 if begun and lines else -1, 0), *lines])
    if committed > (lines[-1].step if lines else begun):
        problems.append(f"the ledger ends before step {committed}, which is committed")
    epochs: list[dict[str, Any]] = []
    if plan is not None and lines:
        passes, unproven = _count(lines, plan)
        problems += unproven
        epochs = [*_rows(passes, plan, lines[0].first)]
        problems += [
            f"epoch {row['epoch']}: {row['repeated']} repeated, {row['missed']} missed"
            for row in epochs
            if row["repeated"] or row["missed"]
        ]
    positions = sum(line.last - line.first + 1 for line in lines)
    return LedgerReport(lines[-1].step if lines else 0, positions, epochs, again, problems)


def lineage(segments: Iterable[Segment], *, committed: int) -> tuple[list[LedgerLine], dict[str, int], list[str]]:
    """The lines that count, in order of steps; ``LedgerReport.again``; and a message for each step that differed."""
    lines: dict[int, LedgerLine] = {}
    undone: dict[int, tuple[LedgerLine, int]] = {}  # with the number of changes of the grouping before
    again = {"steps": 0, "positions": 0, "differing": 0}
    problems: list[str] = []
    attempt = grouping = changes = 0
    for segment in segments:
        if segment.attempt != attempt:
            while lines and next(reversed(lines)) > segment.step:
                step, line = lines.popitem()
                undone[step] = line, changes
            changes += segment.grouping != grouping
            attempt, grouping = segment.attempt, segment.grouping
        for line in segment.lines:
            if line.step in undone:
                before, changes_before = undone[line.step]
                again["steps"] += 1
                again["positions"] += line.last - line.first + 1
                if changes_before == changes and before != line:
                    again["differing"] += 1
                    problems.append(f"step {line.step} was done again with other samples: {before}, then {line}")
            lines[line.step] = line
    return [lines[step] for step in sorted(lines) if step <= committed], again, problems


def _gaps(lines: Sequence[LedgerLine]) -> Iterator[str]:
    for before, line in pairwise(lines):
        if line.step != before.step + 1:
            yield f"steps {before.step + 1} to {line.step - 1} are not in the ledger"
        if line.first > before.last + 1:
            yield f"positions {before.last + 1} to {line.first - 1} were passed over before step {line.step}"
        elif line.first <= before.last:
            yield f"positions {line.first} to {min(before.last, line.last)} were trained again in step {line.step}"


def _count(lines: Sequence[LedgerLine], plan: Plan) -> tuple[_Passes, list[str]]:
    """How often every sample was seen, pass by pass, and a message for each line whose digest is wrong."""
    order, passes, unproven, wasted, end = plan.order(), _Passes(), list[str](), 0, -1
    for chunk in _chunks(lines, plan):
        positions = np.concatenate([np.arange(line.first, line.last + 1) for line in chunk])
        source, pass_, index = _lookup(order, *np.divmod(positions, plan.epoch_size))
        ends = np.cumsum([line.last - line.first + 1 for line in chunk])
        right = digest_pieces(positions, index, ends) == np.array([line.digest for line in chunk], dtype=np.uint64)
        unproven += [
            f"step {line.step} has other samples than the plan says: digest {line.digest:016x}"
            for line, ok in zip(chunk, right, strict=True)
            if not ok
        ]
        proven = np.repeat(right, np.diff(ends, prepend=0))
        _add(passes, plan, source[proven], pass_[proven], index[proven])
        for line, ok in zip(chunk, right, strict=True):
            for text in line.substitutions.split():
                row = int(np.searchsorted(positions, int(text.partition(":")[0])))
                if counts := passes.get((int(source[row]), int(pass_[row]))):
                    counts.substituted += 1
            wasted += 0 if ok and line.first > end else _cost(line, plan)
            end = line.last
        if wasted > _MAX_WASTED and chunk[-1] is not lines[-1]:
            unproven.append(f"the steps after {chunk[-1].step} are not checked: too much is wrong before")
            break
    return passes, unproven


def _cost(line: LedgerLine, plan: Plan) -> int:
    """The work of checking a line, in positions."""
    epochs = line.last // plan.epoch_size - line.first // plan.epoch_size + 1
    if epochs > _MAX_EPOCHS:
        raise ValueError(f"step {line.step} has {epochs} epochs, which no run has")
    return line.last - line.first + 1 + _EPOCH_COST * epochs


def _chunks(lines: Sequence[LedgerLine], plan: Plan) -> Iterator[list[LedgerLine]]:
    chunk: list[LedgerLine] = []
    cost = 0
    for line in lines:
        chunk.append(line)
        cost += _cost(line, plan)
        if cost >= CHUNK_POSITIONS:
            yield chunk
            chunk, cost = [], 0
    if chunk:
        yield chunk


def _lookup(order: Order, epochs: Indices, places: Indices) -> tuple[Indices, Indices, Indices]:
    """(source, pass over it, sample index), each of the shape of ``places``."""
    source, pass_, index = np.empty_like(places), np.empty_like(places), np.empty_like(places)
    for run in equal_runs(epochs):
        epoch = int(epochs[run.start])
        source[run], pass_[run] = order.source_passes(epoch, places[run])
        index[run] = order(epoch, places[run])
    return source, pass_, index


def _add(passes: _Passes, plan: Plan, source: Indices, pass_: Indices, index: Indices) -> None:
    for rows in group_rows(source, pass_):
        key = number, _ = int(source[rows[0]]), int(pass_[rows[0]])
        if key not in passes:
            sizes = [each.samples for each in plan.sources] or [plan.samples]
            passes[key] = _PassCounts(sum(sizes[:number]), sizes[number], np.zeros(sizes[number], dtype=np.uint16))
            if older := passes.get((number, key[1] - 2)):  # steps come in order, so it has ended
                older.close()
        passes[key].add(index[rows])


def _rows(passes: _Passes, plan: Plan, start: int) -> Iterator[dict[str, Any]]:
    """A row for every pass. In a pass that did not begin and end in this run no sample counts as missed; a gap shows in
    the positions.
    """
    newest = dict(sorted(passes))
    oldest = dict(sorted(passes, reverse=True)) if start else {}
    for (source, number), counts in sorted(passes.items(), key=lambda item: (item[0][1], item[0][0])):
        counts.close()
        row: dict[str, Any] = {"epoch": number, "seen": counts.distinct, "repeated": counts.times - counts.distinct}
        dropped = plan.samples - plan.epoch_size
        left = counts.size - dropped - counts.distinct
        whole = left == 0 or oldest.get(source, -1) < number < newest[source]
        row["missed"] = left if whole else 0
        row |= {"dropped": dropped} if dropped else {}
        row |= {"whole": whole, "substituted": counts.substituted}
        yield row | ({"source": source} if plan.sources else {})

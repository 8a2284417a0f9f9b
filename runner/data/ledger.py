"""The record of the samples of every step: the evidence for "every sample exactly once".

    ledger/plan-0123456789abcdef.json      what determines the order of the samples (``Plan.recipe``)
    ledger/s000000100-a000002.txt          the steps of attempt 2 after step 100, a line per step

A line is ``step, first position, last position, digest of the samples' indices``, then ``position:index>substitute``
for every sample that could not be read, then the rollouts of the task (``rollouts_text``). Nothing is ever
removed: if a step is repeated after a kill, both lines stay, and they must be equal. ``check_exactly_once``
reconstructs the order of the samples from the stored plan, and counts a line only if its digest is the digest of the
samples at its positions.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.data.order import Indices, Order, digest_words, equal_runs, group_rows
from runner.data.plan import Plan
from runner.errors import DataError, StorageError
from runner.hashing import json_digest
from runner.plain import parse, parse_object
from runner.storage.location import JournalChain, Location
from runner.task import Rollouts

log = logging.getLogger("runner")

_FOLDER = "ledger"
_SEGMENT = re.compile(r"s([0-9]{9,})-a([0-9]{6,})\.txt")  # step after which the segment begins, attempt
_LINE = re.compile(
    r"([0-9]{1,15}) ([0-9]{1,18}) ([0-9]{1,18}) ([0-9a-f]{16})((?: [0-9]{1,18}:[0-9]+>[0-9]+)*)"
    r"(| (?:rollouts|made)=[^\n]*)"
)
_RANGES = r"(?:[0-9]{1,18}-[0-9]{1,18}(?:,[0-9]{1,18}-[0-9]{1,18})*)?"
_ROLLOUTS = re.compile(rf" rollouts=([0-9a-f]{{16}}) trained=({_RANGES})x([0-9]{{1,9}}) dropped=({_RANGES})")
SEGMENT_BYTES = 1 << 20  # from this size on, a commit begins a new segment
MAX_SEGMENT_BYTES = 16 << 20  # from this size on, a new segment begins without a commit
_MAX_SEGMENT = 64 << 20  # bytes to read of a segment
_MAX_PLAN = 256 << 20  # bytes to read of a plan
_MAX_STEP = 1 << 22  # samples in a step, whatever a damaged file claims
_SHORTEST = len("1 0 0 0123456789abcdef\n")

_OTHER_SAMPLES = (
    "The data set or the code that orders it has changed since the run began, or a sample cannot be read any more. "
    "Restore the data, accept the present data with run.on_drift=accept"
)
_OTHER_ROLLOUTS = (
    "The task uses something that is not in its state, or its code has changed. Give it state_dict and "
    "load_state_dict (python -m runner.verify names what is missing), accept the rollouts with run.on_drift=accept"
)

# A ledger may be damaged or hostile, so the work is limited.
CHUNK_POSITIONS = 1 << 18  # positions that are checked together
_MAX_EPOCHS = 1 << 16  # epochs in a step
_MAX_WASTED = 1 << 22  # positions of lines with a wrong digest, after which the check stops
_EPOCH_COST = 256  # positions whose check takes about as long as the beginning of an epoch


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """A step: its positions from ``first`` to ``last``, a digest of the samples there, and the substitutions."""

    step: int
    first: int
    last: int
    digest: int
    substitutions: str = ""
    rollouts: str = ""

    def __str__(self) -> str:
        return f"{self.step} {self.first} {self.last} {self.digest:016x}{self.substitutions}{self.rollouts}"


def rollouts_text(rollouts: Rollouts | None) -> str:
    """The end of a line: ``rollouts=<digest> trained=0-3,7-7x2 dropped=4-6``, with positions."""
    if rollouts is None:
        return ""
    trained, dropped = _ranges(rollouts.trained), _ranges(rollouts.dropped)
    return f" rollouts={rollouts.digest:016x} trained={trained}x{rollouts.times} dropped={dropped}"


def parse_rollouts(text: str) -> tuple[str, list[tuple[int, int]], int, list[tuple[int, int]]]:
    """Digest, ranges of positions trained, how often, ranges of positions dropped. Raises ValueError."""
    fields = _ROLLOUTS.fullmatch(text)
    if fields is None:
        raise ValueError(f"not the rollouts of a step: {text[:80]!r}")
    ranges = [[(int(a), int(b)) for a, b in (r.split("-") for r in filter(None, fields[n].split(",")))] for n in (2, 4)]
    return fields[1], ranges[0], int(fields[3]), ranges[1]


def _ranges(positions: Sequence[int]) -> str:
    ordered = np.unique(np.asarray([*positions], dtype=np.int64))
    return ",".join(
        f"{run[0]}-{run[-1]}" for run in np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1) if len(run)
    )


@dataclass(frozen=True, slots=True)
class Segment:
    """The lines of an attempt after ``step``, under one plan, with ``grouping`` positions in a step.

    ``damage`` describes an unreadable line after ``lines``: a kill or a power cut may tear the end of a file.
    """

    step: int
    attempt: int
    plan_digest: str
    grouping: int
    lines: tuple[LedgerLine, ...]
    damage: str = ""


class Ledger:
    """Writes the lines of an attempt and compares them with earlier ones; with ``accept`` they may differ."""

    def __init__(
        self, location: Location, *, attempt: int, recipe: dict[str, Any], grouping: int, accept: bool = False
    ) -> None:
        self._location = location
        self._attempt = attempt
        self._recipe = recipe
        self._accept = accept
        self._header = {"plan": json_digest(recipe, sort_keys=True), "grouping": grouping}
        self._journals = JournalChain(location.journal)
        self._earlier: dict[int, tuple[LedgerLine, int]] = {}  # step -> its newest line, and the attempt

    def open(self, step: int) -> None:
        """Begin after ``step``."""
        name, text = f"{_FOLDER}/plan-{self._header['plan']}.json", json.dumps(self._recipe).encode()
        if self._location.read(name, limit=_MAX_PLAN) != text:
            self._location.replace(name, [text])
        for segment in read_segments(self._location, after=step):
            if segment.grouping != self._header["grouping"]:  # all its later steps had other positions
                self._earlier = {number: line for number, line in self._earlier.items() if number <= segment.step}
            else:
                self._earlier |= {line.step: (line, segment.attempt) for line in segment.lines if line.step > step}
        self._begin(step)

    def add(self, line: LedgerLine) -> None:
        """Record a step. Raises DataError if an earlier attempt trained it on other samples or rollouts."""
        if self._earlier:
            self._compare(line)
        self._journals.append(f"{line}\n".encode())
        if self._journals.size > MAX_SEGMENT_BYTES:
            self.mark(line.step)

    def _compare(self, line: LedgerLine) -> None:
        earlier, attempt = self._earlier.pop(line.step, (line, 0))
        if earlier != line:
            same_samples = replace(earlier, rollouts=line.rollouts) == line
            difference = (
                f"step {line.step} is done again and has other {'rollouts' if same_samples else 'samples'} than in "
                f"attempt {attempt}:\n  then  {earlier}\n"
                f"  now   {line}   (step, first and last position, digest of the samples, substitutes)\n"
            )
            if not self._accept:
                raise DataError(
                    f"{difference}{_OTHER_ROLLOUTS if same_samples else _OTHER_SAMPLES}, or start a new run with "
                    "run.name=... Nothing of this step was committed.",
                    kind="rollouts-changed" if same_samples else "order-changed",
                )
            log.warning("changed  %sThat is accepted, and stays in the ledger.", difference)

    def mark(self, step: int) -> dict[str, Any]:
        """All lines so far belong to the commit at ``step``; ``flush``, in any thread, makes them durable."""
        if self._journals.size > SEGMENT_BYTES:
            with suppress(StorageError):  # if there is no room for another file, this one continues to grow
                self._begin(step)
        return {}

    def flush(self) -> None:
        """Make all marked lines durable. May run in parallel with ``add``, in one thread at a time."""
        self._journals.flush()

    def close(self) -> None:
        """Close the files."""
        self._journals.close()

    def _begin(self, step: int) -> None:
        header = json.dumps(self._header).encode() + b"\n"
        self._journals.begin(_segment_name(step, self._attempt), header)


def read_segments(location: Location, *, after: int = -1) -> list[Segment]:
    """All segments in the order in which they were begun; with ``after`` only the segments that matter for later steps.

    The first of these is the first that may, by its size, reach beyond ``after``. If a later attempt began at the same
    step and wrote as much, an earlier segment is left out, because the later attempt compared its lines.
    """
    names = ((_SEGMENT.fullmatch(entry.name), entry.size) for entry in location.list(_FOLDER))
    sizes = {(int(name[2]), int(name[1])): size for name, size in names if name}
    relevant: list[tuple[int, int]] = []
    longest: dict[int, int] = {}  # step after which segments begin -> bytes of the longest
    ends: dict[tuple[int, int], int] = {}
    following = (0, 0)
    for attempt, step in sorted(sizes, reverse=True):
        same_attempt = following[0] == attempt
        if same_attempt:
            ends[attempt, step] = following[1]
        repeated = after >= 0 and sizes[attempt, step] <= longest.get(step, -1)
        if not (same_attempt and following[1] <= after) and not repeated:
            relevant.insert(0, (attempt, step))
        longest[step] = max(longest.get(step, 0), sizes[attempt, step])
        following = attempt, step
    reach = [max(ends.get(key, 0), key[1] + sizes[key] // _SHORTEST) for key in relevant]
    first = next((number for number, end in enumerate(reach) if end > after), len(relevant))
    return [segment for attempt, step in relevant[first:] for segment in _read(location, step, attempt)]


def substitutions(location: Location, recipe: dict[str, Any]) -> dict[int, int]:
    """position -> index of its substitute, by the newest line of each step of this recipe."""
    last: dict[int, str] = {}
    for segment in read_segments(location):
        if segment.plan_digest == json_digest(recipe, sort_keys=True):
            for line in segment.lines:
                last.pop(line.step, None)  # so that newer lines come later
                last[line.step] = line.substitutions
    fields = (re.split("[:>]", text) for texts in last.values() for text in texts.split())
    return {int(position): int(substitute) for position, _, substitute in fields}


def read_recipe(location: Location, digest: str) -> dict[str, Any]:
    """The recipe with this digest. Raises StorageError if it is missing or does not have this digest."""
    name = f"{_FOLDER}/plan-{digest}.json"
    content = parse_object(location.read(name, limit=_MAX_PLAN) or b"")
    if content is None or json_digest(content, sort_keys=True) != digest:
        raise StorageError(f"{location.url}/{name} is missing or damaged; without it the ledger proves nothing")
    return content


def _segment_name(step: int, attempt: int) -> str:
    return f"{_FOLDER}/s{step:09d}-a{attempt:06d}.txt"


def _read(location: Location, step: int, attempt: int) -> Iterator[Segment]:
    """The segment; nothing if a kill came before its header was written."""
    name = _segment_name(step, attempt)
    text = (location.read(name, limit=_MAX_SEGMENT) or b"").decode(errors="replace")
    header, *rest = text[: text.rfind("\n") + 1].splitlines() or [""]
    if not header:
        return
    lines: list[LedgerLine] = []
    digest, grouping, damage = "", 0, ""
    try:
        fields = parse(header.encode())
        digest, grouping = str(fields["plan"]), int(fields["grouping"])
        for line in rest:
            lines.append(_parse_line(line, min(grouping, _MAX_STEP), after=lines[-1].step if lines else step))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        damage = f"{location.url}/{name} is damaged after step {lines[-1].step if lines else step}: {error}"
    yield Segment(step, attempt, digest, grouping, tuple(lines), damage)


def _parse_line(line: str, max_positions: int, *, after: int) -> LedgerLine:
    fields = _LINE.fullmatch(line)
    if fields is None:
        raise ValueError(f"not a line of a ledger: {line[:80]!r}")
    step, first, last = int(fields[1]), int(fields[2]), int(fields[3])
    positions = [first, last, *(int(text.partition(":")[0]) for text in fields[5].split())]
    if step <= after or not first <= min(positions) <= max(positions) <= last < first + max_positions:
        raise ValueError(f"impossible step or positions: {line[:80]!r}")
    rollouts = fields[6].replace(" made=", " rollouts=", 1)  # the word of an earlier version
    if rollouts:
        parse_rollouts(rollouts)
    return LedgerLine(step, first, last, int(fields[4], 16), fields[5], rollouts)


@dataclass(slots=True)
class _PassCounts:
    """How often each sample of a source was seen in a pass over it; a closed pass keeps only the sums."""

    first: int  # index of the source's first sample
    counts: NDArray[np.uint32] | None
    due: Indices | None = None  # how often each sample is due in a whole epoch; None: once
    distinct: int = 0  # samples seen at least once
    repeated: int = 0  # by how much samples were seen too often, in total
    missed: int = 0  # by how much samples were seen too seldom, in total, if the pass is whole
    substituted: int = 0

    def add(self, indices: Indices) -> None:
        if self.counts is not None:
            np.add.at(self.counts, indices - self.first, 1)

    def close(self) -> None:
        if self.counts is not None:
            surplus = self.counts.astype(np.int64) - (1 if self.due is None else self.due)
            self.repeated, self.missed = int(surplus.clip(0).sum()), int((-surplus).clip(0).sum())
            self.distinct, self.counts, self.due = int(np.count_nonzero(self.counts)), None, None


_Passes = dict[tuple[int, int], _PassCounts]  # (source, number of the pass) -> counts


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """The verdict on a run, which ``holds`` if there are no ``problems`` (messages)."""

    steps: int
    positions: int
    epochs: list[dict[str, Any]]  # a row for every pass over every source
    again: dict[str, int]  # the number of repeated steps, of their positions, and of the steps that differed
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
        wrong = [row for row in epochs if row["repeated"] or row["missed"]]
        problems += [f"epoch {row['epoch']}: {row['repeated']} repeated, {row['missed']} missed" for row in wrong]
    positions = sum(line.last - line.first + 1 for line in lines)
    return LedgerReport(lines[-1].step if lines else 0, positions, epochs, again, problems)


def lineage(segments: Iterable[Segment], *, committed: int) -> tuple[list[LedgerLine], dict[str, int], list[str]]:
    """The lines that count, in order of steps; ``LedgerReport.again``; and a message for each step that differed."""
    lines: dict[int, LedgerLine] = {}
    earlier: dict[int, tuple[LedgerLine, int]] = {}  # step -> its line, and ``changes`` then
    again = {"steps": 0, "positions": 0, "differing": 0}
    problems: list[str] = []
    attempt = grouping = changes = 0  # ``changes`` of the grouping so far
    for segment in segments:
        if segment.attempt != attempt:
            while lines and next(reversed(lines)) > segment.step:
                step, line = lines.popitem()
                earlier[step] = line, changes
            changes += segment.grouping != grouping
            attempt, grouping = segment.attempt, segment.grouping
        for line in segment.lines:
            if line.step in earlier:
                before, changes_before = earlier[line.step]
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
        epochs, places = np.divmod(positions, plan.epoch_size)
        source, pass_, index = np.empty_like(places), np.empty_like(places), np.empty_like(places)
        for run in equal_runs(epochs):
            epoch = int(epochs[run.start])
            source[run], pass_[run] = order.source_passes(epoch, places[run])
            index[run] = order(epoch, places[run])
        ends = np.cumsum([line.last - line.first + 1 for line in chunk])
        sums = np.cumsum(digest_words(positions, index), dtype=np.uint64)[ends - 1]
        right = np.diff(sums, prepend=np.uint64(0)) == np.array([line.digest for line in chunk], dtype=np.uint64)
        proven = np.repeat(right, np.diff(ends, prepend=0))
        _add(passes, plan, order, source[proven], pass_[proven], index[proven])
        for line, ok in zip(chunk, right, strict=True):
            if not ok:
                unproven.append(f"step {line.step} has other samples than the plan says: digest {line.digest:016x}")
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
    return line.last - line.first + 1 + (_EPOCH_COST + plan.samples * bool(plan.weights)) * epochs


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


def _add(passes: _Passes, plan: Plan, order: Order, source: Indices, pass_: Indices, index: Indices) -> None:
    for rows in group_rows(source, pass_):
        key = number, _ = int(source[rows[0]]), int(pass_[rows[0]])
        if key not in passes:
            sizes = [each.samples for each in plan.sources] or [plan.samples]
            passes[key] = _PassCounts(sum(sizes[:number]), np.zeros(sizes[number], dtype=np.uint32))
            if plan.weights:
                places = order(key[1], np.arange(plan.epoch_size))
                passes[key].due = np.bincount(places, minlength=plan.samples)
            if older := passes.get((number, key[1] - 2)):  # steps come in order, so this pass has ended
                older.close()
        passes[key].add(index[rows])


def _rows(passes: _Passes, plan: Plan, start: int) -> Iterator[dict[str, Any]]:
    """A row for every pass. Samples can be missed only in a whole pass; gaps in the positions are checked elsewhere."""
    newest = dict(sorted(passes))
    oldest = dict(sorted(passes, reverse=True)) if start else {}
    for (source, number), counts in sorted(passes.items(), key=lambda item: (item[0][1], item[0][0])):
        counts.close()
        row: dict[str, Any] = {"epoch": number, "seen": counts.distinct, "repeated": counts.repeated}
        dropped = 0 if plan.weights else plan.samples - plan.epoch_size
        left = counts.missed - dropped
        whole = left == 0 or oldest.get(source, -1) < number < newest[source]
        row["missed"] = left if whole else 0
        row |= {"dropped": dropped} if dropped else {}
        row |= {"whole": whole, "substituted": counts.substituted}
        yield row | ({"source": source} if plan.sources else {})

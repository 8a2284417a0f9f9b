"""The record of which samples every step was trained on: the evidence for "every sample exactly once".

    ledger/plan-0123456789abcdef.json      from which the order of the samples follows (``Plan.recipe``)
    ledger/s000000100-a000002.txt          what attempt 2 did after step 100, a line per step

A line is ``step, first position, last position, digest of the samples' indices``, then ``position:index>instead`` for
every sample that could not be read. Nothing is ever removed: if a step is repeated after a kill, both lines stay, and
they must be equal.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from runner.errors import DataError, StorageError
from runner.plain import parse, parse_object
from runner.storage.location import Journals, Location

log = logging.getLogger("runner")

_FOLDER = "ledger"
_SEGMENT = re.compile(r"s([0-9]{9,})-a([0-9]{6,})\.txt")
_LINE = re.compile(r"([0-9]{1,15}) ([0-9]{1,18}) ([0-9]{1,18}) ([0-9a-f]{16})((?: [0-9]{1,18}:[0-9]+>[0-9]+)*)")
SEGMENT_BYTES = 1 << 20  # bytes after which a new segment is begun
MAX_SEGMENT_BYTES = 16 << 20  # where nothing is committed for long
_LIMIT = 64 << 20
_LIMIT_PLAN = 256 << 20
_LARGEST = 1 << 22  # samples in a step, of which each is read alone
_SHORTEST = len("1 0 0 0123456789abcdef\n")


@dataclass(frozen=True, slots=True)
class Line:
    """One step: its positions from ``first`` to ``last``, and a digest of the samples there."""

    step: int
    first: int
    last: int
    digest: int
    bad: str = ""

    def __str__(self) -> str:
        return f"{self.step} {self.first} {self.last} {self.digest:016x}{self.bad}"


@dataclass(frozen=True, slots=True)
class Segment:
    """What one attempt did after ``step``, under one plan; ``grouping`` is how many positions made a step.

    ``damage`` says what is wrong with the line after the last of ``lines``: a kill or a power cut may tear the end.
    """

    step: int
    attempt: int
    plan: str
    grouping: int
    lines: tuple[Line, ...]
    damage: str = ""


class Ledger:
    """Writes the lines of one attempt, and compares them with those of earlier attempts. With ``accept``, a step that
    is done again may have other samples; both lines stay.
    """

    def __init__(
        self, location: Location, *, attempt: int, recipe: dict[str, Any], grouping: int, accept: bool = False
    ) -> None:
        self._location = location
        self._attempt = attempt
        self._recipe = recipe
        self._accept = accept
        self._header = {"plan": _digest(recipe), "grouping": grouping}
        self._journals = Journals(location)
        self._before: dict[int, tuple[Line, int]] = {}

    def open(self, step: int) -> None:
        """Go on after ``step``."""
        name, text = f"{_FOLDER}/plan-{self._header['plan']}.json", json.dumps(self._recipe).encode()
        if self._location.read(name, limit=_LIMIT_PLAN) != text:
            self._location.replace(name, [text])
        for segment in segments(self._location, after=step):
            if segment.grouping != self._header["grouping"]:  # it moved the positions of every step that followed
                self._before = {number: line for number, line in self._before.items() if number <= segment.step}
            else:
                self._before |= {line.step: (line, segment.attempt) for line in segment.lines if line.step > step}
        self._begin(step)

    def add(self, line: Line) -> None:
        """Record a step. Raises DataError if an earlier attempt did it with other samples."""
        if self._before:
            self._compare(line)
        self._journals.append(f"{line}\n".encode())
        if self._journals.size > MAX_SEGMENT_BYTES:
            self.mark(line.step)

    def mark(self, step: int) -> None:
        """Every line so far belongs to the commit at ``step``; ``flush`` in any thread makes them durable."""
        if self._journals.size > SEGMENT_BYTES:
            with suppress(StorageError):  # where there is no room for another file, this one grows on
                self._begin(step)

    def flush(self) -> None:
        """Make everything that was marked durable. May run beside ``add``, once at a time."""
        self._journals.flush()

    def close(self) -> None:
        """Let go of the files."""
        self._journals.close()

    def _begin(self, step: int) -> None:
        head = json.dumps(self._header).encode() + b"\n"
        self._journals.begin(f"{_FOLDER}/s{step:09d}-a{self._attempt:06d}.txt", head)

    def _compare(self, line: Line) -> None:
        before, attempt = self._before.pop(line.step, (line, 0))
        if before == line:
            return
        differs = (
            f"step {line.step} is done again and has other samples than in attempt {attempt}:\n  then  {before}\n"
            f"  now   {line}   (step, first and last position, digest of the samples, substitutes)\n"
        )
        if not self._accept:
            raise DataError(
                f"{differs}The data set or the code that orders it is not what the run began with, or a sample cannot "
                "be read any more. Nothing of this step was committed; restore them, go on with what there is now by "
                "run.on_drift=accept, or begin a new run with run.name=..."
            )
        log.warning("changed  %sThat is accepted, and stays in the ledger.", differs)


def segments(location: Location, *, after: int = -1) -> list[Segment]:
    """All segments in the order in which they were begun; with ``after`` only those that matter for later steps.

    That is none from before the first that may reach so far, by its size; and of those that begin at the same step none
    that a later attempt has done again and further, because it was compared with it.
    """
    sizes = {
        (int(m[2]), int(m[1])): entry.size for entry in location.list(_FOLDER) if (m := _SEGMENT.fullmatch(entry.name))
    }
    wanted: list[tuple[int, int]] = []
    longest: dict[int, int] = {}
    ends: dict[tuple[int, int], int] = {}
    following = (0, 0)
    for attempt, step in sorted(sizes, reverse=True):
        over = following[0] == attempt and following[1] <= after
        again = after >= 0 and sizes[attempt, step] <= longest.get(step, -1)
        if following[0] == attempt:
            ends[attempt, step] = following[1]
        if not over and not again:
            wanted.insert(0, (attempt, step))
        longest[step] = max(longest.get(step, 0), sizes[attempt, step])
        following = attempt, step
    reach = (
        place for place, key in enumerate(wanted) if max(ends.get(key, 0), key[1] + sizes[key] // _SHORTEST) > after
    )
    first = next(reach, len(wanted))
    return [segment for attempt, step in wanted[first:] for segment in _read(location, step, attempt)]


def swaps(location: Location, recipe: dict[str, Any]) -> dict[int, int]:
    """The samples taken in place of others, by position, in the steps of this recipe as they were last done."""
    last: dict[int, str] = {}
    for segment in segments(location):
        if segment.plan == _digest(recipe):
            for line in segment.lines:
                last.pop(line.step, None)
                last |= {line.step: line.bad} if line.bad else {}
    found = (re.split("[:>]", swap) for bad in last.values() for swap in bad.split())
    return {int(position): int(instead) for position, _, instead in found}


def recipe(location: Location, plan: str) -> dict[str, Any]:
    """The recipe with that digest. Raises StorageError if it is not there or not what it was."""
    name = f"{_FOLDER}/plan-{plan}.json"
    found = parse_object(location.read(name, limit=_LIMIT_PLAN) or b"")
    if found is None or _digest(found) != plan:
        raise StorageError(f"{location.url}/{name} is missing or damaged; without it the ledger proves nothing")
    return found


def _read(location: Location, step: int, attempt: int) -> Iterator[Segment]:
    name = f"{_FOLDER}/s{step:09d}-a{attempt:06d}.txt"
    text = (location.read(name, limit=_LIMIT) or b"").decode(errors="replace")
    header, *rest = text[: text.rfind("\n") + 1].splitlines() or [""]
    if not header:  # killed before the first line was whole
        return
    lines: list[Line] = []
    plan, grouping, damage = "", 0, ""
    try:
        about = parse(header.encode())
        plan, grouping = str(about["plan"]), int(about["grouping"])
        for line in rest:
            lines.append(_parsed(line, min(grouping, _LARGEST), after=lines[-1].step if lines else step))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        damage = f"{location.url}/{name} is damaged after step {lines[-1].step if lines else step}: {error}"
    yield Segment(step, attempt, plan, grouping, tuple(lines), damage)


def _parsed(line: str, largest: int, *, after: int) -> Line:
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"no line of a ledger: {line[:80]!r}")
    step, first, last = int(found[1]), int(found[2]), int(found[3])
    swapped = [int(swap.partition(":")[0]) for swap in found[5].split()]
    if (
        step <= after
        or not first <= last < first + largest
        or any(not first <= position <= last for position in swapped)
    ):
        raise ValueError(f"a step or positions that cannot be: {line[:80]!r}")
    return Line(step, first, last, int(found[4], 16), found[5])


def _digest(recipe: dict[str, Any]) -> str:
    return blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8).hexdigest()

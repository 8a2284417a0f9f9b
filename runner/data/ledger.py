"""The record of the samples of every step: the evidence for "every sample exactly once".

    ledger/plan-0123456789abcdef.json      from which the order of the samples follows (``Plan.recipe``)
    ledger/s000000100-a000002.txt          the steps of attempt 2 after step 100, a line per step

A line is ``step, first position, last position, digest of the samples' indices``, then ``position:index>substitute``
for every sample that could not be read. Nothing is ever removed: if a step is repeated after a kill, both lines stay,
and they must be equal.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runner.errors import DataError, StorageError
from runner.hashing import json_digest
from runner.plain import parse, parse_object
from runner.storage.location import JournalChain, Location

log = logging.getLogger("runner")

_FOLDER = "ledger"
_SEGMENT = re.compile(r"s([0-9]{9,})-a([0-9]{6,})\.txt")
_LINE = re.compile(r"([0-9]{1,15}) ([0-9]{1,18}) ([0-9]{1,18}) ([0-9a-f]{16})((?: [0-9]{1,18}:[0-9]+>[0-9]+)*)")
SEGMENT_BYTES = 1 << 20  # bytes; a commit then begins a new segment
MAX_SEGMENT_BYTES = 16 << 20  # bytes; a new segment is begun without a commit
_MAX_SEGMENT = 64 << 20  # bytes
_MAX_PLAN = 256 << 20  # bytes
_MAX_STEP = 1 << 22  # samples: a limit for what a damaged file may claim
_SHORTEST = len("1 0 0 0123456789abcdef\n")


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """A step: its positions from ``first`` to ``last``, a digest of the samples there, and the substitutions."""

    step: int
    first: int
    last: int
    digest: int
    substitutions: str = ""

    def __str__(self) -> str:
        return f"{self.step} {self.first} {self.last} {self.digest:016x}{self.substitutions}"


@dataclass(frozen=True, slots=True)
class Segment:
    """The lines of an attempt after ``step``, under one plan, with ``grouping`` positions in a step.

    ``damage`` describes an unreadable line after ``lines``: a kill or a power cut may tear the end of a file.
    """

    step: int
    attempt: int
    plan: str
    grouping: int
    lines: tuple[LedgerLine, ...]
    damage: str = ""


class Ledger:
    """Writes the lines of an attempt, and compares them with the lines of earlier attempts. With ``accept``, a repeated
    step may have other samples; both lines stay.
    """

    def __init__(
        self, location: Location, *, attempt: int, recipe: dict[str, Any], grouping: int, accept: bool = False
    ) -> None:
        self._location = location
        self._attempt = attempt
        self._recipe = recipe
        self._accept = accept
        self._header = {"plan": json_digest(recipe, sort_keys=True), "grouping": grouping}
        self._journals = JournalChain(location)
        self._earlier: dict[int, tuple[LedgerLine, int]] = {}  # step -> its last line so far, and the attempt

    def open(self, step: int) -> None:
        """Begin after ``step``."""
        name, text = f"{_FOLDER}/plan-{self._header['plan']}.json", json.dumps(self._recipe).encode()
        if self._location.read(name, limit=_MAX_PLAN) != text:
            self._location.replace(name, [text])
        for segment in segments(self._location, after=step):
            if segment.grouping != self._header["grouping"]:  # all later steps had other positions
                self._earlier = {number: line for number, line in self._earlier.items() if number <= segment.step}
            else:
                self._earlier |= {line.step: (line, segment.attempt) for line in segment.lines if line.step > step}
        self._begin(step)

    def add(self, line: LedgerLine) -> None:
        """Record a step. Raises DataError if an earlier attempt trained it on other samples."""
        if self._earlier:
            self._compare(line)
        self._journals.append(f"{line}\n".encode())
        if self._journals.size > MAX_SEGMENT_BYTES:
            self.mark(line.step)

    def mark(self, step: int) -> dict[str, Any]:
        """All lines so far belong to the commit at ``step``; ``flush``, in any thread, makes them durable."""
        if self._journals.size > SEGMENT_BYTES:
            with suppress(StorageError):  # without room for another file, this one goes on growing
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

    def _compare(self, line: LedgerLine) -> None:
        earlier, attempt = self._earlier.pop(line.step, (line, 0))
        if earlier == line:
            return
        difference = (
            f"step {line.step} is done again and has other samples than in attempt {attempt}:\n  then  {earlier}\n"
            f"  now   {line}   (step, first and last position, digest of the samples, substitutes)\n"
        )
        if not self._accept:
            raise DataError(
                f"{difference}The data set or the code that orders it has changed since the run began, or a sample "
                "cannot be read any more. Nothing of this step was committed; restore the data, go on with the data of "
                "now by run.on_drift=accept, or begin a new run with run.name=...",
                kind="order-changed",
            )
        log.warning("changed  %sThat is accepted, and stays in the ledger.", difference)


def segments(location: Location, *, after: int = -1) -> list[Segment]:
    """All segments in the order in which they were begun; with ``after`` only the segments that matter for later steps.

    Left out are the segments before the first that may, by its size, reach beyond ``after``. Of segments that begin at
    the same step, one that a later attempt repeated and exceeded is left out, because both were compared then.
    """
    sizes = {
        (int(m[2]), int(m[1])): entry.size for entry in location.list(_FOLDER) if (m := _SEGMENT.fullmatch(entry.name))
    }
    relevant: list[tuple[int, int]] = []
    longest: dict[int, int] = {}  # by the step after which segments begin
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
    reaching = (
        number for number, key in enumerate(relevant) if max(ends.get(key, 0), key[1] + sizes[key] // _SHORTEST) > after
    )
    first = next(reaching, len(relevant))
    return [segment for attempt, step in relevant[first:] for segment in _read(location, step, attempt)]


def substitutions(location: Location, recipe: dict[str, Any]) -> dict[int, int]:
    """position -> index of its substitute, in the last lines of the steps of this recipe."""
    last: dict[int, str] = {}
    for segment in segments(location):
        if segment.plan == json_digest(recipe, sort_keys=True):
            for line in segment.lines:
                last.pop(line.step, None)
                last |= {line.step: line.substitutions} if line.substitutions else {}
    fields = (re.split("[:>]", text) for texts in last.values() for text in texts.split())
    return {int(position): int(substitute) for position, _, substitute in fields}


def recipe(location: Location, plan: str) -> dict[str, Any]:
    """The recipe with the digest ``plan``. Raises StorageError if it is missing or does not have this digest."""
    name = f"{_FOLDER}/plan-{plan}.json"
    content = parse_object(location.read(name, limit=_MAX_PLAN) or b"")
    if content is None or json_digest(content, sort_keys=True) != plan:
        raise StorageError(f"{location.url}/{name} is missing or damaged; without it the ledger proves nothing")
    return content


def _segment_name(step: int, attempt: int) -> str:
    return f"{_FOLDER}/s{step:09d}-a{attempt:06d}.txt"


def _read(location: Location, step: int, attempt: int) -> Iterator[Segment]:
    """The segment; nothing if a kill came before its header was whole."""
    name = _segment_name(step, attempt)
    text = (location.read(name, limit=_MAX_SEGMENT) or b"").decode(errors="replace")
    header, *rest = text[: text.rfind("\n") + 1].splitlines() or [""]
    if not header:
        return
    lines: list[LedgerLine] = []
    plan, grouping, damage = "", 0, ""
    try:
        fields = parse(header.encode())
        plan, grouping = str(fields["plan"]), int(fields["grouping"])
        for line in rest:
            lines.append(_parse_line(line, min(grouping, _MAX_STEP), after=lines[-1].step if lines else step))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        damage = f"{location.url}/{name} is damaged after step {lines[-1].step if lines else step}: {error}"
    yield Segment(step, attempt, plan, grouping, tuple(lines), damage)


def _parse_line(line: str, max_positions: int, *, after: int) -> LedgerLine:
    fields = _LINE.fullmatch(line)
    if fields is None:
        raise ValueError(f"not a line of a ledger: {line[:80]!r}")
    step, first, last = int(fields[1]), int(fields[2]), int(fields[3])
    replaced = [int(text.partition(":")[0]) for text in fields[5].split()]
    if (
        step <= after
        or not first <= last < first + max_positions
        or any(not first <= position <= last for position in replaced)
    ):
        raise ValueError(f"impossible step or positions: {line[:80]!r}")
    return LedgerLine(step, first, last, int(fields[4], 16), fields[5])

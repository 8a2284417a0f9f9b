"""Metrics as lines of JSON, each step once: a resume removes the lines of steps that it repeats.

    metrics/s000000000-a000001.jsonl     {"step": 10, "train/loss": 0.3, "time/step": 0.002, "time/unix": 1764421.2}

A segment (file) is written as a whole before each commit, and the commit records the number of its lines; a resume
removes all lines after them. The files in the order of their names contain every (step, tag) once. Tags of metrics that
depend on the clock begin with ``time/``. ``runs compare`` and ``runner.verify`` read these files.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

from runner.metrics.writer import MetricWriter, WriterContext
from runner.plain import parse
from runner.storage.location import BufferedJournal, JournalChain, Location

TIME = "time/unix"  # the tag of the moment at which a line was added, in seconds since 1970
_FOLDER = "metrics"
_SEGMENT = re.compile(r"s([0-9]{9,})-a([0-9]{6,})\.jsonl")
SEGMENT_BYTES = 1 << 20  # bytes after which a commit begins a new segment, because a segment is written whole each time
MAX_SEGMENT_BYTES = 16 << 20  # bytes after which a new segment begins without a commit
_LIMIT = 64 << 20  # bytes of a segment that are read: above MAX_SEGMENT_BYTES and a last line


class LinesWriter(MetricWriter):
    """Appends to the metrics of a run. The constructor removes all lines after ``context.mark``."""

    def __init__(self, context: WriterContext) -> None:
        self._location = context.location
        self._attempt = context.attempt
        self._journals = JournalChain(partial(BufferedJournal, self._location))
        end = context.mark
        last = _key(end["segment"]) if end else None
        for entry in self._location.list(_FOLDER):
            key = _key(entry.name)
            if key is not None and (last is None or key >= last):
                self._cut(f"{_FOLDER}/{entry.name}", end["lines"] if end and key == last else 0)
        self._begin(context.step)

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        """Add a line, in memory until ``flush``. NaN and infinity become null; texts are left out."""
        numbers = {tag: value for tag, value in values.items() if not isinstance(value, str)}
        finite = {tag: value if math.isfinite(value) else None for tag, value in numbers.items()}
        line = json.dumps({"step": step, **finite, TIME: round(time.time(), 3)}).encode() + b"\n"
        self._journals.append(line)
        self._lines += 1
        if self._journals.size > MAX_SEGMENT_BYTES:
            self._begin(step)

    def mark(self, step: int) -> dict[str, Any]:
        """The segment, and the number of its lines, up to which ``flush`` makes the lines durable."""
        end = {"segment": self._segment, "lines": self._lines}
        if self._journals.size > SEGMENT_BYTES:
            self._begin(step)
        return end

    def flush(self) -> None:
        self._journals.flush()

    def _cut(self, name: str, keep: int) -> None:
        lines = _read(self._location, name) if keep else []
        if not keep:
            self._location.remove(name)
        elif len(lines) > keep:
            self._location.replace(name, lines[:keep])

    def _begin(self, step: int) -> None:
        self._segment, self._lines = f"s{step:09d}-a{self._attempt:06d}.jsonl", 0
        self._journals.begin(f"{_FOLDER}/{self._segment}", b"")


def read(location: Location) -> Iterator[dict[str, Any]]:
    """All lines of a run in order."""
    yield from map(parse, _lines(location))


def curve(location: Location, tag: str) -> list[tuple[int, float | None]]:
    """One metric over the steps; None where it was not finite. Lines without it are not parsed, which is faster."""
    quoted = json.dumps(tag).encode()
    candidates = (parse(line) for line in _lines(location) if quoted in line)
    return [(line["step"], line[tag]) for line in candidates if tag in line]


def committed(location: Location, end: Mapping[str, Any], *, after: int) -> Iterator[dict[str, Any]]:
    """The lines of steps above ``after``, up to ``end``, a mark of ``LinesWriter``; none without a mark."""
    last = _key(str(end.get("segment")))
    keyed = ((_key(entry.name), entry.name) for entry in location.list(_FOLDER))
    names = [(key, name) for key, name in keyed if key is not None and last is not None and key <= last]
    for (key, name), following in zip_longest(names, names[1:]):
        if following is None or following[0][0] > after:  # else all its lines are of earlier steps
            lines = _read(location, f"{_FOLDER}/{name}")[: end["lines"] if key == last else None]
            yield from (line for line in map(parse, lines) if line["step"] > after)


def _lines(location: Location) -> Iterator[bytes]:
    for entry in location.list(_FOLDER):
        if _key(entry.name) is not None:
            yield from _read(location, f"{_FOLDER}/{entry.name}")


def _read(location: Location, name: str) -> list[bytes]:
    return (location.read(name, limit=_LIMIT) or b"").splitlines(keepends=True)


def _key(name: str) -> tuple[int, int] | None:
    """Step and attempt of a segment: the order in which segments were begun. None for another file."""
    match = _SEGMENT.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None

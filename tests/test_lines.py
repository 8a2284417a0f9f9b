"""Metric lines follow the lineage: every step once, whatever was discarded on the way."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from runner.errors import StorageError
from runner.metrics import lines
from runner.metrics.lines import TIME, LinesWriter, read
from runner.metrics.writer import WriterContext
from runner.storage import LocalLocation


@pytest.fixture
def location(tmp_path: Path) -> LocalLocation:
    return LocalLocation(tmp_path)


def attempt(location: LocalLocation, number: int, step: int, end: dict[str, Any] | None) -> LinesWriter:
    """Attempt ``number``, resumed after ``step`` from the commit that recorded ``end``."""
    return LinesWriter(WriterContext(location, "e", "e/r", {}, number, step, end))


def add(curves: LinesWriter, *steps: int) -> None:
    for step in steps:
        curves.add(step, {"loss": step / 7})


def flush(curves: LinesWriter, step: int) -> dict[str, Any]:
    end = curves.mark(step)
    curves.flush()
    return end


def steps(location: LocalLocation) -> list[int]:
    return [line["step"] for line in read(location)]


def segments(location: LocalLocation) -> list[str]:
    return [entry.name for entry in location.list("metrics")]


def untimed(location: LocalLocation) -> list[dict[str, Any]]:
    return [{tag: value for tag, value in line.items() if tag != TIME} for line in read(location)]


def test_lines_are_json_in_the_order_they_were_added(location: LocalLocation) -> None:
    curves = attempt(location, 1, 0, None)
    curves.add(10, {"loss": 0.1, "rate": 1e-3})
    curves.add(20, {"accuracy": 1})
    flush(curves, 20)
    assert untimed(location) == [{"step": 10, "loss": 0.1, "rate": 1e-3}, {"step": 20, "accuracy": 1}]
    text = location.read("metrics/s000000000-a000001.jsonl", limit=1000)
    assert text
    assert text.startswith(b'{"step": 10, "loss": 0.1, "rate": 0.001, "time/unix": 1')
    assert text.count(b"\n") == 2


def test_committed_lines_are_those_between_a_step_and_a_mark(location: LocalLocation) -> None:
    curves = attempt(location, 1, 0, None)
    for step in (1, 2, 3):
        curves.add(step, {"loss": 0.1})
    flush(curves, 2)
    end = {"segment": "s000000000-a000001.jsonl", "lines": 2}
    curves = attempt(location, 2, 2, end)
    curves.add(3, {"loss": 0.2})
    flush(curves, 3)
    assert [line["step"] for line in lines.committed(location, end, after=0)] == [1, 2]
    last = {"segment": "s000000002-a000002.jsonl", "lines": 1}
    assert [(line["step"], line["loss"]) for line in lines.committed(location, last, after=1)] == [(2, 0.1), (3, 0.2)]
    assert not [*lines.committed(location, {}, after=0)]


def test_values_that_are_not_finite_are_null(location: LocalLocation) -> None:
    curves = attempt(location, 1, 0, None)
    curves.add(1, {"a": float("nan"), "b": float("-inf"), "c": 0.0})
    flush(curves, 1)
    assert untimed(location) == [{"step": 1, "a": None, "b": None, "c": 0.0}]


def test_nothing_is_written_without_a_flush_of_new_lines(location: LocalLocation) -> None:
    curves = attempt(location, 1, 0, None)
    assert flush(curves, 0)["lines"] == 0
    add(curves, 1)
    assert segments(location) == []
    end = flush(curves, 1)
    location.remove("metrics/s000000000-a000001.jsonl")
    assert flush(curves, 2) == end
    assert segments(location) == []


def test_a_resume_cuts_lines_after_its_commit(location: LocalLocation) -> None:
    first = attempt(location, 1, 0, None)
    add(first, 1, 2)
    end = flush(first, 2)
    add(first, 3, 4)
    flush(first, 4)  # and killed before the commit of step 4 was there
    second = attempt(location, 2, 2, end)
    assert steps(location) == [1, 2]
    add(second, 3, 4)
    flush(second, 4)
    assert steps(location) == [1, 2, 3, 4]
    assert segments(location) == ["s000000000-a000001.jsonl", "s000000002-a000002.jsonl"]


def test_a_resume_from_an_older_commit_cuts_later_segments(location: LocalLocation) -> None:
    first = attempt(location, 1, 0, None)
    add(first, 1, 2)
    older = flush(first, 2)
    add(first, 3)
    second = attempt(location, 2, 3, flush(first, 3))
    add(second, 4)
    third = attempt(location, 3, 4, flush(second, 4))
    add(third, 5)
    flush(third, 5)
    attempt(location, 4, 2, older)
    assert steps(location) == [1, 2]


def test_a_commit_before_the_first_line_keeps_older_lines(location: LocalLocation) -> None:
    first = attempt(location, 1, 0, None)
    add(first, 1, 2)
    second = attempt(location, 2, 2, flush(first, 2))
    end = flush(second, 3)
    add(second, 4)
    flush(second, 4)
    attempt(location, 3, 3, end)
    assert steps(location) == [1, 2]


def test_a_resume_at_the_same_step_replaces_older_lines(location: LocalLocation) -> None:
    first = attempt(location, 1, 0, None)
    add(first, 1)
    end = flush(first, 1)
    for number in (2, 3):
        again = attempt(location, number, 1, end)
        assert steps(location) == [1]
        add(again, 2)
        flush(again, 2)
    assert steps(location) == [1, 2]


def test_a_fresh_start_begins_with_no_lines(location: LocalLocation) -> None:
    first = attempt(location, 1, 0, None)
    add(first, 1)
    flush(first, 1)
    second = attempt(location, 2, 0, None)
    assert steps(location) == []
    add(second, 1)
    flush(second, 1)
    assert steps(location) == [1]


def test_a_full_segment_is_followed_by_another(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a full one is written again, and a resume may continue in any of them."""
    monkeypatch.setattr(lines, "SEGMENT_BYTES", 60)
    first = attempt(location, 1, 0, None)
    ends = {}
    for step in range(1, 10):
        add(first, step)
        ends[step] = flush(first, step)
    assert len(segments(location)) > 2
    assert steps(location) == [*range(1, 10)]
    for number, step in enumerate((8, 5, 4, 1), start=2):
        attempt(location, number, step, ends[step])
        assert steps(location) == [*range(1, step + 1)]


def test_foreign_files_are_left_alone(location: LocalLocation) -> None:
    location.put("metrics/notes.txt", [b"a person's"])
    attempt(location, 1, 0, None)
    assert segments(location) == ["notes.txt"]
    assert steps(location) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_step_and_tag_is_read_once(seed: int, location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random lives that end between any two of: a line, a flush, a commit. Some resume from the commit before the
    newest; lines come every third step, so that commits happen before, at and after them.
    """
    monkeypatch.setattr(lines, "SEGMENT_BYTES", 200)
    chance = random.Random(seed)
    commits: list[tuple[int, dict[str, Any] | None]] = [(0, None)]
    for number in range(1, 12):
        if len(commits) > 2 and chance.random() < 0.3:
            commits.pop()  # damaged
        start, end = commits[-1]
        curves = attempt(location, number, start, end)
        assert steps(location) == [*range(3, start + 1, 3)]
        for step in range(start + 1, start + chance.randint(1, 12)):
            if step % 3 == 0:
                add(curves, step)
            if chance.random() < 0.4:
                end = flush(curves, step)
                if chance.random() < 0.8:
                    commits.append((step, json.loads(json.dumps(end))))


def test_no_segment_is_larger_than_can_be_read(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is committed for long, which is what begins a new one otherwise."""
    monkeypatch.setattr(lines, "MAX_SEGMENT_BYTES", 1000)
    curves = attempt(location, 1, 0, None)
    add(curves, *range(1, 201))
    flush(curves, 200)
    assert steps(location) == [*range(1, 201)]
    assert max(entry.size for entry in location.list("metrics")) < 1100
    attempt(location, 2, 200, curves.mark(200))
    assert steps(location) == [*range(1, 201)]


def test_a_segment_that_was_never_written_is_not_read(location: LocalLocation) -> None:
    flush(attempt(location, 1, 0, None), 0)
    path = location.path / "metrics/s000000000-a000001.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(StorageError, match="more than the 67108864 bytes"):
        steps(location)

"""What was trained on, step by step: written, read again after any death, and compared with what is done again."""

import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runner.data import ledger
from runner.data.ledger import Ledger, LedgerLine, read_recipe, read_segments
from runner.errors import DataError, StorageError
from runner.storage import LocalLocation, open_location
from runner.storage.location import JournalChain

RECIPE = {"samples": 10, "seed": 1}
FIRST = "ledger/s000000000-a000001.txt"


@pytest.fixture
def location(tmp_path: Path) -> LocalLocation:
    return LocalLocation(tmp_path)


def attempt(location: LocalLocation, number: int, step: int, *, grouping: int = 4) -> Ledger:
    """Attempt ``number``, gone on after ``step``."""
    opened = Ledger(location, attempt=number, recipe=RECIPE, grouping=grouping)
    opened.open(step)
    return opened


def line(step: int, *, grouping: int = 4, digest: int | None = None, bad: str = "") -> LedgerLine:
    first = (step - 1) * grouping
    return LedgerLine(step, first, first + grouping - 1, 7 * step if digest is None else digest, bad)


def add(opened: Ledger, *steps: int) -> None:
    for step in steps:
        opened.add(line(step))
    flush(opened, steps[-1])


def flush(opened: Ledger, step: int) -> None:
    opened.mark(step)
    opened.flush()


def spoil(location: LocalLocation, name: str, old: bytes, new: bytes) -> None:
    path = location.path / name
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new))


def test_lines_are_read_as_they_were_written(location: LocalLocation) -> None:
    lines = (LedgerLine(1, 0, 3, 0), LedgerLine(2, 4, 7, 2**64 - 1), LedgerLine(3, 8, 11, 5, " 8:3>4 9:0>7"))
    opened = attempt(location, 1, 0)
    for one in lines:
        opened.add(one)
    flush(opened, 3)
    (segment,) = read_segments(location)
    assert (segment.step, segment.attempt, segment.grouping, segment.lines) == (0, 1, 4, lines)
    assert read_recipe(location, segment.plan_digest) == RECIPE


def test_a_line_is_text_for_people(location: LocalLocation) -> None:
    opened = attempt(location, 1, 0)
    opened.add(LedgerLine(2, 4, 7, 255, " 5:9>1"))
    text = (location.read(FIRST, limit=1000) or b"").decode()  # there without a flush
    assert text.splitlines()[1:] == ["2 4 7 00000000000000ff 5:9>1"]


def test_segments_come_in_the_order_in_which_they_were_begun(location: LocalLocation) -> None:
    add(attempt(location, 1, 0), 1, 2, 3)
    add(attempt(location, 2, 2), 3)
    add(attempt(location, 3, 1), 2)
    assert [(one.attempt, one.step) for one in read_segments(location)] == [(1, 0), (2, 2), (3, 1)]


@pytest.mark.parametrize("torn", [b"2", b"2 4 7 000000000000000e", b"\0\0\0", b"\xff\xfe"])
def test_a_line_that_a_kill_tore_is_left_out(location: LocalLocation, torn: bytes) -> None:
    add(attempt(location, 1, 0), 1)
    with open(location.path / FIRST, "ab") as file:
        file.write(torn)
    assert read_segments(location)[0].lines == (line(1),)


@pytest.mark.parametrize("text", [b"", b'{"plan": "01'])
def test_a_segment_whose_first_line_is_torn_is_none(location: LocalLocation, text: bytes) -> None:
    attempt(location, 1, 0)
    (location.path / FIRST).write_bytes(text)
    assert read_segments(location) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"1 0 3", b"1 0 x"),
        (b"1 0 3", b""),
        (b"0000000000000007", b"7"),
        (b"\n1 0 3", b"\n\n1 0 3"),
        (b"1 0 3", b"1 0 -3"),
        (b"0007\n", b"0007 and more\n"),
        (b"}\n", b"\n"),
        (b'"plan"', b'"plane"'),
        (b'"grouping": 4', b'"grouping": null'),
        (b'"grouping": 4', b'"grouping": "four"'),
    ],
)
def test_a_damaged_segment_is_reported_by_name(location: LocalLocation, old: bytes, new: bytes) -> None:
    """And what stands before the damage is still used; a power cut may leave anything at the end of a file."""
    add(attempt(location, 1, 0), 1, 2)
    spoil(location, FIRST, old, new)
    (found,) = read_segments(location)
    assert f"{location.url}/{FIRST} is damaged after step 0: " in found.damage
    assert found.lines == ()
    attempt(location, 2, 0)


@pytest.mark.parametrize(
    "header", [b"[]", b"null", b"1", b'"text"', b"[" * 100_000], ids=lambda text: text[:6].decode()
)
def test_a_header_of_another_kind_is_reported_by_name(location: LocalLocation, header: bytes) -> None:
    attempt(location, 1, 0)
    (location.path / FIRST).write_bytes(header + b"\n")
    (found,) = read_segments(location)
    assert "is damaged after step 0" in found.damage
    attempt(location, 2, 0)


def test_zeros_after_a_power_cut_leave_the_lines_before_them(location: LocalLocation) -> None:
    add(attempt(location, 1, 0), 1, 2, 3)
    with (location.path / FIRST).open("ab") as file:
        file.write(bytes(200) + b"\n")
    (found,) = read_segments(location)
    assert [line.step for line in found.lines] == [1, 2, 3]
    assert "is damaged after step 3" in found.damage


def test_a_damaged_plan_is_mended_by_the_next_attempt(location: LocalLocation) -> None:
    attempt(location, 1, 0)
    plan = read_segments(location)[0].plan_digest
    (location.path / f"ledger/plan-{plan}.json").write_bytes(b"torn")
    attempt(location, 2, 0)
    assert read_recipe(location, plan) == RECIPE


@pytest.mark.parametrize(
    "text", [None, b"", b"{}", b"[]", b'{"samples": 10, "seed": 2}', b'{"samples": 10, "se', b"\xff"]
)
def test_a_damaged_plan_is_reported_by_name(location: LocalLocation, text: bytes | None) -> None:
    attempt(location, 1, 0)
    plan = read_segments(location)[0].plan_digest
    path = location.path / f"ledger/plan-{plan}.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(StorageError, match=rf"ledger/plan-{plan}\.json is missing or damaged"):
        read_recipe(location, plan)


def test_attempts_with_one_plan_share_its_file(location: LocalLocation) -> None:
    for number in (1, 2):
        attempt(location, number, 0)
    assert len([entry for entry in location.list("ledger") if entry.name.startswith("plan-")]) == 1


def test_steps_repeated_with_the_same_samples_are_silent(location: LocalLocation) -> None:
    add(attempt(location, 1, 0), 1, 2, 3)
    add(attempt(location, 2, 1), 2, 3, 4)
    assert [one.lines[-1].step for one in read_segments(location)] == [3, 4]


@pytest.mark.parametrize("now", [line(3, digest=5), line(3, grouping=5), line(3, bad=" 8:3>4")], ids=str)
def test_steps_repeated_with_other_samples_are_refused(location: LocalLocation, now: LedgerLine) -> None:
    add(attempt(location, 1, 0), 1, 2)
    add(attempt(location, 2, 2), 3, 4)
    again = attempt(location, 3, 2)
    with pytest.raises(DataError, match=r"step 3 is done again and has other samples than in attempt 2") as refused:
        again.add(now)
    assert f"then  {line(3)}\n" in str(refused.value)
    assert f"now   {now} " in str(refused.value)
    assert read_segments(location)[-1].lines == ()  # and is not written


def test_other_rollouts_of_the_same_samples_are_refused(location: LocalLocation) -> None:
    add(attempt(location, 1, 0), 1, 2)
    again, other = attempt(location, 2, 1), replace(line(2), rollouts=" rollouts=00000000000000ff trained=x1 dropped=")
    with pytest.raises(DataError, match=r"step 2 is done again and has other rollouts than in attempt 1") as refused:
        again.add(other)
    assert refused.value.kind == "rollouts-changed"
    assert "Give it state_dict" in str(refused.value)


def test_rollouts_of_the_version_before_are_the_same(location: LocalLocation) -> None:
    rollouts = " rollouts=00000000000000ff trained=0-3x2 dropped="
    add(attempt(location, 1, 0), 1)
    path = next((location.path / "ledger").glob("s*.txt"))
    path.write_text(f"{path.read_text()}{line(2)}{rollouts.replace('rollouts', 'made')}\n")
    assert [each.rollouts for each in read_segments(location)[0].lines] == ["", rollouts]
    attempt(location, 2, 1).add(replace(line(2), rollouts=rollouts))  # not refused


def test_other_samples_can_be_accepted_and_both_lines_stay(
    location: LocalLocation, caplog: pytest.LogCaptureFixture
) -> None:
    add(attempt(location, 1, 0), 1, 2, 3)
    again = Ledger(location, attempt=2, recipe=RECIPE, grouping=4, accept=True)
    again.open(1)
    again.add(line(2))
    assert not caplog.text
    again.add(line(3, bad=" 8:3>4"))
    again.mark(3)
    assert "step 3 is done again and has other samples" in caplog.text
    assert [one.lines[-1] for one in read_segments(location)] == [line(3), line(3, bad=" 8:3>4")]
    add(attempt(location, 3, 3), 4)


def test_substitutes_are_those_of_the_last_time(location: LocalLocation) -> None:
    opened = attempt(location, 1, 0)
    for one in (line(1, bad=" 0:7>5 3:2>1"), line(2, bad=" 5:1>2"), line(3, bad=" 9:1>0")):
        opened.add(one)
    opened.mark(3)
    again = Ledger(location, attempt=2, recipe=RECIPE, grouping=4, accept=True)
    again.open(1)
    for one in (line(2), line(3, bad=" 9:1>4 10:1>2")):
        again.add(one)
    again.mark(3)
    other = Ledger(location, attempt=3, recipe={"samples": 11}, grouping=4, accept=True)
    other.open(2)
    other.add(line(3, bad=" 8:1>8"))
    other.mark(3)
    assert ledger.substitutions(location, RECIPE) == {0: 5, 3: 1, 9: 4, 10: 2}


def test_steps_repeated_in_other_groups_are_not_compared(location: LocalLocation) -> None:
    add(attempt(location, 1, 0), 1, 2)
    opened = attempt(location, 2, 0, grouping=2)
    opened.add(line(1, grouping=2, digest=3))


def test_the_newest_attempt_is_the_one_compared_with(location: LocalLocation) -> None:
    """The one before it has been judged already."""
    add(attempt(location, 1, 0), 1, 2)
    spoil(location, FIRST, b"2 4 7 000000000000000e", b"2 4 7 00000000000000ff")
    with pytest.raises(DataError, match="attempt 1"):
        add(attempt(location, 2, 1), 2)
    spoil(location, FIRST, b"2 4 7 00000000000000ff", b"2 4 7 000000000000000e")
    add(attempt(location, 3, 1), 2)
    with pytest.raises(DataError, match="attempt 3"):
        attempt(location, 4, 1).add(line(2, digest=1))


def test_full_segments_are_followed_by_others(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a resume anywhere among them finds what it must compare with."""
    monkeypatch.setattr(ledger, "SEGMENT_BYTES", 100)
    opened = attempt(location, 1, 0)
    for step in range(1, 21):
        add(opened, step)
    found = read_segments(location)
    assert len(found) > 3
    assert [one.step for one in found] == [0, *(one.lines[-1].step for one in found[:-1])]
    assert [each for one in found for each in one.lines] == [line(step) for step in range(1, 21)]
    for number, step in enumerate((19, 10, found[1].step, 1), start=2):
        again = attempt(location, number, step)
        again.add(line(step + 1))
        if step < 19:
            with pytest.raises(DataError, match=rf"step {step + 2} .* attempt 1:"):
                again.add(line(step + 2, digest=0))


def test_segments_that_end_before_a_step_are_not_read(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SEGMENT_BYTES", 100)
    opened = attempt(location, 1, 0)
    for step in range(1, 21):
        add(opened, step)
    second = read_segments(location)[1].step
    (location.path / FIRST).write_bytes(b"damaged\n")
    assert read_segments(location, after=second)[0].step == second
    assert FIRST in read_segments(location, after=second - 1)[0].damage


def test_foreign_files_are_left_alone(location: LocalLocation) -> None:
    location.put("ledger/notes.txt", [b"a person's"])
    location.put("ledger/s1-a1.txt", [b"a person's"])
    assert read_segments(location) == []


def lived(location: LocalLocation, code: str) -> subprocess.CompletedProcess[str]:
    """A process that opens the ledger and continues with ``code``."""
    start = f"""
import os, resource, signal
from runner.data import ledger
from runner.data.ledger import Ledger, LedgerLine
from runner.errors import StorageError
from runner.storage import LocalLocation
opened = Ledger(LocalLocation({location.url!r}), attempt=1, recipe={RECIPE!r}, grouping=4)
opened.open(0)
"""
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    return done


def test_lines_outlive_a_killed_process(location: LocalLocation) -> None:
    code = """
for step in range(1, 501):
    opened.add(LedgerLine(step, 4 * step - 4, 4 * step - 1, 7 * step))
    if step == 400:
        opened.mark(step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert lived(location, code).returncode == -signal.SIGKILL
    assert read_segments(location)[0].lines == tuple(line(step) for step in range(1, 501))


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="files of this system have no largest size")
def test_a_full_disk_fails_the_flush_and_loses_no_line(location: LocalLocation) -> None:
    """A limit on the size of files stands for the disk; the write that reaches it is cut short within a line."""
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(1, 101):
    opened.add(LedgerLine(step, 4 * step - 4, 4 * step - 1, 7 * step))
opened.mark(100)
try:
    opened.flush()
except StorageError as error:
    print(error)
print(os.path.getsize(opened._location.path / "ledger/s000000000-a000001.txt"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
opened.add(LedgerLine(101, 400, 403, 707))
opened.mark(101)
"""
    told, size = lived(location, code).stdout.splitlines()
    assert told == f"cannot write {location.url}/{FIRST}: File too large (see ulimit -f)"
    assert size == "1000"
    assert read_segments(location)[0].lines == tuple(line(step) for step in range(1, 102))


def test_the_recipe_is_plain_json(location: LocalLocation) -> None:
    attempt(location, 1, 0)
    name = next(entry.name for entry in location.list("ledger") if entry.name.startswith("plan-"))
    assert json.loads(location.read(f"ledger/{name}", limit=1000) or b"") == RECIPE


def test_positions_that_other_groups_moved_are_not_compared(location: LocalLocation) -> None:
    """Attempt 1 did step 3 elsewhere than attempt 3, which began where the smaller batches of attempt 2 had led."""
    add(attempt(location, 1, 0), 1, 2, 3)
    attempt(location, 2, 1, grouping=2).add(LedgerLine(2, 4, 5, 3))
    attempt(location, 3, 2).add(LedgerLine(3, 6, 9, 5))


def test_a_flush_reaches_every_journal() -> None:
    location = open_location("memory://journals/run")
    journals = JournalChain(location.journal)
    for name, head, rest in (("a", b"1", b"2"), ("b", b"3", b"45")):
        journals.begin(name, head)
        journals.append(rest)
    journals.flush()
    assert [location.read(name, limit=10) for name in "ab"] == [b"12", b"345"]
    assert journals.size == len(b"45")
    journals.append(b"6")
    journals.flush()
    assert location.read("b", limit=10) == b"3456"
    journals.close()


class Reading(LocalLocation):
    """Counts the segments that are read."""

    segments = 0

    def read(self, name: str, *, limit: int) -> bytes | None:
        self.segments += name.endswith(".txt")
        return super().read(name, limit=limit)


@pytest.mark.parametrize("on", [5, 0], ids=["each gets on", "each dies at the same step"])
def test_an_attempt_reads_few_segments_of_those_before_it(on: int, location: LocalLocation) -> None:
    """However many there were: those that end before it begins, and those that others did again, say nothing new."""
    for number in range(1, 41):
        begin = on * (number - 1)
        add(attempt(location, number, begin), *range(begin + 1, begin + 7))
    counting = Reading(location.path)
    opened = attempt(counting, 41, 40 * on)
    assert counting.segments <= 3
    assert len(read_segments(location)) == 41
    if on == 5:
        begin = 40 * on + 1
        with pytest.raises(DataError, match="in attempt 40"):
            opened.add(line(begin, digest=1))


def test_an_early_attempt_that_got_furthest_is_compared(location: LocalLocation) -> None:
    add(attempt(location, 1, 0), *range(1, 31))
    for number in (2, 3, 4):
        add(attempt(location, number, 5 * (number - 1)), *range(5 * (number - 1) + 1, 5 * number))
    opened = attempt(location, 5, 20)
    opened.add(line(21))
    with pytest.raises(DataError, match="in attempt 1"):
        opened.add(line(25, digest=1))


def test_no_segment_is_larger_than_can_be_read(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is committed for long, which is what begins a new one otherwise."""
    monkeypatch.setattr(ledger, "SEGMENT_BYTES", 900)
    monkeypatch.setattr(ledger, "MAX_SEGMENT_BYTES", 1000)
    book = Ledger(location, attempt=1, recipe=RECIPE, grouping=10**6)
    book.open(0)
    for step in range(1, 201):
        book.add(line(step))
    book.flush()
    book.close()
    assert [one.step for segment in read_segments(location) for one in segment.lines] == [*range(1, 201)]
    assert max(entry.size for entry in location.list("ledger")) < 1100

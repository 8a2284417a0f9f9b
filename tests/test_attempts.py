"""Who owns a run: claims without exclusive creation, liveness, takeover."""

import contextlib
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from marks import slow
from results import results
from waiting import Clock, until

from runner.config.schema import OnConflict, OnDrift
from runner.errors import DriftRefused, RunInUse, RunnerError, StorageError, Superseded
from runner.run import attempts
from runner.run.attempts import Attempt, ClaimName, claim
from runner.run.directory import RunDirectory
from runner.run.opening import RunSpec, claim_run, must_wait, open_run
from runner.storage import open_location
from runner.storage.local import LocalLocation
from runner.storage.location import Buffer, Entry
from runner.storage.remote import RemoteLocation

ROOT = Path(__file__).parent.parent
COMMAND = ("experiment=smoke", "trainer.max_steps=30", "checkpoint.every_steps=10", "runtime.num_threads=1")


class Memory:
    """A location that promises no more than it must. ``turn`` is called before every verb that others may notice."""

    part_bytes, parallel_puts, beat_seconds, url, lock_domain = 1, 1, 0.01, "memory", ""

    def __init__(self, turn: Callable[[], None] = lambda: None) -> None:
        self.turn = turn
        self.objects: dict[str, bytes] = {}
        self.held: set[str] = set()

    def put(self, name: str, chunks: Iterable[Buffer]) -> int:
        self.turn()
        self.objects[name] = b"".join(chunks)
        return len(self.objects[name])

    def replace(self, name: str, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
        self.objects[name] = b"".join(chunks)

    def read(self, name: str, *, limit: int) -> bytes | None:
        return self.objects.get(name)

    def list(self, folder: str) -> list[Entry]:
        self.turn()
        whole = sorted(self.objects.items())
        return [Entry(name[len(folder) + 1 :], len(data)) for name, data in whole if name.startswith(f"{folder}/")]

    def remove(self, name: str) -> None:
        if name.endswith(".json"):
            self.turn()
        self.objects.pop(name, None)

    def lock(self, name: str) -> Any:
        if self.is_locked(name):
            return None
        self.held.add(name)
        return _Release(self.held, name)

    def is_locked(self, name: str) -> bool:
        return name in self.held


class _Release:
    def __init__(self, held: set[str], name: str) -> None:
        self.held, self.name = held, name

    def release(self) -> None:
        self.held.discard(self.name)


class Stage:
    """Claimers that take turns at the storage: ``script`` says who goes on, verb by verb; then each to its end."""

    def __init__(self, script: Iterable[int], *, steal: tuple[bool, ...]) -> None:
        self.script = iter(script)
        self.location = Memory(self._wait)
        self.turns = [threading.Semaphore(0) for _ in steal]
        self.arrived = threading.Semaphore(0)
        self.outcomes: list[Any] = [None] * len(steal)
        self.mine = threading.local()
        self.threads = [threading.Thread(target=self._claim, args=case, daemon=True) for case in enumerate(steal)]

    def play(self) -> list[Any]:
        """Everyone's outcome: an Attempt or a RunInUse."""
        for thread in self.threads:
            thread.start()
            assert self.arrived.acquire(timeout=120)
        for who in self.script:
            self._go(who)
        for who in range(len(self.threads)):
            while self.outcomes[who] is None:
                self._go(who)
        return self.outcomes

    def _go(self, who: int) -> None:
        if self.outcomes[who] is None:
            self.turns[who].release()
            assert self.arrived.acquire(timeout=120)

    def _wait(self) -> None:
        self.arrived.release()
        assert self.turns[self.mine.me].acquire(timeout=120)

    def _claim(self, me: int, steal: bool) -> None:
        self.mine.me = me
        try:
            self.outcomes[me] = claim(self.location, {}, steal=steal)
        except BaseException as error:
            self.outcomes[me] = error
        self.arrived.release()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hearts, and no time passes between tries."""
    monkeypatch.setattr(Attempt, "keep_beating", lambda self: None)
    monkeypatch.setattr(attempts.time, "sleep", lambda seconds: None)


def check(outcomes: list[Any], location: Memory) -> None:
    """One owns the run, the others left; nothing but its claim stands."""
    (owner,) = (outcome for outcome in outcomes if isinstance(outcome, Attempt))
    assert all(isinstance(outcome, Attempt | RunInUse) for outcome in outcomes), outcomes
    location.turn = lambda: None
    assert attempts.names(location) == [owner.name]


@pytest.mark.usefixtures("still")
def test_of_two_claimers_only_one_wins_in_any_order() -> None:
    """All orders of the first five verbs of each: list, put, list, remove, list."""
    for first in itertools.combinations(range(10), 5):
        stage = Stage([0 if turn in first else 1 for turn in range(10)], steal=(False, False))
        check(stage.play(), stage.location)


@pytest.mark.usefixtures("still")
def test_of_three_claimers_only_one_wins() -> None:
    chance = random.Random(7)
    for _ in range(400):
        stage = Stage([chance.randrange(3) for _ in range(chance.randrange(30))], steal=(False,) * 3)
        check(stage.play(), stage.location)


@pytest.mark.usefixtures("still")
def test_thieves_at_once_get_numbers_of_their_own() -> None:
    """All may own the run in turn: the highest number is the one that counts, and no two are equal."""
    for first in itertools.combinations(range(8), 4):
        stage = Stage([0 if turn in first else 1 for turn in range(8)], steal=(True, True))
        outcomes = stage.play()
        assert len({outcome.number for outcome in outcomes}) == 2


@pytest.mark.usefixtures("still")
def test_claims_that_change_between_listings_are_listed_again() -> None:
    """Also a claim with a lower number, and one that was counted on and is gone."""
    for change in ("came", "went"):
        location = Memory()
        if change == "went":
            location.objects[f"{ClaimName(4, 'b' * 12)}.json"] = b"{}"
        seen = []

        def turn(location: Memory = location, seen: list[int] = seen, change: str = change) -> None:
            seen.append(len(location.objects))
            if len(seen) == 2 and change == "came":  # before the put
                location.objects[f"{ClaimName(1, 'a' * 12)}.json"] = b"{}"
            if len(seen) == 2 and change == "went":
                del location.objects[f"{ClaimName(4, 'b' * 12)}.json"]

        location.turn = turn
        owner = claim(location, {}, steal=True)
        assert owner.number == (2 if change == "came" else 1)


@pytest.fixture
def location(tmp_path: Path) -> LocalLocation:
    found = LocalLocation(tmp_path / "run")
    found.beat_seconds = 0.1
    return found


STARTER = """
import sys
from runner.errors import RunInUse
from runner.run import attempts
from runner.storage.local import LocalLocation
print("ready", flush=True)
sys.stdin.readline()
try:
    attempt = attempts.claim(LocalLocation(sys.argv[1]), {})
except RunInUse as error:
    print("in use", flush=True)
else:
    print("owner", attempt.number, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def starters(location: LocalLocation, count: int) -> Iterator[list["subprocess.Popen[str]"]]:
    command = [sys.executable, "-c", STARTER, location.url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(count)]
        try:
            for process in started:
                assert process.stdout.readline() == "ready\n"
            yield started
        finally:
            for process in started:
                process.kill()


@pytest.mark.parametrize("count", [2, slow(16)])
def test_of_processes_started_at_once_only_one_owns_the_run(count: int, location: LocalLocation) -> None:
    """Again and again, each time after a kill of the owner, without any waiting."""
    for lifetime in range(3):
        with starters(location, count) as started:
            for process in started:
                process.stdin.write("go\n")
                process.stdin.flush()
            said = [process.stdout.readline().split() for process in started]
            assert sorted(word[0] for word in said) == ["in"] * (count - 1) + ["owner"]
        assert len(attempts.history(location)) == lifetime + 1


def test_a_claim_of_a_dead_local_process_is_dead_at_once(
    location: LocalLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with starters(location, 1) as (process,):
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "owner 1\n"
        with pytest.raises(RunInUse, match=rf"is in use by attempt 1 \(pid {process.pid} on "):
            attempts.raise_if_live(location)
        assert attempts.newest(location).outcome() == "running"
    monkeypatch.setattr(attempts, "time", Clock(seconds=0))
    attempts.raise_if_live(location)
    assert attempts.newest(location).outcome() == "killed"


def stranger(location: LocalLocation, number: int = 1, *, machine: str = "far", beat: float = 0.1) -> ClaimName:
    """A claim by another machine."""
    name = ClaimName(number, "0123456789ab")
    claimed = {"host": "far", "machine": machine, "pid": 7, "beat": beat, "started": "then"}
    location.put(f"{name}.json", [json.dumps(claimed).encode()])
    return name


def beating(location: LocalLocation, name: ClaimName) -> Clock:
    """A clock by which an attempt beats in each pause of whoever watches it."""
    numbers = itertools.count()
    return Clock(lambda: location.replace(f"{name}.beat", [json.dumps({"sequence": next(numbers)}).encode()]))


def test_another_machine_lives_while_its_beat_changes(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "time", beating(location, stranger(location)))
    with pytest.raises(RunInUse, match=r"attempt 1 \(pid 7 on far\)"):
        claim(location, {})
    assert attempts.newest(location).outcome() == "unknown (another host)"
    stolen = claim(location, {}, steal=True)
    assert stolen.number == 2
    stolen.end("finished")


def test_another_machine_is_dead_after_three_silent_beats(
    location: LocalLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, clock = stranger(location), Clock()
    location.replace(f"{name}.beat", [b'{"sequence": 7}'])
    monkeypatch.setattr(attempts, "time", clock)
    assert attempts.newest(location).outcome() == "unknown (another host)"
    assert clock.paused == 0, "only a starter waits"
    began = clock.monotonic()
    attempt = claim(location, {})
    assert clock.monotonic() - began > 0.3
    assert clock.paused < 3
    assert attempt.number == 2
    attempt.end("finished")


def test_another_machine_that_withdraws_is_not_waited_for(
    location: LocalLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stranger(location, beat=60)
    clock = Clock(lambda: location.replace(f"{name}.end.json", [b"{}"]), seconds=5)
    monkeypatch.setattr(attempts, "time", clock)
    attempts.raise_if_live(location)
    other = stranger(location, 2, beat=60)
    clock.pause = lambda: location.remove(f"{other}.json")
    attempts.raise_if_live(location)


def test_waiting_is_for_the_living(location: LocalLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(str(location.path), "a", "b", location)
    name = stranger(location)
    monkeypatch.setattr(attempts, "time", beating(location, name))
    assert must_wait(directory, OnConflict.wait)
    assert not must_wait(directory, OnConflict.steal)
    location.replace(f"{name}.end.json", [b"{}"])
    assert not must_wait(directory, OnConflict.wait)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"machine": "fa',
        b"[]",
        b"[" * 100_000,
        b'{"beat": 1e999}',
        b'{"beat": NaN}',
        b'{"beat": "soon", "host": [], "machine": {}}',
        b'{"beat": -5, "pid": "\\u001b[31m"}',
        b'{"beat": 1' + b"0" * 400 + b"}",
    ],
    ids=range(9),
)
def test_a_claim_that_says_nonsense_still_counts(
    text: bytes, location: LocalLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ClaimName(41, "0123456789ab")
    location.put(f"{name}.json", [text])
    (record,) = attempts.history(location)
    assert record.outcome() == "unknown (another host)"
    assert "\x1b" not in record.owner()
    clock = Clock()
    monkeypatch.setattr(attempts, "time", clock)
    attempts.raise_if_live(location)
    assert clock.paused > 0
    attempt = claim(location, {}, steal=True)
    assert attempt.number == 42
    attempt.end("finished")


def test_names_that_are_no_claims_do_not_count(location: LocalLocation) -> None:
    for name in ("000007.json", "000008-xyz.json", "000009-0123456789ab.end.json", "9" * 30 + "-0123456789ab.json"):
        location.put(f"attempts/{name}", [b"{}"])
    assert attempts.names(location) == []


def test_beats_tell_where_an_attempt_is_without_being_asked(location: LocalLocation) -> None:
    attempt = claim(location, {"overrides": ["a=1"]})
    attempt.beat(committed=3)
    assert attempts.newest(location).beat["committed"] == 3
    attempt.note(step=5)
    first = attempts.newest(location).beat["sequence"]
    until(lambda: attempts.newest(location).beat.get("step") == 5)
    assert attempts.newest(location).beat["sequence"] > first
    attempt.end("finished", reason="")
    record = attempts.newest(location)
    assert (record.end["outcome"], record.end["step"], record.end["committed"]) == ("finished", 5, 3)
    assert record.claim["overrides"] == ["a=1"]
    time.sleep(0.3)
    assert attempts.newest(location).beat == record.beat, "the heart stands still"


def test_a_storage_that_refuses_or_hangs_does_not_stop_a_beat(
    location: LocalLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = claim(location, {})

    def refuse(*_: Any, **__: Any) -> None:
        refused.append(1)
        raise StorageError("no")

    refused = []
    for verb in ("replace", "list"):
        monkeypatch.setattr(location, verb, refuse)
    attempt.beat(step=1)
    until(lambda: len(refused) > 3)
    monkeypatch.undo()
    attempt.beat(step=2)
    assert attempts.newest(location).beat["step"] == 2
    free = threading.Event()
    asked = threading.Event()
    monkeypatch.setattr(location, "replace", lambda *_, **__: asked.set() or free.wait(240))
    assert asked.wait(60)
    attempt.beat(step=3)  # would else hang
    free.set()
    monkeypatch.undo()
    attempt.end("finished")


def test_an_owner_learns_of_its_successor_between_commits(location: LocalLocation) -> None:
    attempt = claim(location, {})
    attempt.raise_if_superseded()
    stranger(location, 2)

    def superseded() -> bool:
        try:
            attempt.raise_if_superseded()
        except Superseded:
            return True
        return False

    until(superseded)
    with pytest.raises(Superseded, match=r"attempt 2 \(pid 7 on far\) took over"):
        attempt.raise_if_superseded()
    with pytest.raises(Superseded, match="attempt 2"):
        attempt.require_newest()
    attempt.end("superseded")


def test_a_higher_claim_that_is_withdrawn_supersedes_nobody(
    location: LocalLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = claim(location, {})
    clock = Clock(lambda: location.remove(f"{ClaimName(2, '0123456789ab')}.json"))
    monkeypatch.setattr(attempts, "time", clock)
    stranger(location, 2)
    attempt.require_newest()
    assert clock.paused > 0, "it looks twice"
    attempt.end("finished")


def test_an_owner_notices_that_its_directory_was_moved(location: LocalLocation) -> None:
    attempt = claim(location, {})
    location.path.rename(location.path.with_name("elsewhere"))
    with pytest.raises(StorageError, match="was moved or removed: attempt 1, this process, is not in it"):
        attempt.require_newest()
    shutil.rmtree(location.path, ignore_errors=True)  # it may have written a heartbeat
    location.path.with_name("elsewhere").rename(location.path)
    attempt.require_newest()
    attempt.end("finished")


def opening(location: LocalLocation, identity: dict[str, Any], on_drift: str = "refuse") -> RunSpec:
    spec = RunSpec(
        RunDirectory(str(location.path), "a", "b", location), identity, command="again", on_drift=OnDrift[on_drift]
    )
    return open_run(spec)


def test_a_kill_between_claim_and_record_is_gone_on_from(location: LocalLocation) -> None:
    stranger(location, machine=attempts.machine(location))
    found = opening(location, {"seed": 1})
    attempt = claim_run(found, {}, above=0, parent=None)
    assert attempt.number == 2
    assert found.directory.identity() == {"seed": 1}
    (location.path / "config.yaml").unlink()
    attempt.end("failed")
    found = opening(location, {"seed": 1})
    claim_run(found, {}, above=0, parent=None)
    assert found.directory.configuration() == {"seed": 1}


def test_a_number_that_committed_is_never_given_again(location: LocalLocation) -> None:
    stranger(location, 3, machine=attempts.machine(location))
    attempt = claim(location, {}, above=7)
    assert attempt.number == 8
    attempt.end("finished")
    stranger(location, attempts.HIGHEST, machine=attempts.machine(location))
    with pytest.raises(StorageError, match=r"no attempt can follow number 9{15},"):
        claim(location, {})


def test_a_process_with_another_lock_folder_is_not_judged_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of one machine with a private /tmp each: a lock that is not seen does not mean that its holder is dead."""
    location = open_location("memory://locks/run")
    monkeypatch.setattr(RemoteLocation, "beat_seconds", 0.1)
    attempt = claim(location, {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunInUse):
        claim(location, {})
    attempt.end("finished")
    claim(location, {}).end("finished")


def test_two_commands_of_one_name_do_not_mix(location: LocalLocation) -> None:
    """Both found no run; the slower one is refused, and leaves no trace."""
    ours, theirs = opening(location, {"seed": 1}), opening(location, {"seed": 2})
    claim_run(theirs, {}, above=0, parent=None).end("failed")
    kept = {path: path.read_bytes() for path in location.path.rglob("*") if path.is_file()}
    with pytest.raises(DriftRefused, match=r"seed +2 +1"):
        claim_run(ours, {}, above=0, parent=None)
    assert {path: path.read_bytes() for path in location.path.rglob("*") if path.is_file()} == kept


def test_a_change_made_by_another_command_is_refused(location: LocalLocation) -> None:
    first = opening(location, {"seed": 1})
    claim_run(first, {}, above=0, parent=None).end("failed")
    late, accepting = opening(location, {"seed": 1}), opening(location, {"seed": 3}, "accept")
    claim_run(accepting, {}, above=0, parent=None).end("failed")  # a change that it accepts is no reason to refuse
    with pytest.raises(DriftRefused, match=r"seed +3 +1"):
        claim_run(late, {}, above=0, parent=None)
    assert late.directory.identity() == {"seed": 3}


def test_a_claim_that_cannot_be_written_leaves_nothing(
    location: LocalLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr(location, "put", refuse)
        with pytest.raises(RunnerError, match="full"):
            claim(location, {})
    assert location.list("attempts") == []
    claim(location, {}).end("finished")


def test_an_owner_paused_past_its_beats_is_superseded(life: Lives, tmp_path: Path) -> None:
    """Another machine takes it for dead; when it goes on it stops, and state and result are those of one process."""
    command = (*COMMAND, "trainer.max_steps=40", f"run.root={tmp_path}")
    with life.start(*command, "run.name=r", machine="one", step=15, send=signal.SIGSTOP) as first:
        until(first.is_stopped)
        with life.start(*command, "run.name=r", machine="two") as second:
            until(lambda: [*tmp_path.glob("smoke/r/commits/a000002-*")])
            first.send(signal.SIGCONT)
            assert first.wait().status == 4, first.output
            assert second.wait().status == 0, second.output
    assert "attempt 2 (pid" in first.output
    assert "took over" in first.output
    assert "attempt  2, resumed from step 10" in second.output
    assert life(*command, "run.name=whole").status == 0
    differing = results(tmp_path / "smoke/r").differences(results(tmp_path / "smoke/whole"))
    assert set(differing) <= {"lines"}  # the first one may have written lines of its own after the takeover


def test_a_stolen_run_stops_though_no_checkpoint_is_due(life: Lives, tmp_path: Path) -> None:
    command = ("experiment=smoke", "trainer.max_steps=1000000", "checkpoint.every_steps=null", "objective.metric=null")
    command = (*command, f"run.root={tmp_path}", "run.name=r")
    with life.start(*command) as first:
        until(lambda: [*tmp_path.glob("smoke/r/attempts/*.beat")])
        with life.start(*command, "run.on_conflict=steal"):
            assert first.wait().status == 4, first.output
            assert not list(tmp_path.glob("smoke/r/commits/*"))


@pytest.mark.parametrize("number", [10, 1000])
def test_a_heartbeat_costs_the_same_after_many_attempts(number: int, tmp_path: Path) -> None:
    class Counting(LocalLocation):
        listed = beats = 0

        def list(self, folder: str) -> list[Entry]:
            found = super().list(folder)
            self.listed += len(found)
            return found

        def replace(self, name: str, chunks: Iterable[Buffer], *, durable: bool = True) -> None:
            self.beats += 1
            super().replace(name, chunks, durable=durable)

    location = Counting(tmp_path)
    location.beat_seconds = 0.001
    (tmp_path / "attempts").mkdir()
    for old in range(1, number + 1):
        (tmp_path / f"attempts/{old:06d}-aaaaaaaaaaaa.json").touch()
    heart = Attempt(location, ClaimName(number, "aaaaaaaaaaaa"), location.lock("lock"))
    deadline = time.monotonic() + 60
    while location.beats < 200 and time.monotonic() < deadline:
        time.sleep(0.01)
    heart.stop_beating()
    assert location.beats >= 200
    assert location.listed / location.beats < 40


def test_a_hundred_thousand_claims_are_looked_at_once() -> None:
    location = Memory()
    found = [ClaimName(number, f"{number:012x}") for number in range(100_000)]
    location.objects[f"{found[-1]}.json"] = b"{}"
    location.objects |= {f"{found[-1]}.end.json": b'{"outcome": "failed"}'}
    dead: set[ClaimName] = set()
    assert attempts.live(location, found, dead=dead) is None
    assert dead == {found[-1]}


def test_claims_of_one_number_are_bounded() -> None:
    location = Memory()
    location.objects = {f"attempts/000007-{nonce:012x}.json": b"{}" for nonce in range(2000)}
    with pytest.raises(StorageError, match="2000 claims of attempt 7, which no run makes"):
        attempts.newest(location)


@pytest.mark.parametrize("beat", [60, 1e300, 10**200, float("inf")])
def test_a_claim_cannot_make_others_wait_for_long(beat: float) -> None:
    location = Memory()
    location.objects = {"attempts/000001-0123456789ab.json": json.dumps({"beat": beat, "machine": "other"}).encode()}
    record = attempts.newest(location)
    assert record
    assert record.silence_limit <= 4 * RemoteLocation.beat_seconds


def test_claims_of_one_number_are_watched_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    location = Memory()
    about = json.dumps({"beat": 0.1, "machine": "other"}).encode()
    location.objects = {f"attempts/000007-{nonce:012x}.json": about for nonce in range(100)}
    monkeypatch.setattr(attempts, "time", clock := Clock())
    assert attempts.live(location, attempts.names(location), dead=set()) is None
    assert clock.paused < 2, "one by one it would be 80 s"


def test_a_live_claim_among_many_watched_is_seen() -> None:
    location = Memory()
    about = json.dumps({"beat": 0.1, "machine": "other"}).encode()
    location.objects = {f"attempts/000007-{nonce:012x}.json": about for nonce in range(3)}
    living = "attempts/000007-000000000002"
    read, reads = location.read, itertools.count()

    def beating(name: str, *, limit: int) -> bytes | None:
        return json.dumps({"sequence": next(reads)}).encode() if name == f"{living}.beat" else read(name, limit=limit)

    location.read = beating  # type: ignore[method-assign]
    found = attempts.live(location, attempts.names(location), dead=set())
    assert found
    assert str(found.name) == living

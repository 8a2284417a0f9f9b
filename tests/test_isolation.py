"""Jobs that are killed: by the system, by a fault in compiled code, by whoever stops the sweep."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from waiting import Clock, until

from runner.run import attempts
from runner.run.attempts import AttemptRecord, ClaimName, encode, history, machine
from runner.run.directory import RunDirectory
from runner.run.opening import RunSpec
from runner.storage.local import LocalLocation
from runner.sweep import launcher

ROOT = Path(__file__).parent.parent
USER = Path(__file__).parent / "user"
COMMAND = (
    "-m",
    "--config-dir",
    str(USER / "conf"),
    "experiment=smoke",
    "trainer.max_steps=12",
    "checkpoint.every_steps=5",
    "runtime.num_threads=1",
    "runtime.audit=false",
)
SHARED = "sweep.isolate=false"


def stops(number: str, *, call: int = 3) -> tuple[str, ...]:
    """Overrides for a task that sends its own process signals of these numbers at a training step; 0 is none."""
    task = {"_target_": "mine.tasks.Stops", "during": "training", "call": call, "number": number}
    return ("~task", *(f"+task.{key}={value}" for key, value in task.items()))


def attempts_of(root: Path) -> dict[str, list[AttemptRecord]]:
    """The attempts at each run, by what its name says of ``number``."""
    runs = [path.parent for path in root.glob("smoke/*/run.json")]
    return {path.name.partition("number=")[2].partition(",")[0]: history(LocalLocation(path)) for path in runs}


def outcomes(root: Path) -> dict[str, list[str]]:
    return {number: [record.outcome() for record in history] for number, history in attempts_of(root).items()}


def test_a_job_that_is_killed_ends_no_sweep_and_is_last(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, *stops("9,0"), f"run.root={tmp_path}", "sweep.max_retries=1")
    ended = life(*command, cwd=USER)
    assert ended.status == 1, ended.output
    assert outcomes(tmp_path) == {"9": ["killed"] * 2, "0": ["finished"]}
    assert "its process was killed by SIGKILL: the system does so when memory runs out" in ended.output
    second = attempts_of(tmp_path)["9"][1].claim["started"]
    assert second > (attempts_of(tmp_path)["0"][0].end or {})["time"], "what is new comes before what died"

    ended = life(*command, cwd=USER)
    assert (ended.status, "1 done, 1 failed" in ended.output) == (1, True), ended.output
    assert "killed before a new checkpoint, 2 times in a row. Run it alone to see why, or try it again" in ended.output
    assert len(attempts_of(tmp_path)["9"]) == 2
    life(*command, "sweep.max_retries=2", cwd=USER)
    assert outcomes(tmp_path)["9"] == ["killed"] * 3


@pytest.mark.slow
def test_a_job_that_takes_the_sweep_with_it_blocks_no_other(life: Lives, tmp_path: Path) -> None:
    """As where all processes of a container are killed, the deaths are counted over all commands."""
    command = (*COMMAND, *stops("9,0"), f"run.root={tmp_path}", "sweep.max_retries=1", SHARED)
    assert [life(*command, cwd=USER).status for _ in range(2)] == [None, None]
    assert outcomes(tmp_path) == {"9": ["killed"] * 2, "0": ["finished"]}
    ended = life(*command, cwd=USER)
    assert (ended.status, "1 done, 1 failed" in ended.output) == (1, True), ended.output
    assert len(attempts_of(tmp_path)["9"]) == 2


def test_a_job_that_dies_between_checkpoints_goes_on(life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMAND, *stops("9", call=8), f"run.root={tmp_path}", "sweep.max_retries=0", cwd=USER)
    assert ended.status == 0, ended.output
    assert outcomes(tmp_path) == {"9": ["killed", "finished"]}
    assert ", at step 5 or later: its process was killed by SIGKILL" in ended.output


def test_the_cause_of_a_silent_end_is_named(life: Lives, tmp_path: Path) -> None:
    how = (f"run.root={tmp_path}", "sweep.max_retries=0")
    ended = life(*COMMAND, "task._target_=mine.tasks.Leaves,runner.tasks.classification.Classification", *how, cwd=USER)
    assert ended.status == 1
    assert "os._exit(3) was called in the run, by " in ended.output
    assert "its process ended with status 1 before the job did" in ended.output
    assert "1 done, 1 failed" in ended.output


@pytest.mark.slow
def test_one_dead_job_breaks_no_other_of_its_pool(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep.max_retries=0", f"run.root={tmp_path}")
    done = subprocess.run(
        [sys.executable, "-m", "runner", *COMMAND, *stops("9,0,11"), *launcher],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert outcomes(tmp_path) == {"9": ["killed"], "0": ["finished"], "11": ["killed"]}
    assert "killed by SIGSEGV" in done.stdout
    assert "the launcher ended early" not in done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{USER}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def slow(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A sweep that is at work, with a step per fifth of a second."""
    (tmp_path / "pace").write_text("0.2")
    command = [sys.executable, "-m", "runner", *COMMAND, "task=slow", "seed=1,2", f"run.root={tmp_path}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "trainer.max_steps=1000"],
            cwd=tmp_path,
            env=environment() | {"PACE": f"{tmp_path}/pace"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    job = until(lambda: at_work(tmp_path), log=tmp_path / "log")
    assert job != process.pid
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def at_work(root: Path) -> int | None:
    """The process that has made a step of a run."""
    last = [history[-1] for history in attempts_of(root).values() if history]
    return next((one.claim["pid"] for one in last if one.alive() and one.beat.get("step")), None)


@pytest.mark.parametrize("whom", ["sweep", pytest.param("terminal", marks=pytest.mark.slow)])
def test_a_stop_signal_reaches_sweep_and_job_whoever_gets_it(
    whom: str, slow: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    if whom == "terminal":
        os.killpg(slow.pid, signal.SIGINT)  # as Ctrl-C does
    else:
        slow.send_signal(signal.SIGTERM)
    assert slow.wait(120) == 75, (tmp_path / "log").read_text()
    assert list(outcomes(tmp_path).values()) == [["interrupted"]]
    assert "in a sweep: 0 of 2 runs are done" in (tmp_path / "log").read_text()


def test_a_job_whose_sweep_is_killed_commits_and_ends(slow: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    slow.kill()
    slow.wait(60)
    until(lambda: list(outcomes(tmp_path).values()) == [["interrupted"]], log=tmp_path / "log")


def test_nothing_of_a_failed_job_stays_in_the_sweep(life: Lives, tmp_path: Path) -> None:
    task = ("~task", "+task._target_=mine.tasks.Counted", "+task.own=true,false", SHARED)
    ended = life(*COMMAND, *task, "seed=1,2", "sweep.max_retries=0", f"run.root={tmp_path}", cwd=USER)
    assert ended.status == 1
    assert ended.output.count("alive before this job: 0 models\n") == 4, ended.output


def claimed(root: Path, run: str, number: int, end: str | None = None, **facts: Any) -> RunDirectory:
    """A run with an attempt of that number."""
    directory = RunDirectory.under(str(root), "smoke", run)
    directory.create({}, parent=None)
    name = ClaimName(number, f"{number:012x}")
    directory.location.put(f"{name}.json", [encode({"attempt": number, "pid": 1, "host": "other", **facts})])
    if end:
        directory.location.put(f"{name}.end.json", [encode({"outcome": end})])
    return directory


def statuses(*directories: RunDirectory) -> list[launcher.RunStatus]:
    jobs = {(each.variant,): RunSpec(each, {}) for each in directories}
    return [*launcher.survey(jobs).values()]


def test_dead_runs_of_another_machine_are_watched_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight at a time, 3.5 seconds each, they would take two minutes; one of them lives."""
    dead = [claimed(tmp_path, f"r{number}", 1, machine="another", beat=1.0) for number in range(280)]
    living = claimed(tmp_path, "living", 1, machine="another", beat=1.0)
    numbers = itertools.count()

    def beat() -> None:
        name = f"{ClaimName(1, f'{1:012x}')}.beat"
        living.location.replace(name, [encode({"sequence": next(numbers)})], durable=False)

    monkeypatch.setattr(attempts, "time", Clock(beat, seconds=60))
    found = statuses(*dead, living)
    assert [one.status for one in found] == [launcher.RESUMABLE] * len(dead) + [launcher.RUNNING]


@pytest.mark.parametrize(
    ("attempts", "failures"),
    [
        ([{}], 1),
        ([{}, {}, {}], 3),
        ([{}, {"end": "failed"}, {}], 3),
        ([{}, {"end": "interrupted"}, {}], 1),
        ([{"cluster": ["7", "0"]}, {"cluster": ["7", "1"]}], 1),
        ([{"cluster": ["7", "0"]}, {"cluster": ["8", "0"]}], 2),
        ([{"cluster": ["7", "0"]}, {"cluster": ["7", "0"]}], 2),
        ([{"end": "failed", "cluster": ["7", "0"]}, {"cluster": ["7", "1"]}], 2),
        ([{"cluster": 7}, {"cluster": {}}], 2),
    ],
)
def test_deaths_in_a_row_are_counted_and_requeues_are_not(
    attempts: list[dict[str, Any]], failures: int, tmp_path: Path
) -> None:
    for number, facts in enumerate(attempts, 1):
        directory = claimed(tmp_path, "run", number, machine=machine(LocalLocation(tmp_path)), **facts)
    (found,) = statuses(directory)
    assert found.failures == failures
    assert found.status == launcher.RESUMABLE


def test_a_requeue_by_the_cluster_explains_the_last_kill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = claimed(tmp_path, "run", 1, machine=machine(LocalLocation(tmp_path)), cluster=["7", "0"])
    for restarts, failures in ("1", 0), ("0", 1):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert statuses(run)[0].failures == failures

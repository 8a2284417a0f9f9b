"""A run of one process that hangs ends and says why; a run that only looks so goes on."""

import json
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from lives import Ended, Lives
from waiting import until

from runner.activity import activities, doing
from runner.distributed.watchdog import stacks

USER = Path(__file__).parent / "user"
LIMIT = 100  # seconds in which a run that hangs has to end
SLOW = ("task._target_=mine.stalls.Slow", "~task.label_smoothing")
ARGUMENTS = ("experiment=smoke", "trainer.max_steps=60", "runtime.audit=false", "run.name=r")


def run(life: Lives, root: Path, *more: str, hang: int | None = None, hang_seconds: float | None = None) -> Ended:
    command = (*ARGUMENTS, *more, f"run.root={root}")
    return life(*command, cwd=USER, after=LIMIT, hang=hang, hang_seconds=hang_seconds)


def stuck(how: str, root: Path, split: str = "train") -> tuple[str, ...]:
    key = f"data.{split}"
    return f"{key}._target_=mine.stalls.Data", f"+{key}.how={how}", f"+{key}.once={root / 'once'}"


def reason(root: Path) -> str:
    """Why the last attempt ended."""
    record = json.loads(max(root.glob("*/r/attempts/*.end.json")).read_text())
    assert record["outcome"] == "failed"
    return str(record["reason"])


@pytest.mark.parametrize("how", ["python", *(pytest.param(n, marks=pytest.mark.campaign) for n in ("lock", "c"))])
def test_a_stuck_sample_ends_the_run_with_its_place(how: str, life: Lives, tmp_path: Path) -> None:
    ended = run(life, tmp_path, *stuck(how, tmp_path), "runtime.timeout=3")
    assert ended.status == 1, ended.output
    for text in (ended.output, reason(tmp_path)):
        assert "no step for 3 s (runtime.timeout)" in text
        assert "mine/stalls.py" in text
        assert "thread heartbeat" in text
    if how == "python":
        ended = run(life, tmp_path, *stuck(how, tmp_path), "runtime.timeout=60")
        assert ended.status == 0, ended.output
        assert "finished step 60" in ended.output


def test_c_code_that_keeps_the_lock_is_ended_from_outside(life: Lives, tmp_path: Path) -> None:
    ended = run(life, tmp_path, *stuck("gil", tmp_path), "runtime.timeout=3")
    assert ended.status == -signal.SIGABRT, ended.output
    assert "(runtime.timeout), and C code keeps all threads but its own from running" in ended.output
    assert 'stalls.py", line' in ended.output
    ended = run(life, tmp_path, *stuck("gil", tmp_path))
    assert ended.status == 0, ended.output


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.campaign)])
def test_a_stuck_worker_says_where_it_is(method: str, life: Lives, tmp_path: Path) -> None:
    timeout = {"fork": 8, "spawn": 30}[method]  # longer than workers take to start, which import torch
    more = ("runtime.num_workers=2", f"runtime.start_method={method}", f"runtime.timeout={timeout}")
    ended = run(life, tmp_path, *stuck("lock", tmp_path), *more)
    assert ended.status == 1, ended.output
    assert len(re.findall(r"process .* is at .*mine/stalls.py:\d+ in stuck", reason(tmp_path))) == 1, ended.output
    assert 'stalls.py", line' in ended.output
    pids = [line.partition("(pid ")[2].partition(")")[0] for line in reason(tmp_path).splitlines() if "(pid " in line]
    until(lambda: not any(map(lives, pids)))


def test_activities_nest_and_belong_to_a_thread() -> None:
    ident, found = threading.get_ident(), []
    with doing("saves"):
        with doing("joins"), ThreadPoolExecutor(1) as pool:
            found += [activities(ident), pool.submit(lambda: activities(threading.get_ident())).result()]
        found.append(activities(ident))
    assert [*found, activities(ident)] == [("saves", "joins"), (), ("saves",), ()]


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_stuck_evaluation_is_distinguished_from_a_step(life: Lives, tmp_path: Path) -> None:
    ended = run(life, tmp_path, *stuck("lock", tmp_path, "validation"), "runtime.timeout=3")
    assert ended.status == 1, ended.output
    assert "no batch of an evaluation for 3 s" in reason(tmp_path)


def test_a_stuck_save_has_longer(life: Lives, tmp_path: Path) -> None:
    more = ("runtime.timeout=3", "checkpoint.max_unsaved=3", "checkpoint.background=false")
    ended = run(life, tmp_path, *more, hang=2)
    assert ended.status == 1, ended.output
    assert "no end of a save for 6 s (runtime.timeout and checkpoint.max_unsaved)" in reason(tmp_path)


def test_work_that_may_take_long_is_no_stall(life: Lives, tmp_path: Path) -> None:
    """Building, a long evaluation of short batches, its end, and a slow storage."""
    slow = (*SLOW, "+task.build=4", "+task.batch=1", "+task.end=4", "data.evaluation_batch_size=90")
    more = ("trainer.max_steps=20", "runtime.timeout=3", "checkpoint.background=false")
    ended = run(life, tmp_path, *slow, *more, hang=2, hang_seconds=5)
    assert ended.status == 0, ended.output
    assert ended.seconds > 4 + 4 + 4 + 5, "each is longer than the timeout"


@pytest.mark.slow
def test_compiling_is_no_stall(life: Lives, tmp_path: Path) -> None:
    """Also if the task compiles."""
    more = (*SLOW, "+task.compiling=7", "trainer.max_steps=3", "runtime.timeout=5")
    ended = run(life, tmp_path, *more)
    assert ended.status == 0, ended.output
    assert ended.seconds > 7


@pytest.mark.slow
def test_a_run_with_workers_ends_and_leaves_no_process(tmp_path: Path) -> None:
    """The process that watches from outside ends with the run, though workers hold its input open."""
    more = (
        "runtime.num_workers=2",
        "runtime.start_method=fork",
        "runtime.timeout=20",
        *SLOW,
        "+task.step=0.05",
        "trainer.max_steps=20",
    )
    command = [sys.executable, "-m", "runner", *ARGUMENTS, *more, f"run.root={tmp_path}"]
    process = subprocess.Popen(command, cwd=USER, start_new_session=True)
    try:
        seen: set[str] = set()
        until(lambda: seen.update(below(process.pid)) or process.poll() is not None)
        assert process.returncode == 0
        assert len(seen) >= 3
        until(lambda: not any(map(lives, seen)))
    finally:
        process.kill()
        process.wait()


def below(pid: int) -> set[str]:
    found: set[str] = set()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found |= {*(task / "children").read_text().split()}
    return found


@pytest.mark.slow
def test_a_step_longer_than_the_timeout_needs_a_longer_one(life: Lives, tmp_path: Path) -> None:
    more = (*SLOW, "+task.step=5", "trainer.max_steps=1", "trainer.evaluate_every_steps=1")
    ended = run(life, tmp_path, *more, "runtime.timeout=3")
    assert ended.status == 1
    assert "set a longer runtime.timeout" in reason(tmp_path)
    ended = run(life, tmp_path, *more, "runtime.timeout=60")
    assert ended.status == 0, ended.output


def test_a_process_that_was_stopped_goes_on(life: Lives, tmp_path: Path) -> None:
    """Also in the middle of a step, for longer than a step may take."""
    command = (*ARGUMENTS, "trainer.max_steps=3", "runtime.timeout=3", f"run.root={tmp_path}")
    with life.start(*command, cwd=USER, step=1, send=signal.SIGSTOP) as process:
        until(process.is_stopped)
        time.sleep(5)
        process.send(signal.SIGCONT)
        assert process.wait().status == 0, process.output


def test_stacks_of_threads_have_file_line_and_function(tmp_path: Path) -> None:
    """Also of a file whose name is not ASCII, by which installed packages are told from a user's code."""
    file = tmp_path / "größe.py"
    file.write_text("def wait_for(event):\n    event.wait()\n")
    namespace = runpy.run_path(str(file))
    event = threading.Event()
    thread = threading.Thread(target=namespace["wait_for"], args=[event], daemon=True)
    thread.start()
    try:
        until(lambda: (str(file), "2", "wait_for") in stacks()[thread.ident or 0])
    finally:
        event.set()
        thread.join()

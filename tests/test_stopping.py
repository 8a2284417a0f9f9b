"""Stop signals: finish the step, commit, leave with 75; the next start loses nothing."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lives import Lives
from marks import slow
from results import results

from runner.run import attempts
from runner.storage.local import LocalLocation

USER = Path(__file__).parent / "user"
COMMAND = (
    "experiment=smoke",
    "trainer.max_steps=40",
    "trainer.evaluate_every_steps=10",
    "checkpoint.every_steps=null",
    "runtime.num_threads=1",
    "runtime.check_batches=0",
)


def stops(during: str, call: int, number: int) -> tuple[str, ...]:
    """A task that sends its process a signal in the ``call``-th training or evaluation step."""
    task = {"_target_": "mine.tasks.Stops", "during": during, "call": call, "number": int(number)}
    return (*COMMAND, "~task", *(f"+task.{key}={value}" for key, value in task.items()))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, *map(slow, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP))], ids=str
)
def test_a_signal_commits_the_step_and_leaves_with_75(number: signal.Signals, life: Lives, tmp_path: Path) -> None:
    command = (*stops("training", 17, number), f"run.root={tmp_path}", "run.name=r")
    ended = life(*command, cwd=USER)
    assert ended.status == 75, ended.output
    assert f"{number.name}: stopped after step 17, which is committed" in ended.output
    again = life(*command, cwd=USER)
    assert "resumed from step 17 of attempt 1\n" in again.output, "no step may be lost"


def test_a_closed_terminal_commits_the_step_and_leaves_with_75(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(USER)
        steps = ("trainer.max_steps=1000000", f"run.root={tmp_path}", "run.name=r")
        os.execv(sys.executable, [sys.executable, "-m", "runner", *COMMAND, *steps])
    shown = b""
    while b"step 10: val/loss" not in shown:
        shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    (last,) = attempts.history(LocalLocation(tmp_path / "smoke/r"))
    assert last.outcome() == "interrupted"
    assert last.end
    assert last.end["reason"].startswith("Interrupted: SIGHUP: stopped after step")


def test_under_nohup_the_end_of_a_session_is_ignored() -> None:
    code = (
        "import os, signal; from runner import signals; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "signals.install(); os.kill(os.getpid(), signal.SIGHUP); print(signals.received())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "None\n"


@pytest.mark.parametrize(("call", "step", "times"), [slow(1, 10, 2), (2, 10, 2), slow(14, 40, 1)])
def test_a_signal_during_evaluation_keeps_the_step(
    call: int, step: int, times: int, life: Lives, tmp_path: Path
) -> None:
    """The resumed run evaluates, and that evaluation may be cut short, too. Also after the last step."""
    small = "data.evaluation_batch_size=100"  # four batches, so that there is something to cut
    whole = (*stops("training", 10**6, signal.SIGTERM), small, f"run.root={tmp_path}", "run.name=whole")
    assert life(*whole, cwd=USER).status == 0
    cut = (*stops("evaluation", call, signal.SIGTERM), small, f"run.root={tmp_path}", "run.name=cut")
    for _ in range(times):
        ended = life(*cut, cwd=USER)
        assert (ended.status, f"SIGTERM: stopped after step {step}," in ended.output) == (75, True), ended.output
    resumed = (*whole[:-1], "run.name=cut", "run.on_drift=accept")
    ended = life(*resumed, cwd=USER)
    assert ended.status == 0, ended.output
    actual, expected = results(tmp_path / "smoke/cut"), results(tmp_path / "smoke/whole")
    assert not set(actual.differences(expected)) - {"result"}
    assert {**actual.result, "identity": 0} == {**expected.result, "identity": 0}


def test_a_signal_during_start_up_leaves_with_75(life: Lives, tmp_path: Path) -> None:
    for delay in (0.02, 0.1, 0.2, 0.3):
        ended = life(*COMMAND, f"run.root={tmp_path}", "run.name=r", after=delay, send=signal.SIGTERM)
        assert ended.status in (0, 75, -signal.SIGTERM), ended.output  # before the handlers exist, the default applies
    assert life(*COMMAND, f"run.root={tmp_path}", "run.name=r").status == 0


def test_closed_standard_files_are_no_files_of_a_run(tmp_path: Path) -> None:
    code = "import os, sys; from runner.__main__ import main; sys.argv[1:] = ['--version']; main();"
    code += (
        f"open({str(tmp_path / 'files')!r}, 'w').write(' '.join(os.readlink(f'/proc/self/fd/{{n}}') for n in range(3)))"
    )
    subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], check=True)
    assert (tmp_path / "files").read_text() == "/dev/null /dev/null /dev/null"


def test_a_second_interrupt_leaves_at_once() -> None:
    code = (
        "import os, signal, time; from runner import signals; signals.install();"
        "os.kill(os.getpid(), signal.SIGINT); print(signals.received(), flush=True);"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "SIGINT\n")


def test_workers_ignore_a_signal_to_the_whole_group(life: Lives, tmp_path: Path) -> None:
    """Ctrl-C and Slurm reach every process; a worker that died would fail the step that is to be finished."""
    command = (*COMMAND, "trainer.max_steps=100000", "runtime.num_workers=2", f"run.root={tmp_path}", "run.name=r")
    for step, number in ((3, signal.SIGINT), (6, signal.SIGTERM)):
        ended = life(*command, step=step, send=number)
        assert ended.status == 75, ended.output
        assert f"stopped after step {step}" in ended.output


def test_the_end_of_an_attempt_is_recorded(life: Lives, tmp_path: Path) -> None:
    command = (*stops("training", 5, signal.SIGTERM), f"run.root={tmp_path}", "run.name=r")
    life(*command, cwd=USER)
    life(*command, cwd=USER, restored=True)
    broken = ("run.on_drift=accept", "task._target_=mine.tasks.Nothing")
    assert life(*command, *broken, cwd=USER).status == 2
    records = attempts.history(LocalLocation(tmp_path / "smoke/r"))
    assert [record.outcome() for record in records] == ["interrupted", "killed", "failed"]
    assert records[0].end is not None
    assert records[0].end["committed"] == 5
    assert "Nothing" in json.dumps(records[2].end)
    assert records[0].claim["topology"]["threads"] == 1
    assert records[0].claim["pid"] != os.getpid()


def test_a_users_error_ends_the_process_also_with_workers(tmp_path: Path) -> None:
    """The traceback keeps the loader alive to the end of the interpreter, and its workers ignore SIGTERM."""
    options = ["task._target_=mine.tasks.Breaks", "runtime.num_workers=1", f"run.root={tmp_path}", "run.name=r"]
    command = [sys.executable, "-m", "runner", "experiment=smoke", *options]
    environment = {**os.environ, "PYTHONPATH": str(USER.parent.parent)}
    ended = subprocess.run(command, cwd=USER, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert "KeyError: 'mine'" in ended.stderr


def test_a_setting_that_is_infinite_survives_a_kill(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, "trainer.clip_norm=inf", "checkpoint.every_steps=10", f"run.root={tmp_path}", "run.name=r")
    assert life(*command, step=15).status is None
    assert "resumed from step 10" in life(*command).output


def test_a_best_evaluation_after_a_resume_has_its_checkpoint(life: Lives, tmp_path: Path) -> None:
    """With mode=max the first loss is the best one, and its step was committed before it was evaluated."""
    small = (
        "data.evaluation_batch_size=100",
        "objective.metric=val/loss",
        "objective.mode=max",
        "checkpoint.every_steps=5",
    )
    root = f"run.root={tmp_path}"
    cut = (*stops("evaluation", 1, signal.SIGTERM), *small, root, "run.name=cut")
    assert life(*cut, cwd=USER).status == 75
    ended = life(
        *stops("training", 10**6, signal.SIGTERM), *small, root, "run.name=cut", "run.on_drift=accept", cwd=USER
    )
    assert ended.status == 0, ended.output
    assert "best     val/loss" in ended.output
    assert "at step 10" in ended.output
    assert (tmp_path / "smoke/cut/best.safetensors").exists(), ended.output


LEAVES = """
import signal, sys, threading
from runner import __main__ as main, signals

signals.install()
main._EXIT_SECONDS = float(sys.argv[1])
threading.Thread(target=threading.Event().wait, name="endless").start()
main._leave(4)
if len(sys.argv) > 2:
    signal.raise_signal(signal.SIGTERM)
sys.exit(4)
"""


@pytest.mark.parametrize("arguments", [("0.5",), ("1000", "SIGTERM")], ids=["in time", "stopped"])
def test_a_thread_that_never_ends_does_not_keep_the_process(arguments: tuple[str, ...]) -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVES, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 4, ended.stderr
    assert "threads that never end are left behind: endless" in ended.stderr


def test_an_interrupted_run_with_an_endless_thread_exits_75(tmp_path: Path) -> None:
    thread = "+callbacks.thread._target_=mine.callbacks.Thread"
    command = [sys.executable, "-m", "runner", *stops("training", 3, signal.SIGTERM), thread, f"run.root={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=USER)
    assert ended.returncode == 75, ended.stderr
    assert "threads that never end are left behind: endless" in ended.stderr

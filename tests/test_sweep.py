"""The same sweep again does what is missing: killed, stopped, failing, started twice."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from marks import slow
from results import results
from servers import Server

from runner.run import attempts
from runner.run.directory import RunDirectory
from runner.runs.__main__ import main
from runner.runs.audit import audit
from runner.storage.local import LocalLocation

ROOT = Path(__file__).parent.parent
USER = Path(__file__).parent / "user"
SEARCH = ("--config-dir", str(USER / "conf"))
EVERY = 5
SEEDS = (
    12 if int(os.environ.get("RUNNER_KILLS", "50")) > 50 else 2
)  # of the sweep that is killed, for each of two rates
COMMAND = (
    "-m",
    "experiment=smoke",
    "trainer.max_steps=12",
    "trainer.evaluate_every_steps=6",
    f"checkpoint.every_steps={EVERY}",
    "runtime.num_threads=1",
    "runtime.audit=false",
)


def runs(root: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(root.glob("smoke/*/run.json"))}


def outcomes(folder: Path) -> list[Any]:
    return [(record.end or {}).get("outcome") for record in attempts.history(LocalLocation(folder))]


@pytest.mark.campaign
def test_a_killed_sweep_has_the_results_of_an_undisturbed_one(life: Lives, tmp_path: Path) -> None:
    """Killed at random changes to the disk. What is computed twice is what was lost since the
    last checkpoint, and nothing of a finished run.
    """
    # The kills are no failures of a run, however many meet it before its first checkpoint.
    grid = (f"seed=range(0,{SEEDS})", "optimizer.lr=0.01,0.1", "sweep.max_retries=1000")
    ended = life(*COMMAND, *grid, f"run.root={tmp_path}/whole")
    assert ended.status == 0, ended.output
    chance, kills = random.Random(0), 0
    while kills < 100 * SEEDS:
        ended = life(*COMMAND, *grid, f"run.root={tmp_path}/cut", operation=chance.randrange(60, 260))
        if ended.status is not None:
            break
        kills += 1
    assert ended.status == 0, ended.output
    assert kills >= SEEDS
    whole, cut = runs(tmp_path / "whole"), runs(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert len(whole) == 2 * SEEDS
    assert [name for name in whole if results(cut[name]).differences(results(whole[name]))] == []
    again = [audit(RunDirectory.at(str(path)))["again"]["steps"] for path in cut.values()]
    assert sum(again) <= kills * EVERY


def test_a_value_added_later_runs_alone(life: Lives, tmp_path: Path) -> None:
    root = f"run.root={tmp_path}"
    assert life(*COMMAND, "seed=2,3", root).status == 0
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "multirun.yaml"}
    ended = life(*COMMAND, "seed=1,2,3", root)
    assert ended.status == 0
    assert "2 done, 1 new" in ended.output
    assert ended.output.count("from scratch") == 1
    assert {path: path.stat().st_mtime_ns for path in kept if path.is_file()} == {
        path: time for path, time in kept.items() if path.is_file()
    }


def test_a_failing_job_ends_no_sweep_and_is_not_tried_for_ever(life: Lives, tmp_path: Path) -> None:
    command = (*SEARCH, *COMMAND, "task=fails", "task.step=3,1000", f"run.root={tmp_path}")
    ended = life(*command, cwd=USER)
    bad, good = (next(path for name, path in runs(tmp_path).items() if step in name) for step in ("=3,", "=1000,"))
    assert ended.status == 1
    assert "1 done, 1 failed" in ended.output
    assert f"failed   smoke/{bad.name}: ZeroDivisionError" in ended.output
    assert "torch.tensor(1 / self.step)" in ended.output, "where"
    assert (good / "result.json").exists()
    assert outcomes(bad) == ["failed"] * 3, "once, and two retries"
    ended = life(*command, cwd=USER)
    assert (ended.status, len(outcomes(bad))) == (1, 3)
    assert life(*command, "sweep.max_retries=9", "sweep.retry_failed=false", cwd=USER).status == 1
    assert len(outcomes(bad)) == 3
    assert life(*command, "sweep.max_retries=3", cwd=USER).status == 1
    assert len(outcomes(bad)) == 4


def test_code_that_exits_ends_no_sweep_and_is_no_success(life: Lives, tmp_path: Path) -> None:
    tasks = "task._target_=mine.tasks.Exits,runner.tasks.classification.Classification"
    ended = life(*COMMAND, tasks, f"run.root={tmp_path}", "sweep.retry_failed=false", cwd=USER)
    assert (ended.status, "1 done, 1 failed" in ended.output) == (1, True), ended.output
    words = "RuntimeError: sys.exit(0) was called in the run\n"
    assert words in ended.output
    again = life(*COMMAND, tasks, f"run.root={tmp_path}", "sweep.retry_failed=false", cwd=USER)
    assert (again.status, words in again.output) == (1, True), "the same from the records"
    ended = life(*COMMAND[1:], tasks.partition(",")[0], f"run.root={tmp_path}", cwd=USER)
    assert (ended.status, words in ended.output) == (1, True), ended.output


@pytest.mark.parametrize(
    ("overrides", "differing"),
    [
        (("seed=1,2", "run.name=same"), "seed"),
        slow(("seed=1,2", "run.name=same", "run.on_drift=accept"), "seed"),
        slow(("seed=1,2", "run.name=same", "run.on_drift=fork"), "seed"),
        (("+callbacks={a:{x:1}},{}", "run.name=same"), "callbacks"),
    ],
)
def test_two_jobs_of_the_same_name_are_refused_before_any(
    overrides: tuple[str, ...], differing: str, life: Lives, tmp_path: Path
) -> None:
    ended = life(*COMMAND, *overrides, f"run.root={tmp_path}")
    assert ended.status == 2, ended.output
    assert f"two jobs of the sweep name one run, smoke/same, and differ in {differing}" in ended.output
    assert not runs(tmp_path)
    assert "Traceback" not in ended.output
    if differing == "seed":
        assert life(*COMMAND, "seed=1,2", "run.name=NAME-${seed}", f"run.root={tmp_path}").status == 0
        assert [*runs(tmp_path)] == ["NAME-1", "NAME-2"]


@pytest.mark.parametrize("twice", ["runtime.num_workers=0,1", slow("optimizer.lr=1,1.0"), slow("seed=1,1")])
def test_jobs_that_compute_the_same_are_one_row(twice: str, life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMAND, twice, "trainer.max_steps=2", f"run.root={tmp_path}")
    assert ended.status == 0, ended.output
    assert "\n1 new\n" in ended.output
    assert ended.output.count("Launching 1 jobs") == 1
    assert "\n1 done\n" in ended.output
    first, second = (f"{twice.partition('=')[0]}={value}" for value in twice.partition("=")[2].split(","))
    hint = ended.output.partition("hint     two jobs are one run, smoke/")[2].splitlines()
    assert first in hint[1]
    assert second in hint[2]


def test_a_sweep_over_nothing_is_a_mistake(life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMAND[:1], "experiment=glob(smook*)", f"run.root={tmp_path}")
    assert (ended.status, "the sweep has no jobs" in ended.output) == (2, True), ended.output


def test_a_run_that_diverged_is_a_result(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (*COMMAND, "optimizer=sgd", "optimizer.lr=1e30,0.01", f"run.root={tmp_path}")
    ended = life(*command)
    assert ended.status == 0, ended.output
    assert "1 done, 1 diverged" in ended.output
    bad = next(path for name, path in runs(tmp_path).items() if "e30" in name or "1e" in name)
    assert outcomes(bad) == ["diverged"]
    assert life(*command).status == 0
    assert outcomes(bad) == ["diverged"]
    assert main(["list", str(tmp_path), "--status", "diverged"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["diverged"]


def test_other_jobs_run_beside_an_impossible_configuration(life: Lives, tmp_path: Path) -> None:
    ended = life(*COMMAND[:2], "trainer.max_steps=0,4", "runtime.audit=false", f"run.root={tmp_path}")
    assert ended.status == 2
    assert "trainer.max_steps=0 is too small" in ended.output
    assert [*runs(tmp_path)] == ["trainer.max_steps=4"]


def test_drift_is_reported_and_the_others_run(life: Lives, tmp_path: Path) -> None:
    names = f"run.root={tmp_path}", "run.name=r${seed}"
    assert life(*COMMAND, "seed=1,2", *names).status == 0
    ended = life(*COMMAND, "seed=1,2,3", "optimizer.lr=0.5", *names)
    assert ended.status == 3
    assert ended.output.count("continue with the new values: ") == 1, "not for each of two that are alike"
    assert (runs(tmp_path)["r3"] / "result.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)], ids=str)
def test_a_signal_commits_starts_no_more_and_leaves_with_75(
    number: signal.Signals, life: Lives, tmp_path: Path
) -> None:
    """In each life the job that is going on ends, and the next one gets the signal at its eighth step."""
    task = {"_target_": "mine.tasks.Stops", "during": "training", "call": 8, "number": int(number)}
    command = (*COMMAND, "~task", *(f"+task.{key}={value}" for key, value in task.items()))
    lives = [life(*command, "seed=1,2,3", f"run.root={tmp_path}", cwd=USER) for _ in range(4)]
    assert [ended.status for ended in lives] == [75, 75, 75, 0]
    for done, ended in enumerate(lives[:3]):
        assert f"{number.name} in a sweep: {done} of 3 runs are done, what was running is committed" in ended.output
    assert "1 done, 1 to resume, 1 new" in lives[2].output
    assert [outcomes(folder) for folder in runs(tmp_path).values()] == [["interrupted", "finished"]] * 3


def test_finished_runs_cost_a_read_and_a_listing_each(s3: Server, life: Lives, tmp_path: Path) -> None:
    """On a store, where every operation is a round trip. Without torch, which a process of its own shows."""
    code = """
import collections, sys
from runner.__main__ import main
from runner.storage.backend import Backend
verbs, run = collections.Counter(), Backend.run
def counted(self, verb, *arguments, **options):
    verbs[verb] += 1
    return run(self, verb, *arguments, **options)
Backend.run = counted
status = main()
print("counted", status, dict(verbs), "torch" in sys.modules)
"""
    command, environment = (*COMMAND, "seed=1,2,3", f"run.root={s3.url}/{tmp_path.name}"), s3.environment
    first = life(*command, cwd=tmp_path, environment=environment)
    assert "3 new" in first.output
    environment |= {**os.environ, "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-c", code, *command)
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "3 done" in again
    assert again.endswith("counted 0 {'read': 3, 'list': 3} False\n")


@pytest.mark.parametrize("kind", ["disk", slow("s3")])
def test_a_sweep_started_twice_executes_every_run_once(
    kind: str, life: Lives, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root, options, environment = f"{tmp_path}/runs", None, {"HOME": str(tmp_path)}
    if kind == "s3":
        server: Server = request.getfixturevalue("s3")
        root, options, environment = f"{server.url}/{tmp_path.name}", server.options, environment | server.environment
    command = (*COMMAND, "seed=range(0,4)", f"run.root={root}")
    started = [life.start(*command, cwd=tmp_path, environment=environment) for _ in range(2)]
    ended = [sweep.wait() for sweep in started]
    outputs = [sweep.output for sweep in ended]
    assert [sweep.status for sweep in ended] == [0, 0], outputs
    assert sum(output.count("from scratch") for output in outputs) == 4
    assert ["resumed from" in output for output in outputs] == [False, False]
    for output in outputs:
        assert "4 done" in output
        assert "credentials" not in output, "which a library of the store talks of"
    for seed in range(4):
        name = f"seed={seed},trainer.evaluate_every_steps=6,trainer.max_steps=12"
        location = RunDirectory.under(root, "smoke", name, options).location
        assert [record.outcome() for record in attempts.history(location)] == ["finished"]

"""A run whose processes are the tasks of a Slurm job, launched by a sweep."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from crews import Crews
from results import results
from waiting import until

from runner.distributed.world import Rendezvous, World, first_host, rendezvous, world
from runner.run.attempts import AttemptRecord, history
from runner.storage.local import LocalLocation

ROOT = Path(__file__).parent.parent
USER = Path(__file__).parent / "user"
COMMAND = (
    "experiment=smoke",
    "task=slow",
    "trainer.max_steps=20",
    "checkpoint.every_steps=2",
    "runtime.num_threads=1",
    "runtime.audit=false",
    "runtime.timeout=60",
    "seed=1",
)


@pytest.mark.campaign
@pytest.mark.skipif(find_spec("hydra_plugins.hydra_submitit_launcher") is None, reason="needs the extra slurm")
def test_a_job_of_two_tasks_is_preempted_and_goes_on(cluster: dict[str, str], crew: Crews, tmp_path: Path) -> None:
    """The signal of a preemption stops both tasks after the same step; the job is queued again by itself."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": f"{ROOT}:{USER}", "HOME": str(tmp_path), "USER": "root"}
    environment |= {"OMP_NUM_THREADS": "1", "PACE": f"{tmp_path}/pace"}
    (tmp_path / "pace").write_text("0.3")
    sweep = [sys.executable, "-m", "runner", "-m", "--config-dir", f"{USER}/conf", *COMMAND]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*sweep, "hydra/launcher=slurm_many", f"run.root={tmp_path}/runs"],
            cwd=tmp_path,
            env=environment | cluster,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: committed(tmp_path) > 0, process=process, log=tmp_path / "log")
        slurm(cluster, "scancel", "--signal=USR2", slurm(cluster, "squeue", "--noheader", "--format=%F").split()[0])
        until(lambda: len(attempts(tmp_path)) == 2, process=process, log=tmp_path / "log")
        (tmp_path / "pace").write_text("0")
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert [attempt.outcome() for attempt in attempts(tmp_path)] == ["interrupted", "finished"]
    assert [attempt.claim["topology"]["processes"] for attempt in attempts(tmp_path)] == [2, 2]
    (run,) = (tmp_path / "runs/smoke").glob("*/result.json")
    whole = crew(2, "--config-dir", f"{USER}/conf", *COMMAND, f"run.root={tmp_path}/whole", cwd=USER)
    assert whole.statuses == [0, 0], whole.output
    (expected,) = (tmp_path / "whole/smoke").iterdir()
    assert not results(run.parent).differences(results(expected))


def slurm(cluster: dict[str, str], *command: str) -> str:
    allowed = {**os.environ, **cluster}
    return subprocess.run(command, env=allowed, check=True, timeout=300, capture_output=True, text=True).stdout


def attempts(root: Path) -> list[AttemptRecord]:
    return [one for run in root.glob("runs/smoke/*/run.json") for one in history(LocalLocation(run.parent))]


def committed(root: Path) -> int:
    return max((attempt.beat.get("committed", 0) for attempt in attempts(root)), default=0)


STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "14001",
}


def test_the_tasks_of_a_step_of_slurm_are_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert world() == World(3, 4, 1)
    assert rendezvous() == Rendezvous("node07", 15001, launcher_serves=False, restart=0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # the script of a batch job, however many tasks that has
    assert world() == World()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("node[07-09,12]", "node07"),
        ("rack2-[1,3].local,b", "rack2-1.local"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_the_first_of_a_list_of_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first

"""The same sweep on other launchers: their processes are killed, stopped, cancelled and queued again."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from lives import Lives
from results import results
from waiting import until

from runner.run.attempts import AttemptRecord, history
from runner.storage.local import LocalLocation

ROOT = Path(__file__).parent.parent
USER = Path(__file__).parent / "user"
SWEEP = (
    "-m",
    "--config-dir",
    str(USER / "conf"),
    "experiment=smoke",
    "task=slow",
    "trainer.max_steps=40",
    "trainer.evaluate_every_steps=20",
    "checkpoint.every_steps=2",
    "runtime.num_threads=1",
    "runtime.audit=false",
)
SEEDS = (1, 2, 3)  # on two processors: one has to wait
LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "slurm": ("hydra/launcher=slurm",),
    "ray": (
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.object_store_memory=100000000",
        "+hydra.launcher.ray.init.include_dashboard=false",
        "+hydra.launcher.ray.init._node_ip_address=127.0.0.1",
        "+hydra.launcher.ray.remote.max_retries=0",
    ),
}
PACKAGES = {"joblib": "hydra_joblib_launcher", "slurm": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def whole(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep that nobody disturbed, on the basic launcher."""
    root = tmp_path_factory.mktemp("whole")
    assert life(*SWEEP, f"seed={','.join(map(str, SEEDS))}", f"run.root={root}", cwd=USER).status == 0
    return root


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Call it to begin the sweep as a user would, with that many seconds per step: there is time for a kill."""
    begun = []

    def start(launcher: str, *overrides: str, pace: float = 0.2) -> subprocess.Popen[bytes]:
        if find_spec(f"hydra_plugins.{PACKAGES[launcher]}") is None:
            pytest.skip(f"{PACKAGES[launcher]} is not installed, which the extra {launcher} does")
        cluster = request.getfixturevalue("cluster") if launcher == "slurm" else {}
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        environment = {"PATH": path, "PYTHONPATH": f"{ROOT}:{USER}", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        (tmp_path / "pace").write_text(str(pace))
        command = [sys.executable, "-m", "runner", *SWEEP, *LAUNCHERS[launcher], *overrides]
        # Into a file: what outlives the sweep, as daemons of Ray do for a while, would hold a pipe open.
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, f"seed={','.join(map(str, SEEDS))}", f"run.root={tmp_path}/runs"],
                cwd=tmp_path,
                env=environment | cluster | {"PACE": f"{tmp_path}/pace", "USER": "root"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        begun.append(process)
        return process

    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def attempts(root: Path) -> dict[str, list[AttemptRecord]]:
    """The attempts at each run."""
    folders = (path.parent for path in root.glob("runs/smoke/*/run.json"))
    return {folder.name: history(LocalLocation(folder)) for folder in folders}


def at_work(root: Path, *, above: int = 0) -> list[AttemptRecord]:
    """The attempts that live and have come further than ``above`` steps."""
    last = [history[-1] for history in attempts(root).values() if history]
    return [record for record in last if record.alive() and record.beat.get("committed", 0) > above]


def ended(process: subprocess.Popen[bytes], root: Path, *, seconds: float) -> str:
    """What the sweep has said when it has ended, within so many seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    output = (root / "log").read_text(errors="replace")
    assert process.returncode is not None, output
    return output


def outcomes(root: Path) -> list[list[str]]:
    """How the attempts at each run ended."""
    return [[record.outcome() for record in history] for _, history in sorted(attempts(root).items())]


def reasons(root: Path) -> list[list[str]]:
    """Why the attempts at each run ended."""
    return [
        [(record.end or {}).get("reason", "") for record in history] for _, history in sorted(attempts(root).items())
    ]


def assert_equal(root: Path, whole: Path) -> None:
    """Every run has the results of the one that nobody disturbed."""
    expected = {path.parent.name: path.parent for path in whole.glob("smoke/*/run.json")}
    assert len(expected) == len(SEEDS)
    assert {n: results(root / "runs/smoke" / n).differences(results(path)) for n, path in expected.items()} == {
        name: [] for name in expected
    }


@pytest.mark.campaign
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_workers_and_sweeps_may_be_killed_and_stopped(launcher: str, start: Start, whole: Path, tmp_path: Path) -> None:
    """A worker is killed and the sweep goes on; stopped, it stops its jobs; killed and run again, it finishes."""
    chance = random.Random(launcher)
    sweep = start(launcher)
    until(lambda: at_work(tmp_path), process=sweep, log=tmp_path / "log")
    killed = chance.choice(at_work(tmp_path))
    os.kill(killed.claim["pid"], signal.SIGKILL)
    until(lambda: not killed.alive(), process=sweep, log=tmp_path / "log")
    until(lambda: at_work(tmp_path, above=5), process=sweep, log=tmp_path / "log")
    sweep.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT]))
    output = ended(sweep, tmp_path, seconds=60)
    assert sweep.returncode == 75, output
    assert f"failed   smoke/{Path(killed.location.url).name}" not in output, "it had come further"
    assert not at_work(tmp_path)
    assert "interrupted" in [ends[-1] for ends in outcomes(tmp_path)], output

    sweep = start(launcher)
    until(lambda: at_work(tmp_path), process=sweep, log=tmp_path / "log")
    orphan = at_work(tmp_path)[0]
    sweep.kill()
    sweep.wait(10)
    if launcher != "slurm":  # there a job belongs to the cluster; here nobody could stop it any more
        until(lambda: not orphan.alive())

    submitted = len([*tmp_path.glob("runs/smoke/.submitit/*/*.sh")])
    sweep = start(launcher)
    if launcher == "slurm":  # which had not begun the last job, so that it is submitted again
        until(
            lambda: len([*tmp_path.glob("runs/smoke/.submitit/*/*.sh")]) > submitted,
            process=sweep,
            log=tmp_path / "log",
        )
    (tmp_path / "pace").write_text("0")
    output = ended(sweep, tmp_path, seconds=120)
    assert sweep.returncode == 0, output
    assert f"{len(SEEDS)} done" in output
    assert launcher != "slurm" or "in use" in output
    if launcher == "joblib":
        assert "interrupted" in [
            record.outcome()
            for record in attempts(tmp_path)[Path(orphan.location.url).name]
            if record.name == orphan.name
        ]
    assert_equal(tmp_path, whole)


@pytest.mark.parametrize(("jobs", "launches", "status"), [(1, 4, 0), (0, 3, 1)])
def test_a_launcher_that_always_fails_gets_as_far_as_it_can(
    jobs: int, launches: int, status: int, life: Lives, tmp_path: Path
) -> None:
    """What it did not begin has not failed, unless it began nothing: then it is tried thrice."""
    fragile = ("hydra/launcher=fragile", f"hydra.launcher.jobs={jobs}")
    ended = life(*SWEEP, "trainer.max_steps=2", *fragile, "seed=1,2,3,4", f"run.root={tmp_path}", cwd=USER)
    assert ended.status == status, ended.output
    assert ended.output.count("the launcher ended early: ConnectionError") == launches
    assert ("4 done" if jobs else "4 failed") in ended.output


def test_a_run_reports_its_own_failure_without_its_launcher(life: Lives, tmp_path: Path) -> None:
    fragile = ("hydra/launcher=fragile", "hydra.launcher.jobs=1", "sweep.retry_failed=false")
    overrides = ("task=fails", "task.step=1", *fragile, f"run.root={tmp_path}")
    ended = life(*(word for word in SWEEP if word != "task=slow"), *overrides, cwd=USER)
    assert "failed   smoke/" in ended.output
    assert [line for line in ended.output.splitlines() if "ZeroDivisionError: division by zero" in line][-1].startswith(
        "smoke/"
    )


@pytest.mark.campaign
def test_a_job_loses_nothing_whatever_slurm_does(
    start: Start, cluster: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    """The first is preempted by a signal and then queued again by hand, one is cancelled, one reaches its time limit.
    Only the cancelled one has to be launched again.
    """
    sweep = start("slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.signal_delay_s=50", pace=1)

    def slurm(*command: str) -> str:
        allowed = {**os.environ, **cluster}
        return subprocess.run(command, env=allowed, check=True, timeout=300, capture_output=True, text=True).stdout

    def array() -> list[str]:
        return slurm("squeue", "--noheader", "--format=%F").split()

    def working(seed: int, attempt: int) -> bool:
        return any(f"seed={seed}," in record.location.url and record.number == attempt for record in at_work(tmp_path))

    until(lambda: working(1, 1), process=sweep, log=tmp_path / "log")
    job = array()[0]
    slurm("scancel", "--signal=USR2", f"{job}_0")
    until(lambda: working(2, 1), process=sweep, log=tmp_path / "log")
    slurm("scancel", f"{job}_1")
    until(lambda: working(3, 1), process=sweep, log=tmp_path / "log")
    slurm("scontrol", "update", f"jobid={job}_2", "timelimit=1")  # its signal comes within 30 s
    until(lambda: working(1, 2), process=sweep, log=tmp_path / "log")
    slurm("scontrol", "requeue", f"{job}_0")
    until(lambda: len(attempts(tmp_path)) == 3 and reasons(tmp_path)[2][0], process=sweep, log=tmp_path / "log")
    (tmp_path / "pace").write_text("0")
    output = ended(sweep, tmp_path, seconds=150)
    assert sweep.returncode == 0, output
    assert output.count("sweep output dir") == 2
    first, second, third = reasons(tmp_path)
    assert first[0].startswith("Interrupted: SIGUSR2: stopped")
    assert first[1].startswith("Interrupted: SIGTERM: stopped")
    assert second[0].startswith("Interrupted: SIGTERM: stopped")
    assert third[0].startswith("Interrupted: SIGUSR2: stopped")
    assert {lives[-1] for lives in outcomes(tmp_path)} == {"finished"}
    assert_equal(tmp_path, whole)


@pytest.mark.campaign
def test_the_recipe_of_an_array_is_queued_again(cluster: dict[str, str], whole: Path, tmp_path: Path) -> None:
    """Both runs of an array get the signal that Slurm sends near their time limit; nobody starts them again."""
    (tmp_path / "pace").write_text("0.5")
    (log := tmp_path / "log").touch()
    environment = {
        **os.environ,
        **cluster,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{USER}",
        "OMP_NUM_THREADS": "1",
        "PACE": f"{tmp_path}/pace",
    }

    def slurm(*command: str) -> str:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, timeout=300, capture_output=True, text=True
        )
        return done.stdout

    overrides = [word for word in SWEEP if word != "-m"]
    recipe = str(ROOT / "docs/recipes/slurm_array.sh")
    options = ("--parsable", "--array=1-3", f"--output={log}")
    job = slurm("sbatch", *options, recipe, *overrides, f"run.root={tmp_path}/runs").strip()

    def finished() -> bool:
        return len([*tmp_path.glob("runs/smoke/*/result.json")]) == len(SEEDS)

    try:
        until(lambda: at_work(tmp_path, above=1), log=log)
        slurm("scancel", "--signal=USR1", job)
        until(lambda: any(len(lives) > 1 for lives in outcomes(tmp_path)), log=log)
        (tmp_path / "pace").write_text("0")
        until(finished, log=log)
    finally:
        slurm("scancel", job)
    assert any(reason.startswith("Interrupted: SIGUSR1: stopped") for each in reasons(tmp_path) for reason in each)
    assert_equal(tmp_path, whole)

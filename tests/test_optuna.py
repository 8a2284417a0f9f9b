"""Studies that are killed anywhere and run again: the same trials, parameters and values to the bit."""

import json
import signal
import sqlite3
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from marks import quick_first, slow

from runner.config.identity import value_digest
from runner.storage.local import LocalLocation

pytestmark = pytest.mark.skipif(
    find_spec("optuna") is None or find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="needs hydra-optuna-sweeper: pip install -c constraints.txt 'hydra-runner[optuna]'",
)

SHORT = ("trainer.max_steps=12", "trainer.evaluate_every_steps=6", "checkpoint.every_steps=4")
STUDY = (
    "-m",
    "experiment=smoke",
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=3",
    "hydra.sweeper.sampler.n_startup_trials=1",  # the others know what came before
    "optimizer.lr=tag(log,interval(1e-4,1e-1))",
    "optimizer.weight_decay=interval(0.0,0.1)",
    *SHORT,
)

Trials = list[dict[str, Any]]


def trials(database: Path) -> Trials:
    """All trials of a database with one study, in order."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT trial_id, state, value FROM trials LEFT JOIN trial_values USING (trial_id)")
        result = []
        for trial, state, value in rows.fetchall():
            query = "SELECT param_name, param_value FROM trial_params WHERE trial_id=?"
            result.append({"state": state, "value": value, **dict(connection.execute(query, (trial,)))})
    connection.close()
    return result


def objective(run: Path) -> float:
    """The stored objective of a finished run."""
    value: float = json.loads((run / "result.json").read_text())["objective"]["value"]
    return value


@pytest.fixture(scope="module")
def undisturbed(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trials]:
    """The trials of a study that nobody killed."""
    cache: dict[tuple[str, ...], Trials] = {}

    def find(*options: str) -> Trials:
        if options not in cache:
            root = tmp_path_factory.mktemp("undisturbed")
            ended = life(*STUDY, *options, f"run.root={root}")
            assert ended.status == 0, ended.output
            cache[options] = trials(root / "smoke/optuna.sqlite3")
        return cache[options]

    return find


COMMITS = (1, 7, 20, 22, 31, 33)  # the study is made; trials are drawn and told


@pytest.mark.parametrize(
    ("jobs", "kills"),
    [
        (1, [{"commit": 22}]),
        slow(1, [{"operation": 20}, *({"commit": number} for number in COMMITS)]),
        slow(2, [{"operation": 60}, {"commit": 38}]),
    ],
)
def test_a_killed_study_resumes_to_the_undisturbed_study(
    jobs: int, kills: list[dict[str, int]], life: Lives, undisturbed: Callable[..., Trials], tmp_path: Path
) -> None:
    command = (*STUDY, f"hydra.sweeper.n_jobs={jobs}", f"run.root={tmp_path}")
    for kill in kills:
        ended = life(*command, **kill)
        assert ended.status is None, ended.output
    ended = life(*command)
    assert ended.status == 0, ended.output
    study = trials(tmp_path / "smoke/optuna.sqlite3")
    assert study == undisturbed(f"hydra.sweeper.n_jobs={jobs}")
    assert [trial["state"] for trial in study] == ["COMPLETE"] * 3
    assert len(list(tmp_path.glob("smoke/*/run.json"))) == len({trial["optimizer.lr"] for trial in study}) == 3


def test_a_study_has_the_values_of_single_runs_and_the_best(
    life: Lives, undisturbed: Callable[..., Trials], tmp_path: Path
) -> None:
    best = max(undisturbed("hydra.sweeper.n_jobs=1"), key=lambda trial: trial["value"])
    parameters = [f"{key}={best[key]}" for key in best if key.startswith("optimizer.")]
    assert life("experiment=smoke", *parameters, *SHORT, f"run.root={tmp_path}", "run.name=r").status == 0
    assert objective(tmp_path / "smoke/r") == best["value"]
    study = life(*STUDY, f"run.root={tmp_path}")
    assert f"best     val/accuracy {best['value']}, trial " in study.output
    again = life(*STUDY, f"run.root={tmp_path}")
    assert again.status == 0
    assert "3 of 3 trials done" in again.output
    assert "Launching" not in again.output
    assert f"best     val/accuracy {best['value']}, trial " in again.output
    assert life(*STUDY, f"run.root={tmp_path}", "hydra.sweeper.n_trials=4").status == 0
    assert len(trials(tmp_path / "smoke/optuna.sqlite3")) == 4


@pytest.mark.slow
def test_an_interrupted_trial_is_not_a_failure(life: Lives, undisturbed: Callable[..., Trials], tmp_path: Path) -> None:
    command = (*STUDY, "hydra.sweeper.n_jobs=1", f"run.root={tmp_path}")
    ended = life(*command, commit=40, send=signal.SIGTERM)
    assert ended.status == 75, ended.output
    assert {trial["state"] for trial in trials(tmp_path / "smoke/optuna.sqlite3")} == {"COMPLETE", "RUNNING"}
    assert life(*command).status == 0
    assert trials(tmp_path / "smoke/optuna.sqlite3") == undisturbed("hydra.sweeper.n_jobs=1")


@pytest.mark.slow
def test_a_failing_trial_is_reported_and_the_sweep_goes_on(life: Lives, tmp_path: Path) -> None:
    command = (*STUDY[:3], *SHORT, "optimizer=sgd", f"run.root={tmp_path}", "hydra.sweeper.n_trials=6", "seed=1")
    ended = life(*command, "optimizer.lr=-1,0.01,1e30")  # refused by the optimizer; works; diverges
    assert ended.status == 2, ended.output
    study = trials(tmp_path / "smoke/optuna.sqlite3")
    assert {(trial["optimizer.lr"], trial["state"]) for trial in study} == {(0, "FAIL"), (1, "COMPLETE"), (2, "FAIL")}
    assert {trial["value"] for trial in study} == {None, objective(next(tmp_path.glob("smoke/*lr=0.01*")))}
    assert "6 of 6 trials done" in life(*command, "optimizer.lr=-1,0.01,1e30").output

    ended = life(*command, "optimizer.lr=-1,-2", "hydra.sweeper.n_jobs=6")
    assert ended.status == 1
    assert ended.output.count("Launching 1 jobs locally") == 2, "six trials, two runs"
    assert "none of the 6 trials of study" in ended.output


def test_a_trial_of_a_failed_run_is_reported_with_its_cause(life: Lives, tmp_path: Path) -> None:
    command = (*STUDY[:3], *SHORT, f"run.root={tmp_path}", "hydra.sweeper.n_trials=1", "optimizer.lr=choice(-1)")
    assert life(*command).status == 1
    ended = life(*command, "hydra.sweeper.study_name=mine", "sweep.retry_failed=false")
    assert "Failed experiment: ConfigError: optimizer: " in ended.output


@pytest.mark.slow
def test_a_trial_of_another_search_space_is_closed(life: Lives, tmp_path: Path) -> None:
    command = (*STUDY[:4], *SHORT, f"run.root={tmp_path}", "hydra.sweeper.study_name=mine")
    ended = life(*command, "optimizer.lrr=interval(1e-4,1e-1)")
    assert "Key 'lrr' is not in struct" in ended.output
    assert life(*command, "optimizer.lr=interval(1e-4,1e-1)").status == 0
    states = [trial["state"] for trial in trials(tmp_path / "smoke/optuna.sqlite3")]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]


MISTAKES = {
    "contradiction": (
        ("hydra.sweeper.direction=minimize",),
        "direction=minimize contradicts objective.mode=max of val/",
    ),
    "no objective": (("objective.metric=null",), "set objective.metric"),
    "remote root": (("run.root=memory://x",), "set hydra.sweeper.storage to, for example, sqlite:"),
    "no such sampler": (("hydra/sweeper/sampler=tppe",), "no such sampler"),
    "grid": (("hydra/sweeper/sampler=grid",), "A grid is no study"),
    "grid by glob": (("optimizer.weight_decay=glob(*)",), "glob() cannot"),
    "interval upside down": (("optimizer.weight_decay=interval(1,0)",), "not a search space of a study: "),
    "no jobs": (("hydra.sweeper.n_jobs=0",), "hydra.sweeper.n_jobs=0 is too small: at least 1"),
    "no database": (("hydra.sweeper.storage=sqlite:////no/where",), "hydra.sweeper.storage=sqlite:////no/where cannot"),
    "two directions": (("hydra.sweeper.direction=[minimize,maximize]",), "a run has one objective. Leave the"),
    "one name": (("run.name=same",), "all trials would be the run run.name=same"),
    "its password": (("hydra.sweeper.storage=none://me:secret@host/x",), "hydra.sweeper.storage looks like a secret"),
}


@pytest.mark.parametrize(
    "name",
    quick_first(MISTAKES, "contradiction", "no such sampler", "interval upside down", "one name", "its password"),
)
def test_mistakes_are_reported(name: str, life: Lives, tmp_path: Path) -> None:
    options, message = MISTAKES[name]
    ended = life(*STUDY[:3], "optimizer.lr=0.1,0.2", f"run.root={tmp_path}", *options)
    assert ended.status == 2, ended.output
    assert message in ended.output
    assert "Traceback" not in ended.output


def test_a_study_is_of_one_direction(life: Lives, tmp_path: Path) -> None:
    command = (*STUDY, f"run.root={tmp_path}", "hydra.sweeper.study_name=mine", "hydra.sweeper.n_trials=1")
    assert life(*command).status == 0
    ended = life(*command, "objective.mode=min")
    assert ended.status == 2, ended.output
    assert "Choose another hydra.sweeper.study_name" in ended.output


def test_a_study_is_of_one_process(life: Lives, tmp_path: Path) -> None:
    command = (*STUDY, f"run.root={tmp_path}", "hydra.sweeper.study_name=mine", "hydra.sweeper.n_trials=1")
    lock = LocalLocation(tmp_path / "smoke").lock(f"optuna-{value_digest('mine')}.lock")
    assert lock
    ended = life(*command)
    assert (ended.status, "another process works on it" in ended.output) == (4, True), ended.output
    lock.release()
    assert life(*command).status == 0


@pytest.mark.slow
def test_a_study_is_of_one_kind_of_search_for_each_key(life: Lives, tmp_path: Path) -> None:
    command = (*STUDY[:4], *SHORT, f"run.root={tmp_path}", "hydra.sweeper.study_name=mine")
    assert life(*command, "optimizer.lr=0.1,0.2").status == 0
    ended = life(*command, "optimizer.lr=0.1,0.2,0.3", "hydra.sweeper.n_trials=4")
    assert (ended.status, "Traceback" in ended.output) == (2, False), ended.output
    assert "has searched optimizer.lr in CategoricalDistribution(choices=(0.1, 0.2)), this command" in ended.output


def test_a_study_is_of_one_set_of_keys(life: Lives, tmp_path: Path) -> None:
    command = (*STUDY[:4], *SHORT, f"run.root={tmp_path}", "hydra.sweeper.study_name=mine")
    assert life(*command, "optimizer.lr=0.1,0.2", "hydra.sweeper.n_trials=1").status == 0
    for space in (("optimizer.weight_decay=0.1,0.2",), ("optimizer.lr=0.1,0.2", "optimizer.weight_decay=0.1,0.2")):
        ended = life(*command, *space)
        assert (ended.status, "Traceback" in ended.output) == (2, False), ended.output
        assert "study mine has searched optimizer.lr, this command does optimizer." in ended.output
    assert len(trials(tmp_path / "smoke/optuna.sqlite3")) == 1

"""New, resumable, complete, in use; drift refused, accepted, forked; the same directory for the same command."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lives import Lives
from marks import slow
from results import metric_lines, results
from waiting import until

from runner.__main__ import report_error
from runner.checkpoint.store import CheckpointStore
from runner.runs.__main__ import main
from runner.storage.local import LocalLocation

USER = Path(__file__).parent / "user"

COMMAND = ("experiment=smoke", "trainer.max_steps=30", "checkpoint.every_steps=10", "runtime.num_threads=1")


def test_a_finished_run_prints_its_result_and_writes_nothing(life: Lives, tmp_path: Path) -> None:
    """Nor does it import torch."""
    assert life(*COMMAND, f"run.root={tmp_path}").status == 0
    (run,) = (tmp_path / "smoke").iterdir()
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and ".hydra" not in path.parts}
    again = life(*COMMAND, f"run.root={tmp_path}")
    assert again.status == 0
    assert "finished step 30 (max_steps), val/loss" in again.output
    assert "attempt" not in again.output
    log = run / "runner.log"
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items() if path != log)
    code = "import sys; from runner.__main__ import main; assert main() == 0; "
    code += "assert not {'torch', 'optuna'} & {*sys.modules}"
    command = [sys.executable, "-c", code, *COMMAND, f"run.root={tmp_path}"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_only_identity_overrides_name_the_directory(life: Lives, tmp_path: Path) -> None:
    first = life(
        *COMMAND, f"run.root={tmp_path}", "optimizer.lr=1e-2", "runtime.num_workers=1", "checkpoint.keep_last=3"
    )
    again = life(*COMMAND, f"run.root={tmp_path}", "optimizer.lr=0.010")
    assert (first.status, again.status) == (0, 0)
    assert [path.name for path in (tmp_path / "smoke").iterdir()] == ["optimizer.lr=0.01,trainer.max_steps=30"]


def test_a_number_written_as_another_type_is_the_same_run(
    life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert life(*COMMAND, f"run.root={tmp_path}", "task.label_smoothing=0").status == 0
    again = life(*COMMAND, f"run.root={tmp_path}", "task.label_smoothing=0.0")
    assert (again.status, "attempt" in again.output) == (0, False), again.output
    assert main(["list", str(tmp_path)]) == 0
    assert " complete " in capsys.readouterr().out


def test_a_sweep_skips_single_runs_that_are_finished(life: Lives, tmp_path: Path) -> None:
    assert life(*COMMAND, f"run.root={tmp_path}", "seed=2").status == 0
    swept = life("-m", *COMMAND, f"run.root={tmp_path}", "seed=1,2")
    assert swept.status == 0, swept.output
    assert swept.output.count("from scratch") == 1
    folders = sorted(path.name for path in (tmp_path / "smoke").iterdir() if path.is_dir())
    assert folders == ["seed=1,trainer.max_steps=30", "seed=2,trainer.max_steps=30"]


def test_a_sweep_may_go_over_experiments(life: Lives, tmp_path: Path) -> None:
    ended = life("-m", "experiment=smoke,digits", "trainer.max_steps=1", f"run.root={tmp_path}")
    assert ended.status == 0, ended.output
    assert len([*tmp_path.glob("smoke/*/result.json"), *tmp_path.glob("digits/*/result.json")]) == 2


def test_drift_is_refused_with_a_table_and_the_remedies(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, step=15).status is None
    ended = life(*command, "optimizer.lr=0.5", "optimizer.weight_decay=0")
    assert ended.status == 3
    for line in (
        "optimizer.lr            0.001    0.5",
        "optimizer.weight_decay  0.01     0",
        "run.on_drift=accept",
        "run.on_drift=fork",
    ):
        assert line in ended.output
    assert life(*command).status == 0, "the run was left as it was"


def test_another_order_of_samples_has_no_remedy_that_fails(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, step=15).status is None
    ended = life(*command, "seed=5")
    assert ended.status == 3
    assert "it cannot continue with another seed" in ended.output
    assert "run.on_drift" not in ended.output
    assert "run.name=r-2" in ended.output


def test_the_value_of_an_environment_variable_is_not_stored(life: Lives, tmp_path: Path) -> None:
    override = "+run.storage_options.secret=${oc.env:PATH}"
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r", override)
    assert life(*command, step=15).status is None
    ended = life(*command, "optimizer.lr=0.5")
    assert f"'{override}'" in ended.output
    assert os.environ["PATH"] not in ended.output
    files = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert any(override in text for text in files)
    assert not [text for text in files if os.environ["PATH"] in text]


def test_remedies_for_drift_name_the_users_configurations(life: Lives, tmp_path: Path) -> None:
    experiment = tmp_path / "conf/experiment/mine.yaml"
    experiment.parent.mkdir(parents=True)
    smoke = (Path(__file__).parent.parent / "conf/experiment/smoke.yaml").read_text()
    for steps in (2, 3):
        experiment.write_text(smoke.replace("max_steps: 60", f"max_steps: {steps}"))
        ended = life("--config-dir", "conf", "experiment=mine", f"run.root={tmp_path}", cwd=tmp_path)
    assert ended.status == 3
    assert ended.output.count(" -m runner --config-dir=conf ") == 3


def test_accepted_drift_leaves_moments_in_their_type(life: Lives, tmp_path: Path) -> None:
    """Which is not that of the weights. Beside it, what a single process makes of settings for several."""
    command = ("--config-dir", f"{USER}/conf", "experiment=odd", "checkpoint.every_steps=1", f"run.root={tmp_path}")
    assert life(*command, "run.name=r", cwd=USER, step=6).status is None
    ended = life(*command, "run.name=r", "optimizer.lr=0.02", "run.on_drift=accept", "runtime.parallel=ddp", cwd=USER)
    assert ended.status == 0, ended.output
    assert "runtime.parallel and runtime.shard need several processes" in ended.output
    store = CheckpointStore(LocalLocation(tmp_path / "odd/r"))
    state = store.open(store.commits()[0]).load("optimizer")["state"]
    assert {moments["moments"][0].dtype for moments in state.values()} == {torch.float64}


def test_accepted_drift_goes_on_with_the_new_settings(life: Lives, tmp_path: Path) -> None:
    """A longer run with another rate: position and moments go on, rate and schedule are the new ones."""
    command = (*COMMAND, "scheduler=warmup_cosine", "scheduler.warmup_steps=3", f"run.root={tmp_path}", "run.name=r")
    assert life(*command).status == 0
    longer = (*command, "trainer.max_steps=50", "optimizer.lr=0.01")
    assert life(*longer).status == 3
    # Killed before its first checkpoint: the acceptance is on record, and the old settings do not come back.
    assert life(*longer, "run.on_drift=accept", step=35).status is None
    ended = life(*longer)
    assert ended.status == 0, ended.output
    assert "resumed from step 30" in ended.output
    fresh = life(*longer[:-2], "trainer.max_steps=50", "optimizer.lr=0.01", "run.name=fresh")
    assert fresh.status == 0
    rates = [
        {line["step"]: line["train/lr"] for line in metric_lines(tmp_path / "smoke" / name) if "train/lr" in line}
        for name in ("r", "fresh")
    ]
    assert rates[0][20] != rates[1][20]
    assert {step: rates[0][step] for step in (40, 50)} == {step: rates[1][step] for step in (40, 50)}
    assert life(*longer).output.startswith("finished step 50")


def test_a_fork_begins_from_its_parent_and_leaves_it_alone(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command).status == 0
    before = results(tmp_path / "smoke/r")
    forked = (*command, "trainer.max_steps=50", "run.on_drift=fork")
    assert life(*forked, step=45).status is None
    ended = life(*forked)
    assert (ended.status, "resumed from step 40 of attempt 1" in ended.output) == (0, True), ended.output
    assert not results(tmp_path / "smoke/r").differences(before)
    (fork,) = (path for path in (tmp_path / "smoke").iterdir() if path.name != "r")
    parent = json.loads((fork / "run.json").read_text())["parent"]
    assert (parent["run"], parent["step"], parent["inherit"]) == (str(tmp_path / "smoke/r"), 30, "all")
    assert [line["step"] for line in metric_lines(fork)] == [40, 50]


def test_two_processes_do_not_train_the_same_run(life: Lives, tmp_path: Path) -> None:
    """The second is told who has it, and to wait; when the first is killed it continues at once."""
    command = ("experiment=smoke", "trainer.max_steps=100000", f"run.root={tmp_path}", "run.name=r")
    with life.start(*command) as first:
        until(lambda: [*tmp_path.glob("smoke/r/commits/*")])
        second = life(*command)
        assert second.status == 4
        assert f"is in use by attempt 1 (pid {first.pid}" in second.output
        assert "run.on_conflict=wait" in second.output
    third = life(*command, when=f"{tmp_path}/smoke/r/commits/a000002-*", send=signal.SIGTERM)
    assert (third.status, "attempt  2, resumed from step" in third.output) == (75, True), third.output


def test_a_stolen_run_stops_its_former_owner(life: Lives, tmp_path: Path) -> None:
    command = ("experiment=smoke", "trainer.max_steps=100000", f"run.root={tmp_path}", "run.name=r")
    with life.start(*command) as first:
        until(lambda: [*tmp_path.glob("smoke/r/commits/*")])
        with life.start(*command, "run.on_conflict=steal") as thief:
            assert first.wait().status == 4, first.output
            thief.send(signal.SIGTERM)
            assert thief.wait().status == 75, thief.output
    assert "attempt 2 (pid" in first.output
    assert "took over" in first.output


def test_waiting_for_a_run_ends_when_it_is_free(life: Lives, tmp_path: Path) -> None:
    command = ("experiment=smoke", "trainer.max_steps=20", f"run.root={tmp_path}", "run.name=r")
    command = (*command, "task._target_=mine.tasks.Slow")
    (tmp_path / "pace").write_text("0.1")
    environment = {"PACE": f"{tmp_path}/pace"}
    with life.start(*command, cwd=USER, environment=environment) as first:
        until(lambda: [*tmp_path.glob("smoke/r/attempts/*.lock")])
        with life.start(*command, "run.on_conflict=wait", cwd=USER, environment=environment) as second:
            until(lambda: "on_conflict=wait" in (tmp_path / "smoke/r/.hydra/overrides.yaml").read_text())
            assert first.wait().status == 0, first.output
            assert second.wait().status == 0, second.output
    assert "finished step 20" in second.output
    assert "attempt  2" not in second.output


def test_of_many_commands_that_wait_each_goes_on_waiting(life: Lives, tmp_path: Path) -> None:
    """The run is free for each of them when it looks, and has another owner when it claims."""
    waits = (*COMMAND, f"run.root={tmp_path}", "run.name=r", "run.on_conflict=wait")
    code = """
import os, time, types
from pathlib import Path
from runner import app
imported, here = app._import_experiment, Path.cwd()
def together():
    (here / f"ready-{os.getpid()}").touch()
    while len([*here.glob("ready-*")]) < 3:
        time.sleep(0.01)
    return imported()
app._import_experiment = together
"""
    (tmp_path / "together.py").write_text(code)
    started = [life.start(*waits, "imports=[together]", cwd=tmp_path) for _ in range(3)]
    ended = [process.wait() for process in started]
    assert [each.status for each in ended] == [0, 0, 0], [each.output for each in ended]
    assert sum("attempt  1" in each.output for each in ended) == 1


@pytest.mark.slow
def test_a_run_finished_before_its_claim_is_not_begun_again(tmp_path: Path) -> None:
    """Both found it unfinished; the slower one takes the result, and leaves no attempt."""
    code = """
import subprocess, sys
from runner.runs.__main__ import main
from runner.__main__ import main
from runner import app
opened = app.open_run
def slowly(job):
    found = opened(job)
    if found.result is None:
        subprocess.run([sys.executable, "-m", "runner", *sys.argv[1:]], check=True, capture_output=True)
    return found
app.open_run = slowly
sys.exit(main())
"""
    command = [sys.executable, "-c", code, *COMMAND, f"run.root={tmp_path}", "run.name=r"]
    slower = subprocess.run(command, capture_output=True, text=True, check=True)
    assert slower.stdout.startswith("finished step 30 (max_steps), val/loss"), slower.stdout
    assert len([*(tmp_path / "smoke/r/attempts").glob("*.end.json")]) == 1
    assert len([*(tmp_path / "smoke/r/attempts").iterdir()]) <= 5  # claim, lock, beat, code, end


@pytest.mark.parametrize("operation", [slow(30), 60, slow(90)])
def test_a_full_disk_loses_nothing(operation: int, life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}")
    assert life(*command, "run.name=whole").status == 0
    ended = life(*command, "run.name=full", "checkpoint.max_unsaved=0", operation=operation, fail=errno.ENOSPC)
    assert ended.status == 1
    assert "No space left on device" in ended.output
    assert "Traceback" not in ended.output
    assert life(*command, "run.name=full").status == 0
    assert not results(tmp_path / "smoke/full").differences(results(tmp_path / "smoke/whole"))


def test_a_limit_of_the_size_of_files_ends_the_run(life: Lives, tmp_path: Path) -> None:
    """No other try could succeed: `ulimit -f` is the process's own."""
    code = (
        "import os, resource; limit = int(os.environ['LIMIT']); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))"
    )
    (tmp_path / "limits.py").write_text(code)
    command = (*COMMAND, "imports=[limits]", f"run.root={tmp_path}")
    assert life(*command, "run.name=whole", cwd=tmp_path, environment={"LIMIT": "-1"}).status == 0
    ended = life(*command, "run.name=small", "checkpoint.max_unsaved=20", cwd=tmp_path, environment={"LIMIT": "60000"})
    assert "It is tried again" not in ended.output
    assert ended.status == 1, ended.output
    assert "could not be written: cannot write" in ended.output
    assert "File too large (see ulimit -f).\nNo step is saved; fix the storage and run the same" in ended.output
    assert life(*command, "run.name=small", cwd=tmp_path, environment={"LIMIT": "-1"}).status == 0
    assert not results(tmp_path / "smoke/small").differences(results(tmp_path / "smoke/whole"))


def test_a_disk_that_is_full_before_the_run_begins_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == 1
    assert capsys.readouterr().err == (
        "cannot make the run directory: No space left on device. Choose another run.root.\n"
    )


def test_a_run_that_cannot_be_written_is_not_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").touch()
    file = str(tmp_path / ".hydra/config.yaml")
    assert report_error(OSError(errno.EROFS, os.strerror(errno.EROFS), file)) == 1
    problem = f"cannot write to the run directory {file}: Read-only file system."
    remedy = f"`python -m runner.runs show {tmp_path}` shows the run and writes nothing."
    assert capsys.readouterr().err == f"{problem} {remedy}\n"


def test_many_starters_at_once_make_one_lineage(life: Lives, tmp_path: Path) -> None:
    """One wins; the others leave with 4, or find the run finished."""
    started = [life.start(*COMMAND, f"run.root={tmp_path}", "run.name=r") for _ in range(4)]
    statuses = [process.wait().status for process in started]
    assert set(statuses) <= {0, 4}
    assert 0 in statuses
    assert life(*COMMAND, f"run.root={tmp_path}", "run.name=whole").status == 0
    assert not results(tmp_path / "smoke/r").differences(results(tmp_path / "smoke/whole"))


def test_a_resume_on_another_topology_goes_on_and_says_so(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, step=15).status is None
    same, compiled = life(*command, step=25), life(*command, "runtime.compile=true", restored=True)
    assert (same.status, "moved" in same.output, compiled.status) == (None, False, None)
    moved = life(*command, "runtime.num_threads=2")
    assert moved.status == 0
    assert (
        "moved    threads 1 -> 2, compiled True -> False: same samples, but floats may differ in the last bits"
        in moved.output
    )


def test_a_limit_in_seconds_holds_over_all_attempts(life: Lives, tmp_path: Path) -> None:
    """A step takes a fifth of a second at least, so that 4 s are not enough for more than 20 and the one at the end."""
    command = ("experiment=smoke", "trainer.max_steps=null", "trainer.max_seconds=4", "checkpoint.every_steps=1")
    command = (*command, "task._target_=mine.tasks.Slow", "trainer.evaluate_every_steps=100", f"run.root={tmp_path}")
    (tmp_path / "pace").write_text("0.2")
    environment = {"PACE": f"{tmp_path}/pace"}
    for step in (3, 6):
        assert life(*command, cwd=USER, environment=environment, step=step).status is None
    ended = life(*command, cwd=USER, environment=environment)
    assert (ended.status, "(max_seconds)" in ended.output) == (0, True), ended.output
    (path,) = tmp_path.glob("smoke/*/result.json")
    result = json.loads(path.read_text())
    assert result["seconds"] >= 4
    assert result["step"] <= 21


@pytest.mark.slow
def test_digits_are_learnt(life: Lives, tmp_path: Path) -> None:
    ended = life("experiment=digits", "trainer.max_steps=400", f"run.root={tmp_path}", "run.name=r")
    result = json.loads((tmp_path / "digits/r/result.json").read_text())
    assert ended.status == 0
    assert result["metrics"]["val/accuracy"] > 0.97


def test_the_language_model_shows_its_samples(life: Lives, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny = (
        "model.width=32",
        "model.layers=1",
        "data.validation.limit=32",
        "task.sample_bytes=20",
        "task.prompt=import",
    )
    steps = (
        "trainer.max_steps=4",
        "trainer.evaluate_every_steps=2",
        f"data.train.path={os.path.dirname(json.__file__)}",
    )
    assert life("experiment=gpt", *tiny, *steps, f"run.root={tmp_path}", "run.name=r").status == 0
    events = EventAccumulator(str(tmp_path / "gpt/r/tensorboard"), size_guidance={"tensors": 0}).Reload()
    texts = events.Tensors("val/sample/text_summary")
    assert [event.step for event in texts] == [2, 4]
    assert texts[0].tensor_proto.string_val[0].decode().startswith("```\nimport")
    assert "val/bits_per_byte" in events.Tags()["scalars"]

"""Runs that an earlier version began or finished: see ``earlier.py``, which made them."""

import json
from pathlib import Path

import earlier
import pytest
import torch
from lives import Lives
from results import results

from runner.runs.__main__ import main


def train(life: Lives, experiment: str, root: Path, name: str) -> str:
    """Run the command of the earlier runs to the end with this version; what it printed."""
    ended = life(*earlier.command(experiment, root, name), cwd=earlier.USER)
    assert ended.status == 0, ended.output
    return ended.output


@pytest.mark.parametrize("experiment", earlier.ARCHIVES)
def test_a_run_of_an_earlier_version_is_resumed(life: Lives, tmp_path: Path, experiment: str) -> None:
    """To the bit of a run that this version trains from scratch, and of one that the earlier version finished."""
    earlier.extract(experiment, tmp_path)
    assert "attempt  2, resumed from step 9 of attempt 1" in train(life, experiment, tmp_path, "cut")
    train(life, experiment, tmp_path, "scratch")
    resumed = results(tmp_path / experiment / "cut")
    references = [results(tmp_path / experiment / name) for name in ("scratch", "finished")]
    of_torch = set() if torch.__version__.startswith(earlier.TORCH) else {"parts"}
    assert not [*filter(None, ({*resumed.differences(other)} - of_torch for other in references))]


def test_a_finished_run_of_an_earlier_version_is_left_alone(life: Lives, tmp_path: Path) -> None:
    earlier.extract("exact", tmp_path)
    folder = tmp_path / "exact/finished"
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".hydra"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.suffix != ".log"}
    assert "finished" in train(life, "exact", tmp_path, "finished")
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}


def test_commands_read_runs_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier.extract("exact", tmp_path)
    assert main(["list", str(tmp_path), "--json"]) == 0
    cut, finished = json.loads(capsys.readouterr().out)
    assert (cut["run"], cut["step"], cut["max_steps"]) == ("exact/cut", 9, 12)
    assert (finished["status"], finished["objective"]) == ("complete", -29.07231593132019)
    for name, samples in (("cut", 36), ("finished", 48)):
        folder = str(tmp_path / "exact" / name)
        assert main(["show", folder, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["checkpoints"][0]["step"] == (9 if name == "cut" else 12)
        assert main(["audit", folder]) == 0
        assert f"{samples} samples, 1 attempt\n" in capsys.readouterr().out


def test_rollouts_of_an_earlier_version_are_audited(
    life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after this version goes on with the run: what waits in its queue is in the checkpoint."""
    earlier.extract("programs", tmp_path)
    folder = str(tmp_path / "programs/cut")
    assert main(["audit", folder]) == 0
    assert "of 18 samples trained, each 1 times; of 9 dropped; of 9 waiting" in capsys.readouterr().out
    train(life, "programs", tmp_path, "cut")
    assert main(["audit", folder]) == 0
    assert "of 24 samples trained, each 1 times; of 12 dropped; of 12 waiting" in capsys.readouterr().out

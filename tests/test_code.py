"""What code a run was made with: its record, and the edit that a resume reports or refuses."""

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from marks import slow

from runner.config.secrets import hide_secrets
from runner.run import code
from runner.run.code import CodeRecord
from runner.runs.__main__ import main
from runner.storage import open_location

MODULE = """
from torch.nn.functional import cross_entropy, nll_loss
from runner.task import Task

class Mine(Task):
    def __init__(self, label_smoothing):
        pass

    def training_step(self, model, batch):
        inputs, labels = batch
        return {"loss": cross_entropy(model(inputs), labels)}
"""
EDITED = MODULE.replace("cross_entropy(model(inputs), labels)", "cross_entropy(2 * model(inputs), labels)")
COMMAND = ("experiment=smoke", "task._target_=edited.mine.Mine", "objective.metric=null", "run.name=r")
SECRET = "hunter2-or-so"


def program(folder: Path, text: str = MODULE) -> Path:
    (folder / "edited").mkdir(parents=True, exist_ok=True)
    (folder / "edited/__init__.py").touch()
    (folder / "edited/mine.py").write_text(text)
    return folder


def git(folder: Path, *words: str) -> str:
    names = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def records(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("outputs/smoke/r/attempts/*.code.json"))
    return [json.loads(path.read_text()) for path in paths]


def test_a_resume_after_an_edit_names_the_file(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(tmp_path)
    first = life(*COMMAND, "checkpoint.every_steps=10", step=25, cwd=tmp_path)
    assert (first.status, "edited since" in first.output) == (None, False), first.output
    same = life(*COMMAND, "checkpoint.every_steps=10", step=35, cwd=tmp_path)
    assert (same.status, "edited since" in same.output) == (None, False), same.output
    assert len(records(tmp_path)) == 1, "the second attempt ran the same code"
    program(tmp_path, EDITED)
    refused = life(*COMMAND, "run.on_code_change=refuse", cwd=tmp_path)
    assert (refused.status, "Edited since: edited/mine.py.\n" in refused.output) == (3, True), refused.output
    ended = life(*COMMAND, cwd=tmp_path)
    assert ended.status == 0, ended.output
    assert "code     edited since the last attempt: edited/mine.py\n" in ended.output
    before, after = records(tmp_path)
    assert {name for name in after["files"] if before["files"][name] != after["files"][name]} == {"edited/mine.py"}
    assert before["packages"]["torch"] == version("torch")
    assert main(["show", str(tmp_path / "outputs/smoke/r"), "--code"]) == 0
    shown = capsys.readouterr().out
    assert next(line.split()[-1] for line in shown.splitlines() if "edited/mine.py" in line) == "edited/mine.py"
    assert f"torch={version('torch')}" in shown


def test_an_edit_is_accepted_silently_or_before_the_first_step(life: Lives, tmp_path: Path) -> None:
    program(tmp_path)
    assert life(*COMMAND, step=1, cwd=tmp_path).status is None
    program(tmp_path, EDITED)
    corrected = life(*COMMAND, "run.on_code_change=refuse", "checkpoint.every_steps=10", step=15, cwd=tmp_path)
    assert (corrected.status, "edited since" in corrected.output) == (None, False), corrected.output
    program(tmp_path)
    accepted = life(*COMMAND, "run.on_code_change=accept", cwd=tmp_path)
    assert (accepted.status, "edited since" in accepted.output) == (0, False), accepted.output


def test_two_runs_differ_in_their_code(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a", MODULE), ("b", EDITED)):
        program(tmp_path, text)
        assert life(*COMMAND[:-1], f"run.name={name}", "trainer.max_steps=1", cwd=tmp_path).status == 0
    runs = [str(tmp_path / f"outputs/smoke/{name}") for name in "ab"]
    assert main(["diff", *runs, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["code"]
    assert row["key"] == "file edited/mine.py"
    assert row["a"] != row["b"]


def test_commit_and_changes_of_the_repository_are_stored(life: Lives, tmp_path: Path) -> None:
    """Those of tracked files, and modules that git does not know yet; without secrets and notebooks."""
    program(tmp_path)
    for name in ("settings.py", "notebook.ipynb"):
        (tmp_path / name).write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "settings.py", "notebook.ipynb")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "settings.py").write_text(f"x = 2\nPASSWORD = '{SECRET}'\n")
    (tmp_path / "notebook.ipynb").write_text("x = 2\n")
    (tmp_path / "data.bin").write_bytes(b"untracked, and no module")
    state = git(tmp_path, "status", "--porcelain", "--ignored")
    assert life(*COMMAND, cwd=tmp_path).status == 0
    (record,) = records(tmp_path)
    assert record["commits"][str(tmp_path)] == git(tmp_path, "rev-parse", "HEAD").strip()
    diff = record["diffs"][str(tmp_path)]
    assert "+x = 2\n+PASSWORD = '***'\n" in diff
    assert "+++ b/edited/mine.py" in diff
    assert "ipynb" not in diff
    assert "data.bin" not in diff
    assert state in git(tmp_path, "status", "--porcelain", "--ignored")
    assert not [
        path for path in (tmp_path / "outputs").rglob("*") if path.is_file() and SECRET in path.read_text("latin1")
    ]


@pytest.mark.parametrize(
    "how", ["no git", *(slow(how) for how in ("no repository", "a repository without a commit", "git never answers"))]
)
def test_without_git_a_run_goes_on(how: str, life: Lives, tmp_path: Path) -> None:
    program(tmp_path)
    if how != "no repository":
        git(tmp_path, "init", "-q")
    (tmp_path / "bin").mkdir()
    if how == "git never answers":
        (tmp_path / "bin/git").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexec sleep 600\n")
        (tmp_path / "bin/git").chmod(0o755)
    path = {"no git": str(tmp_path / "bin"), "git never answers": f"{tmp_path}/bin:{os.environ['PATH']}"}
    ended = life(*COMMAND, cwd=tmp_path, environment={"PATH": path.get(how, os.environ["PATH"])})
    assert ended.status == 0, ended.output
    (record,) = records(tmp_path)
    assert record["files"]["edited/mine.py"]
    assert not record["commits"].get(str(tmp_path))
    assert (tmp_path / "asked").exists() == (how == "git never answers")


def test_a_large_change_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "large.txt").write_text("x\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "large.txt").write_text("y" * 5000 + "\n" + "0123456789\n" * 100_000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code, "GIT_SECONDS", 60.0)
    diff = code.running([]).diffs[str(tmp_path)]
    assert 200_000 < len(diff) < 300_000
    assert max(map(len, diff.splitlines())) < 1100
    assert diff.endswith("(cut off here)\n")


def test_a_record_of_a_stranger_is_read_as_texts(tmp_path: Path) -> None:
    location = open_location(str(tmp_path))
    for number, raw in enumerate((b"[]", b'{"files": [1], "packages": {"a": 1, "b": "2"}}', b"\xff"), 1):
        location.put(f"attempts/{number:06d}-aaaaaaaaaaaa.json", [b"{}"])
        location.put(f"attempts/{number:06d}-aaaaaaaaaaaa.code.json", [raw])
    read = [code.newest(location, below=number) for number in (1, 2, 3, 4)]
    assert read == [None, CodeRecord(), CodeRecord(packages={"b": "2"}), CodeRecord()]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('password: str = "abcdefgh"', 'password: str = "***"'),
        ("export AWS_SECRET_ACCESS_KEY=abc/def", "export AWS_SECRET_ACCESS_KEY=***"),
        ('{"api_key": "abc", "size": 3}', '{"api_key": "***", "size": 3}'),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END", "***----- *** -----END"),
        ("curl https://user:abc@host/", "curl https://***@host/"),
        ("x = 'ghp_abcdefghijklmnopqrstuvwxyz'", "x = '***'"),
    ],
)
def test_secrets_in_a_text_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    ["loss = cross_entropy(model(x), y)", "rows.sort(key=lambda row: row[1])", "tokens: list[int] = []", "x == token"],
)
def test_code_without_secrets_stays_as_it_is(text: str) -> None:
    assert hide_secrets(text) == text

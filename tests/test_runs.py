"""``python -m runner.runs``: what a person sees, and what a program reads."""

import json
from pathlib import Path

import pytest
from lives import Lives

from runner.runs.__main__ import main

COMMAND = ("experiment=smoke", "trainer.max_steps=30", "checkpoint.every_steps=10", "runtime.num_threads=1")


@pytest.fixture(scope="module")
def root(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and one that was killed twice."""
    root = tmp_path_factory.mktemp("root")
    assert life(*COMMAND, f"run.root={root}", "run.name=done").status == 0
    for step in (15, 25):
        assert life(*COMMAND, f"run.root={root}", "run.name=cut", step=step).status is None
    return root


def test_list_shows_every_run_in_a_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(root)]) == 0
    header, _, cut, done = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "status", "step", "max_steps", "objective", "attempts", "seen", "host"]
    assert cut.split()[:5] == ["smoke/cut", "killed", "20", "30", "2"] or cut.split()[:4] == [
        "smoke/cut",
        "killed",
        "20",
        "30",
    ]
    assert done.split()[:4] == ["smoke/done", "complete", "30", "30"]


def test_list_for_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(root), "--json"]) == 0
    cut, done = json.loads(capsys.readouterr().out)
    assert (cut["run"], cut["status"], cut["step"], cut["attempts"]) == ("smoke/cut", "killed", 20, 2)
    assert (done["status"], done["step"], done["objective"]) == ("complete", 30, pytest.approx(0.2, abs=0.2))


def test_show_tells_how_each_attempt_ended(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(root / "smoke/cut")]) == 0
    text = capsys.readouterr().out
    assert "status     killed" in text
    assert text.count("killed") == 3
    assert "a000001-s000000010" in text, "what the second attempt resumed from"
    assert main(["show", str(root / "smoke/cut"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [attempt["committed"] for attempt in found["attempts"]] == [10, 20]
    assert [checkpoint["step"] for checkpoint in found["checkpoints"]][:2] == [20, 10]
    assert found["identity"]["trainer"]["max_steps"] == 30


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 2
    assert main(["show", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert "no runs under" in text
    assert "is not a run directory: it has no run.json" in text


def test_what_an_attempt_wrote_reaches_the_terminal_escaped(
    life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert life(*COMMAND, f"run.root={tmp_path}", "run.name=r").status == 0
    claim = tmp_path / "smoke/r/attempts/000001.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"host": "\x1b[31mevil"}))
    main(["list", str(tmp_path)])
    main(["show", str(tmp_path / "smoke/r")])
    assert "\x1b" not in capsys.readouterr().out

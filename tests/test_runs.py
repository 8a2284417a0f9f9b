"""``python -m runner.runs``: what a person sees, and what a program reads."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from lives import Lives

from runner.runs import audit
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
    assert header.split() == ["run", "status", "step", "/", "max", "objective", "attempts", "age", "host"]
    host = socket.gethostname()
    assert re.fullmatch(rf"smoke/cut +killed +20 / 30 +2 +([0-9]+ (s|min) ago|now) +{host}", cut)
    assert re.fullmatch(rf"smoke/done +complete +30 / 30 +0\.[0-9]+ +1 +([0-9]+ (s|min) ago|now) +{host}", done)


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


def test_show_counts_the_steps_lost_by_each_kill(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(root / "smoke/cut"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["attempts"]
    assert 0 <= first["lost"] == first["step"] - 10 <= 5, "the kill came after step 15, the last beat before"
    assert second["lost"] is None, "nobody continued from there"
    assert found["overrides"][-2:] == [f"run.root={root}", "run.name=cut"]


def test_numbers_outside_json_are_texts(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infinite = ("task.label_smoothing=-inf", "model.hidden=[nan,inf]")
    assert life(*COMMAND, *infinite, f"run.root={tmp_path}", "run.name=r").status == 2
    assert main(["show", str(tmp_path / "smoke/r"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["identity"]
    assert (found["task"]["label_smoothing"], found["model"]["hidden"]) == ("-inf", ["nan", "inf"])


def test_show_tells_why_the_last_attempt_ended_in_full(
    life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert life(*COMMAND, f"run.root={tmp_path}", "run.name=bad", "model.hidden=[many]").status == 2
    assert main(["show", str(tmp_path / "smoke/bad")]) == 0
    assert "found element of type str" in capsys.readouterr().out.partition("why the last attempt ended\n")[2]


def test_show_tells_the_parent_of_a_run_and_its_accepted_drift(
    root: Path, life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = root / "smoke/done"
    command = (*COMMAND, f"run.root={tmp_path}", f"run.parent={parent}@20", "run.name=child", "run.on_drift=accept")
    assert life(*command).status == 0
    assert life(*command, "trainer.max_steps=40").status == 0
    assert main(["show", str(tmp_path / "smoke/child")]) == 0
    text = capsys.readouterr().out
    assert f"parent     weights of step 20 of {parent}" in text
    assert re.search(
        r"\noverrides +.*experiment=smoke .*run.name=child run.on_drift=accept trainer.max_steps=40\n", text
    )
    assert re.search(r"accepted changes\n *attempt.*\n.*\n *2 +trainer\.max_steps +30 +40\n", text)
    assert re.search(r"\nresult +step 40 \(max_steps\), val/loss [0-9.]+, val/accuracy [0-9.]+\n", text)


def test_diff_shows_only_differences(
    root: Path, life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("optimizer.lr=0.02", "+model.activation=null", "trainer.max_steps=3")
    assert life(*COMMAND, f"run.root={tmp_path}", "run.name=other", *other).status == 2, "the model has no such key"
    a, b = str(root / "smoke/done"), str(tmp_path / "smoke/other")
    assert main(["diff", a, b]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"\nmodel.activation +\(absent\) +null\noptimizer.lr +0.001 +0.02\ntrainer.max_steps +30 +3\n", text
    )
    assert re.search(r"\nstatus +complete +failed\nstep +30 +0", text)
    assert main(["diff", a, b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["configuration"][0] == {"key": "model.activation", "b": None}, "absent is not null"
    assert [each["key"] for each in found["configuration"]] == ["model.activation", "optimizer.lr", "trainer.max_steps"]
    assert {"metrics.val/loss", "objective.value"} <= {each["key"] for each in found["result"]}
    assert main(["diff", a, a]) == 0
    text = capsys.readouterr().out
    assert "The configurations do not differ." in text
    assert "The results do not differ." in text


def test_audit_proves_a_run_that_was_killed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(root / "smoke/cut")]) == 0
    text = capsys.readouterr().out
    assert "smoke/cut: 20 steps, 1280 samples, 2 attempts" in text
    assert "Done again after kills: 4 steps, 256 samples, 0 differing." in text
    assert "Every sample exactly once in every whole epoch." in text


def test_audit_for_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(root / "smoke/done"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"]
    assert found["epochs"] == [
        {"epoch": 0, "seen": 1437, "repeated": 0, "missed": 0, "whole": True, "substituted": 0},
        {"epoch": 1, "seen": 483, "repeated": 0, "missed": 0, "whole": False, "substituted": 0},
    ]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda line: "", "steps 12 to 12 are not in the ledger"),
        (lambda line: line.replace(line[-3:], "00\n"), "step 12 has other samples than the plan says"),
        (lambda line: line.replace("12 704 767", "12 640 703"), "positions 640 to 703 were trained again in step 12"),
    ],
)
def test_audit_finds_repeated_and_missed_samples(
    damage: Callable[[str], str], told: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "smoke/done", tmp_path / "run")
    (path,) = (tmp_path / "run/ledger").glob("s*.txt")
    lines = path.read_text().splitlines(keepends=True)
    lines[12] = damage(lines[12])
    path.write_text("".join(lines))
    assert main(["audit", str(tmp_path / "run")]) == 1
    assert told in capsys.readouterr().out


def test_audit_shows_epochs_that_are_alike_as_one_row() -> None:
    """Thousands of epochs are read by programs; a person wants to see the one that is not like the others."""
    rows = [{"epoch": n, "seen": 9 - (n == 5), "repeated": 0, "missed": int(n == 5), "whole": True} for n in range(8)]
    found = {"run": "r", "steps": 8, "positions": 71, "attempts": 1, "indexed": True, "weighted": False, "epochs": rows}
    text = audit.format_audit(
        {**found, "again": {"steps": 0, "positions": 0, "differing": 0}, "damaged": [], "problems": []}
    )
    assert [line.split()[:-1] for line in text.splitlines()[4:7]] == [
        ["0", "to", "4", "9", "0", "0"],
        ["5", "8", "0", "1"],
        ["6", "to", "7", "9", "0", "0"],
    ]


def test_audit_claims_no_whole_epoch_where_none_is() -> None:
    row = {"epoch": 0, "seen": 8, "repeated": 0, "missed": 0, "whole": False, "substituted": 0}
    found = {"run": "r", "steps": 2, "positions": 8, "attempts": 1, "indexed": True, "weighted": False, "epochs": [row]}
    again = {"steps": 0, "positions": 0, "differing": 0}
    text = audit.format_audit({**found, "again": again, "damaged": [], "problems": []})
    assert "None is whole yet" in text
    row["whole"] = True
    assert "None is whole yet" not in audit.format_audit({**found, "again": again, "damaged": [], "problems": []})


def test_audit_without_a_ledger_is_reported(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "smoke/done", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ledger")
    assert main(["audit", str(tmp_path / "run")]) == 2
    assert "has no ledger" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(tmp_path)]) == 2
    assert main(["show", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert "no runs under" in text
    assert "is not a run directory: it has no run.json" in text


def test_texts_of_an_attempt_are_shown_escaped(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert life(*COMMAND, f"run.root={tmp_path}", "run.name=r").status == 0
    (claim,) = (tmp_path / "smoke/r/attempts").glob("000001-????????????.json")
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"host": "\x1b[31mevil"}))
    main(["list", str(tmp_path)])
    main(["show", str(tmp_path / "smoke/r")])
    assert "\x1b" not in capsys.readouterr().out

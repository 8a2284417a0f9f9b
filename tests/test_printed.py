"""Printed commands work when they are pasted into a shell."""

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lives import Ended, Lives
from marks import slow

from runner import app
from runner.runs.__main__ import main

COMMAND = ("experiment=smoke", "trainer.evaluate_every_steps=null", "objective.metric=null", "runtime.audit=false")


def pasted(line: str, life: Lives) -> Ended:
    """What comes of a printed command."""
    python, module, *words = shlex.split(line)
    assert (shutil.which(python), module, words[0]) == (shutil.which(python), "-m", "runner")
    assert shutil.which(python)
    return life(*words[1:])


@pytest.mark.parametrize("name", ["lr=1,seed=2", slow("base~1a2b3c4d"), slow("x" * 160)])
def test_the_ways_out_of_drift_can_be_pasted(name: str, life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}/a b", f"run.name={name}")
    quoted = (*command[:-2], f'run.root="{tmp_path}/a b"', command[-1])
    assert life(*quoted, "trainer.max_steps=2").status == 0
    refused = life(*quoted, "trainer.max_steps=3")
    assert refused.status == 3, refused.output
    ways = re.findall(r"^  (?:continue|start a new run).*?: +(.*)$", refused.output, re.MULTILINE)
    assert len(ways) == 3
    for way in reversed(ways):
        ended = pasted(way, life)
        assert ended.status == 0, ended.output
    assert len([*tmp_path.glob("a b/smoke/*/result.json")]) == 3


@pytest.mark.parametrize(
    "command",
    [
        "runner --version",
        "runner schema",
        "runner --help",
        "runner --help seed",
        "runner.verify --help",
        "runner.runs -h",
    ],
)
@pytest.mark.parametrize("unbuffered", ["", slow("1")])
def test_a_reader_that_has_seen_enough_is_no_error(command: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv, environment = [sys.executable, "-m", *command.split()], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(argv, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_parent_is_given_as_it_is_shown(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"run.root={tmp_path}"
    assert life(*COMMAND, root, "trainer.max_steps=2", "optimizer.lr=0.1").status == 0
    (parent,) = tmp_path.glob("smoke/*")
    assert {"=", ","} <= {*parent.name}
    more = (*COMMAND, root, "trainer.max_steps=3", "run.inherit=all")
    for which in (parent, f"{parent}@2", os.path.relpath(parent, tmp_path)):
        ended = life(*more, f"run.parent={which}", f"run.name=c{len(str(which))}", cwd=tmp_path)
        assert (ended.status, "forked from step 2" in ended.output) == (0, True), ended.output
    both = life("-m", *more, f"run.parent={parent},{parent}@2", cwd=tmp_path)
    assert (both.status, "\n2 done\n" in both.output) == (0, True), both.output
    assert main(["show", str(tmp_path / f"smoke/c{len(str(parent))}")]) == 0
    assert f"everything of step 2 of {parent}\n" in capsys.readouterr().out


def test_a_message_without_its_arguments_ends_no_run() -> None:
    """Logging reports it and goes on."""
    record = logging.LogRecord("runner", logging.INFO, __file__, 1, "%s of %d", ("one",), None)
    assert app._escaped(record)

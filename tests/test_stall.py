"""A run of one process that stands still ends and says why; what only looks so goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lives import Lives

USER = Path(__file__).parent / "user"
LIMIT = 100  # seconds in which a run that stands still has to end


def run(life: Lives, root: Path, *more: str, **how: Any) -> Any:
    arguments = ("experiment=smoke", "trainer.max_steps=60", "runtime.audit=false", *more, f"run.root={root}")
    return life(*arguments, "run.name=r", cwd=USER, after=LIMIT, **how)


def end(root: Path) -> Any:
    return json.loads(max(root.glob("*/r/attempts/*.end.json")).read_text())


@pytest.mark.parametrize("how", ["lock", "python", "c", "gil"])
def test_a_stuck_sample_ends_the_run_which_goes_on(how: str, life: Lives, tmp_path: Path) -> None:
    data = (f"data.train._target_=mine.stalls.Data", f"+data.train.how={how}", f"+data.train.once={tmp_path / 'once'}")
    ended = run(life, tmp_path, *data, "runtime.timeout=3")
    assert ended.status == 1, ended.output
    assert "runtime.timeout" in ended.output
    assert "stalls.py" in ended.output
    print(ended.output)
    ended = run(life, tmp_path, *data, "runtime.timeout=60")
    assert ended.status == 0, ended.output

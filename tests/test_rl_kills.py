"""Kills of post-training while it generates, updates, saves and evaluates, with 1, 2 and 4 processes: to the bit."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from crews import Crews
from results import Results, results
from test_rl import SMALL, USER, WAYS, ledger

from runner.run.directory import RunDirectory
from runner.runs.audit import audit

pytestmark = pytest.mark.campaign

ROUNDS = max(1, int(os.environ.get("RUNNER_KILLS", "50")) // 50)
SEGMENT = 8  # steps from one evaluation to the next, with one number of processes
PHASES = {  # calls that do not return, and up to which of them in a life; in the order of a step
    "generation": {"runner.rl.grpo.generate": 3, "runner.rl.generation._draw": 9},
    "update": {"runner.update.WeightUpdate.backward": 3, "runner.update.WeightUpdate.step": 3},
    "saving": {"runner.checkpoint.tensor_file.SafetensorsFile.chunks": 3, "runner.checkpoint.manifest.seal": 3},
    "evaluation": {"runner.rl.completion.Completion.evaluation_step": 1, "runner.rl.completion.generate": 2},
}
CASES = {  # a way of training, and the numbers of processes, each for a segment
    "one": ("stale", (1,)),
    "one, surplus": ("surplus", (1,)),
    "two": ("surplus", (2,)),
    "four": ("stale", (4,)),
    "more": ("plain", (1, 2, 4)),
    "fewer": ("surplus", (4, 1)),
}
FAULTS = {"ForgetsCoefficient": "plain", "DropsSurplus": "stale"}


def command(root: Path, way: str, segments: int) -> list[str]:
    steps = (f"trainer.max_steps={SEGMENT * segments}", f"trainer.evaluate_every_steps={SEGMENT}")
    rest = ("checkpoint.every_steps=1", "runtime.timeout=60", f"run.root={root}")
    return [*SMALL, *WAYS[way], *steps, *rest]


def segments(sizes: tuple[int, ...]) -> Iterator[tuple[int, int | None]]:
    """The numbers of processes, and the step at which each ends: the first one of the next."""
    for number, size in enumerate(sizes, 1):
        yield size, None if number == len(sizes) else SEGMENT * number + 1


def outcome(root: Path, name: str) -> tuple[Results, dict[int, str]]:
    folder = root / "arithmetic_grpo" / name
    assert not audit(RunDirectory.at(str(folder)))["problems"]
    return results(folder), ledger(folder)


@pytest.mark.parametrize("case", CASES)
def test_kills_of_rollouts_change_nothing(case: str, crew: Crews, tmp_path: Path) -> None:
    """SIGKILL of one process or of all in each phase, with each number of processes."""
    way, sizes = CASES[case]
    train, chance = command(tmp_path, way, len(sizes)), random.Random(case)
    for size, last in segments(sizes):
        whole = crew(size, *train, "run.name=whole", cwd=USER, to=[0], step=last)
        assert last or not any(whole.statuses), whole.output
    expected, lines = outcome(tmp_path, "whole")
    coefficients = {line["train/kl_coefficient"] for line in expected.lines if "train/kl_coefficient" in line}
    assert len(coefficients) > 1
    assert way == "plain" or expected.parts["task"]["waiting"]
    for number in range(ROUNDS):
        name = f"run.name=cut{number}"
        for size, last in segments(sizes):
            for phase, calls in PHASES.items():
                victim = 0 if phase == "saving" else chance.randrange(size)  # only rank 0 seals
                to = chance.choice([[victim], [*range(size)]])
                path, most = chance.choice([*calls.items()])
                call = path, chance.randint(1, most)
                ended = crew(size, *train, name, cwd=USER, to=to, call=call)
                assert None in ended.statuses, f"not reached: {call}, {ended.output}"
            ended = crew(size, *train, name, cwd=USER, to=[0], step=last)
        assert not any(ended.statuses), ended.output
        cut, cut_lines = outcome(tmp_path, f"cut{number}")
        assert not cut.differences(expected)
        assert cut_lines == lines


@pytest.mark.parametrize("fault", FAULTS)
def test_a_value_that_is_not_saved_changes_a_killed_run(fault: str, crew: Crews, tmp_path: Path) -> None:
    """The comparison above sees what is missing."""
    train = [*command(tmp_path, FAULTS[fault], 1), f"task._target_=mine.rollouts.{fault}"]
    assert not any(crew(1, *train, "run.name=whole", cwd=USER).statuses)
    assert crew(1, *train, "run.name=cut", cwd=USER, step=4).statuses == [None]
    assert not any(crew(1, *train, "run.name=cut", cwd=USER).statuses)
    assert outcome(tmp_path, "cut")[0].differences(outcome(tmp_path, "whole")[0])

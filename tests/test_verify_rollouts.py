"""``python -m runner.verify`` on the faults of other trainers: each is named, and the trainer without them passes."""

import pytest
from judge import Judge
from test_rl import SMALL, WAYS

from runner.verify.options import Options

COMMAND = ("--config-dir", "conf", *SMALL, "trainer.evaluate_every_steps=100", "checkpoint.every_steps=1")
OPTIONS = Options(steps=6, kills=1, workers=(0,))
FAULTS = {
    "ForgetsCoefficient": ("plain", "task.kl was "),
    "DropsSurplus": ("surplus", "task.waiting"),
    "RestartsCounter": ("surplus", "task.version was "),
    "SeedsOnce": ("plain", "task.generator was "),
    "ReadsAhead": ("plain", "task.in_flight"),
    "Drifts": ("plain", "task.begun was True"),
    "Recomputes": ("stale", "task.loaded"),
}


@pytest.mark.campaign
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_another_trainer_is_named(name: str, judge: Judge) -> None:
    way, words = FAULTS[name]
    verdict = judge.of((*COMMAND, *WAYS[way], f"task._target_=mine.rollouts.{name}"), OPTIONS)
    report = "\n".join([verdict.text(), *verdict.tried])
    assert verdict.cause, report
    assert words in verdict.text(), report


@pytest.mark.campaign
@pytest.mark.parametrize("way", WAYS)
def test_without_the_fault_it_passes(way: str, judge: Judge) -> None:
    verdict = judge.of((*COMMAND, *WAYS[way]), OPTIONS)
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])

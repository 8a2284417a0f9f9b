"""``python -m runner.verify`` on the faults of other trainers: each is named, and the trainer without them passes."""

from collections.abc import Iterator

import pytest
from test_rl import SMALL, USER, WAYS

from runner.verify.execution import Servers, fork_servers
from runner.verify.options import Options
from runner.verify.proof import Verdict, prove

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


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with fork_servers(USER) as both:
        yield both


def judged(servers: Servers, way: str, *overrides: str) -> Verdict:
    return prove((*COMMAND, *WAYS[way], *overrides), OPTIONS, progress=print, servers=servers)


@pytest.mark.campaign
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_another_trainer_is_named(name: str, servers: Servers) -> None:
    way, words = FAULTS[name]
    verdict = judged(servers, way, f"task._target_=mine.rollouts.{name}")
    report = "\n".join([verdict.text(), *verdict.tried])
    assert verdict.cause, report
    assert words in verdict.text(), report


@pytest.mark.campaign
@pytest.mark.parametrize("way", WAYS)
def test_without_the_fault_it_passes(way: str, servers: Servers) -> None:
    verdict = judged(servers, way)
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])

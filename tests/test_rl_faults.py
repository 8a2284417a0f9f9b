"""Faults that were reported of other trainers, made in this one: verify fails for each, and passes without them."""

from collections.abc import Iterator

import pytest
from test_rl import SMALL, USER

from runner.verify.execution import Servers, fork_servers
from runner.verify.options import Options
from runner.verify.proof import prove

SURPLUS = ("task.groups=5", "task.max_age=9")
FAULTS = {
    "ForgetsCoefficient": (),
    "DropsWaiting": SURPLUS,
    "SeedsPerProcess": (),
    "DriftingReference": ("task.kl=0.5",),
    "CountsAnew": ("task.staleness=1",),
    "StaleProbabilities": SURPLUS,
}


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """Two servers to fork attempts from, beside a user's package."""
    with fork_servers(USER) as both:
        yield both


@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS)
def test_a_reported_fault_is_noticed(fault: str, servers: Servers) -> None:
    command = [*SMALL, *FAULTS[fault], f"task._target_=mine.rollouts.{fault}"]
    verdict = prove(command, Options(steps=8, kills=2, workers=(0,)), progress=print, servers=servers)
    assert not verdict.holds
    assert verdict.step is not None


@pytest.mark.campaign
@pytest.mark.parametrize("way", [(), SURPLUS, ("task.staleness=1",)])
def test_without_a_fault_it_is_proven(way: tuple[str, ...], servers: Servers) -> None:
    verdict = prove([*SMALL, *way], Options(steps=8, kills=3, workers=(0,)), progress=print, servers=servers)
    assert verdict.holds, verdict.text()

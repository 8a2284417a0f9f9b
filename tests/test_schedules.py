"""Learning rates in closed form."""

import math
from typing import Any

import pytest
import torch

from runner.schedules import warmup_cosine


def scheduled(*, rates: tuple[float, ...] = (1.0,), **options: Any) -> Any:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return warmup_cosine(torch.optim.SGD(groups), **options)


def rates(scheduler: Any, steps: int) -> list[float]:
    """The rates of the first group in the next steps."""
    values = []
    for _ in range(steps):
        values.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return values


def test_the_rate_warms_up_in_equal_steps() -> None:
    assert rates(scheduled(total_steps=10, warmup_steps=4), 5) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_the_rate_falls_along_half_a_cosine(final: float) -> None:
    values = rates(scheduled(total_steps=8, warmup_steps=2, final_ratio=final), 9)[2:]
    assert values == [final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(7)]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (1.0, final)


@pytest.mark.parametrize("final", [0.0, 0.125, 1.0])
def test_the_rate_stays_at_its_final_ratio(final: float) -> None:
    assert rates(scheduled(total_steps=5, warmup_steps=2, final_ratio=final), 9)[5:] == [final] * 4


def test_without_warm_up_it_begins_at_the_full_rate() -> None:
    assert rates(scheduled(total_steps=10), 1) == [1.0]


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert rates(scheduled(total_steps=2, warmup_steps=4), 4) == [0.25, 0.5, 0.75, 1.0]


def test_every_group_keeps_its_share() -> None:
    scheduler = scheduled(rates=(1.0, 0.5), total_steps=10, warmup_steps=4)
    for _ in range(7):
        scheduler.optimizer.step()
        scheduler.step()
        full, half = scheduler.get_last_lr()
        assert half == full / 2


def test_a_resume_at_any_step_goes_on_with_the_same_rates() -> None:
    options = {"total_steps": 8, "warmup_steps": 3, "final_ratio": 0.1}
    uninterrupted = rates(scheduled(**options), 10)
    for done in range(10):
        killed, resumed = scheduled(**options), scheduled(**options)
        rates(killed, done)
        resumed.optimizer.load_state_dict(killed.optimizer.state_dict())
        resumed.load_state_dict(killed.state_dict())
        assert rates(resumed, 10 - done) == uninterrupted[done:]

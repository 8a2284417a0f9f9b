"""Problems of reasoning-gym as a data set."""

import pytest

from runner.datasets.reasoning import ReasoningGym
from runner.errors import ConfigError

SUMS = {"name": "basic_arithmetic", "min_terms": 2, "max_terms": 2, "max_digits": 2, "operators": ["+"]}


@pytest.fixture(autouse=True)
def _package() -> None:
    pytest.importorskip("reasoning_gym")


def test_problems_are_functions_of_seed_and_index() -> None:
    first, again, other = (ReasoningGym(**SUMS, split="train", size=50, seed=seed) for seed in (0, 0, 1))
    assert [first[n] for n in range(50)] == [again[n] for n in reversed(range(50))][::-1]
    assert len({first[n]["prompt"] for n in range(50)} & {other[n]["prompt"] for n in range(50)}) < 10
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first[0]["prompt"].endswith("\n")
    assert first[0]["answer"].lstrip("-").isdigit()


def test_the_splits_of_reasoning_gym_share_no_question() -> None:
    splits = [ReasoningGym(**SUMS, split=split, size=300, seed=n) for n, split in enumerate(("train", "validation"))]
    mine, held_out = ({split[n]["prompt"] for n in range(300)} for split in splits)
    assert not mine & held_out
    assert len(held_out) > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nope"}, "cannot make data.*.name=nope with {}: Dataset 'nope' not registered"),
        ({"name": "basic_arithmetic", "wrong": 1}, "with {'wrong': 1}: "),
        ({"name": "basic_arithmetic", "min_terms": 0}, "min_terms must be positive"),
    ],
)
def test_what_reasoning_gym_refuses_is_a_config_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ReasoningGym(split="train", size=1, **options)  # type: ignore[arg-type]
    assert message in str(error.value)

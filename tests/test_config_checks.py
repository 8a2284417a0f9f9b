"""Refusals of a configuration name the key, its value and the remedy."""

from typing import Any

import pytest
from defaults import configured as default_config
from omegaconf import OmegaConf

from runner.config.schema import check
from runner.errors import ConfigError


def configured(*overrides: str) -> Any:
    filled = {
        "model": {"_target_": "m"},
        "data": {"train": {"_target_": "d"}, "validation": {"_target_": "v"}, "batch_size": 8},
        "task": {"_target_": "t"},
        "optimizer": {"_target_": "o"},
        "scheduler": {"_target_": "s"},
        "trainer": {"max_steps": 10},
    }
    return default_config(filled, OmegaConf.from_dotlist([*overrides]))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.max_steps=null", "trainer.max_epochs=1"],
        ["trainer.max_steps=null", "trainer.max_seconds=0.5"],
        ["objective.metric=val/loss", "trainer.early_stopping.patience=1", "checkpoint.keep_best=3"],
        ["data.validation=null"],
        ["trainer.ema_decay=0.999", "checkpoint.every_seconds=0", "runtime.num_workers=0", "checkpoint.keep_last=2"],
        ["runtime.start_method=forkserver", "runtime.num_threads=1", "runtime.prefetch=1"],
    ],
)
def test_workable_settings_pass(overrides: list[str]) -> None:
    check(configured(*overrides))


@pytest.mark.parametrize(
    ("override", "least"),
    [
        ("data.batch_size=0", 1),
        ("data.evaluation_batch_size=-1", 1),
        ("trainer.max_steps=0", 1),
        ("trainer.max_epochs=0", 1),
        ("trainer.evaluate_every_steps=0", 1),
        ("trainer.evaluate_every_epochs=0", 1),
        ("trainer.accumulate=0", 1),
        ("trainer.early_stopping.patience=0", 1),
        ("checkpoint.every_steps=0", 1),
        ("checkpoint.every_seconds=-0.5", 0),
        ("checkpoint.every_seconds=nan", 0),
        ("checkpoint.keep_last=1", 2),
        ("checkpoint.keep_every_steps=0", 1),
        ("checkpoint.keep_best=0", 1),
        ("metrics.every_steps=0", 1),
        ("runtime.prefetch=0", 1),
        ("runtime.num_threads=0", 1),
    ],
)
def test_a_number_that_is_too_small_is_refused_with_the_least(override: str, least: int) -> None:
    with pytest.raises(ConfigError) as refused:
        check(configured(override))
    assert str(refused.value) == f"{override} is too small: at least {least}"


@pytest.mark.parametrize("override", ["runtime.num_threads=100000", "runtime.num_workers=100000"])
def test_a_number_that_ends_the_process_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(configured(override))
    assert str(refused.value) == f"{override} is too large: at most 1024"


@pytest.mark.parametrize("value", ["0.0", "-1.0", "nan"])
@pytest.mark.parametrize("key", ["trainer.clip_norm", "trainer.max_seconds"])
def test_a_limit_that_would_stop_all_training_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(configured(f"{key}={value}"))
    assert str(refused.value) == f"{key}={value} is too small: above 0; null sets no limit"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["trainer.max_steps=null"],
            "the training has no end: set trainer.max_steps, trainer.max_epochs or trainer.max_seconds",
        ),
        (["runtime.num_workers=-1"], "runtime.num_workers=-1: expected a number from 0 on, or auto"),
        (["runtime.num_workers=all"], "runtime.num_workers=all: expected a number from 0 on, or auto"),
        (["trainer.ema_decay=1.0"], "trainer.ema_decay=1.0 is not between 0 and 1; usual values are 0.99 to 0.9999"),
        (["trainer.ema_decay=0.0"], "trainer.ema_decay=0.0 is not between 0 and 1; usual values are 0.99 to 0.9999"),
        (["trainer.ema_decay=.nan"], "trainer.ema_decay=nan is not between 0 and 1; usual values are 0.99 to 0.9999"),
        (
            ["data.validation=null", "objective.metric=val/loss"],
            "objective.metric=val/loss needs data.validation, which is not set",
        ),
        (
            ["trainer.early_stopping.patience=3"],
            "trainer.early_stopping.patience=3 needs objective.metric, for example val/loss",
        ),
        (
            ["trainer.early_stopping.target=0.1"],
            "trainer.early_stopping.target=0.1 needs objective.metric, for example val/loss",
        ),
        (["checkpoint.keep_best=3"], "checkpoint.keep_best=3 needs objective.metric, for example val/loss"),
        (["run.inherit=all"], "run.inherit=all needs run.parent, the run to begin from"),
        (["runtime.start_method=thread"], "runtime.start_method=thread is not one of fork, spawn, forkserver"),
    ],
)
def test_unworkable_settings_are_refused_with_remedy(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(configured(*overrides))
    assert str(refused.value) == told
    assert refused.value.status == 2

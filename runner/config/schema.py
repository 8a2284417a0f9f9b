"""Every key of a configuration with its type, by which Hydra refuses a misspelt key and a wrong value; the checks that
types cannot express; and values that come from the environment.

``conf/config.yaml`` has the defaults and says what each key means.

An object gets the value of ``${oc.env:NAME}``; identity, names and records get this text. OmegaConf's own resolver is
replaced by a resolver that notes each variable it is asked for, and that can answer with the interpolation in place of
the value. So it does not matter through how many other keys and resolvers a value came.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import reduce
from itertools import chain
from operator import getitem
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.base import Node

from runner.config.secrets import Unresolved, find_secrets, may_be_secret, names_a_secret
from runner.errors import ConfigError, hide_secret, redacted

LEAST_KEPT = 2  # verified checkpoints are always kept, so that the loss of any one object leaves one to resume from
Precision = Enum("Precision", {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"})
Parallel = Enum("Parallel", {"auto": "auto", "ddp": "ddp", "fsdp": "fsdp"})
OnNonfinite = Enum("OnNonfinite", {"stop": "stop", "skip": "skip"})
Randomness = Enum("Randomness", {"sample": "sample", "batch": "batch", "off": "off"})
Tail = Enum("Tail", {"carry": "carry", "drop": "drop"})
OnBadRecord = Enum("OnBadRecord", {"stop": "stop", "substitute": "substitute"})
Mode = Enum("Mode", {"min": "min", "max": "max"})
Every = Enum("Every", {"auto": "auto"})
OnDrift = Enum("OnDrift", {"refuse": "refuse", "accept": "accept", "fork": "fork"})
Inherit = Enum("Inherit", {"model": "model", "all": "all"})
Load = Enum("Load", {"matching": "matching", "strict": "strict"})
OnCodeChange = Enum("OnCodeChange", {"warn": "warn", "refuse": "refuse", "accept": "accept"})
OnConflict = Enum("OnConflict", {"fail": "fail", "wait": "wait", "steal": "steal"})


@dataclass
class StreamsConfig:
    count: int
    window: int
    chunk: int | None


@dataclass
class DataConfig:
    train: Any
    validation: Any
    test: Any
    batch_size: int
    evaluation_batch_size: int
    overfit: int | None
    shuffle: bool
    tail: Tail
    randomness: Randomness
    collate: Any
    evaluation_collate: Any
    weights: Any
    streams: StreamsConfig
    max_tokens: int | None
    on_bad_record: OnBadRecord
    replay: bool


@dataclass
class EarlyStoppingConfig:
    patience: int | None
    min_delta: float
    target: float | None


@dataclass
class TrainerConfig:
    max_steps: int | None
    max_epochs: int | None
    max_seconds: float | None
    evaluate_every_steps: int | None
    evaluate_every_epochs: int | None
    accumulate: int
    clip_norm: float | None
    precision: Precision
    on_nonfinite: OnNonfinite
    ema_decay: float | None
    ema_params: Any
    early_stopping: EarlyStoppingConfig


@dataclass
class ObjectiveConfig:
    metric: str | None
    mode: Mode


@dataclass
class CheckpointConfig:
    every: Every | None
    every_steps: int | None
    every_seconds: float | None
    max_unsaved: float
    background: bool
    keep_last: int
    keep_every_steps: int | None
    keep_best: int


@dataclass
class MetricsConfig:
    every_steps: int
    show: list[str] | None
    writers: dict[str, Any]


@dataclass
class RuntimeConfig:
    device: str
    parallel: Parallel
    shard: int | None
    timeout: float
    compile: bool
    num_workers: Any  # a number or auto
    prefetch: int
    start_method: str | None
    num_threads: int | None
    audit: bool
    check_batches: int
    deterministic: bool


@dataclass
class RunConfig:
    root: str
    storage_options: dict[str, Any]
    name: str | None
    dry: bool
    parent: str | None
    inherit: Inherit
    load: Load
    on_drift: OnDrift
    on_code_change: OnCodeChange
    on_conflict: OnConflict


@dataclass
class SweepConfig:
    max_retries: int
    retry_failed: bool
    isolate: bool


@dataclass
class Config:
    """The whole configuration. ``Any`` stands for an object by its ``_target_``."""

    imports: list[str]
    seed: int
    params: dict[str, Any]
    model: Any
    data: DataConfig
    task: Any
    optimizer: Any
    scheduler: Any
    trainer: TrainerConfig
    objective: ObjectiveConfig
    callbacks: dict[str, Any]
    observers: dict[str, Any]
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    runtime: RuntimeConfig
    run: RunConfig
    sweep: SweepConfig


def register() -> None:
    ConfigStore.instance().store(name="schema", node=Config)


_FROM_ZERO = """
    data.streams.count checkpoint.every_seconds checkpoint.max_unsaved runtime.check_batches
    sweep.max_retries
"""
_FROM_ONE = """
    data.batch_size data.evaluation_batch_size data.streams.window data.streams.chunk data.max_tokens data.overfit
    trainer.max_steps trainer.max_epochs trainer.evaluate_every_steps trainer.evaluate_every_epochs
    trainer.accumulate trainer.early_stopping.patience checkpoint.every_steps checkpoint.keep_every_steps
    checkpoint.keep_best metrics.every_steps runtime.shard runtime.prefetch runtime.num_threads
"""
_MINIMUM = dict.fromkeys(_FROM_ZERO.split(), 0) | dict.fromkeys(_FROM_ONE.split(), 1)
_MINIMUM |= {"runtime.timeout": 2, "checkpoint.keep_last": LEAST_KEPT}
_MAXIMUM = {"runtime.num_threads": 1024, "runtime.num_workers": 1024}  # with far more the system ends the process
_ABOVE_ZERO = ("trainer.max_seconds", "trainer.clip_norm")
# Hydra's own settings, which are stored in .hydra/.
_HYDRA = ("hydra.job.env_set", "hydra.sweeper", "hydra.launcher")


def check(config: DictConfig) -> None:
    """Raise ConfigError for the first value that is missing or cannot work, naming key, value and remedy."""
    _check_keys(config)
    # Without Hydra's own configuration, which a job of a sweep has, too.
    own = OmegaConf.masked_copy(config, [field.name for field in fields(Config)])
    if missing := sorted(OmegaConf.missing_keys(own)):
        raise ConfigError(f"{', '.join(missing)} not set: give a value in the experiment or on the command line")
    _check_numbers(config)
    trainer = config.trainer
    if trainer.max_steps is None and trainer.max_epochs is None and trainer.max_seconds is None:
        raise ConfigError("the training has no end: set trainer.max_steps, trainer.max_epochs or trainer.max_seconds")
    if (decay := trainer.ema_decay) is not None and not 0 < decay < 1:
        raise ConfigError(f"trainer.ema_decay={decay} is not between 0 and 1; usual values are 0.99 to 0.9999")
    if config.objective.metric is not None and config.data.validation is None:
        raise ConfigError(f"objective.metric={config.objective.metric} needs data.validation, which is not set")
    by_objective = {f"trainer.early_stopping.{key}": trainer.early_stopping[key] for key in ("patience", "target")}
    by_objective["checkpoint.keep_best"] = None if config.checkpoint.keep_best == 1 else config.checkpoint.keep_best
    if config.objective.metric is None and (settings := [f"{k}={v}" for k, v in by_objective.items() if v is not None]):
        raise ConfigError(f"{settings[0]} needs objective.metric, for example val/loss")
    refuse_secrets(config)
    if config.run.parent is None and config.run.inherit is not Inherit.model:
        raise ConfigError(f"run.inherit={config.run.inherit.name} needs run.parent, the run to begin from")
    _check_workers(config.runtime)


def _check_workers(runtime: Any) -> None:
    if runtime.num_workers != "auto" and not str(runtime.num_workers).isdecimal():
        raise ConfigError(f"runtime.num_workers={runtime.num_workers}: expected a number from 0 on, or auto")
    if (method := runtime.start_method) not in (None, "fork", "spawn", "forkserver"):
        raise ConfigError(f"runtime.start_method={method} is not one of fork, spawn, forkserver")


def _check_numbers(config: DictConfig) -> None:
    for key, least in _MINIMUM.items():
        value = OmegaConf.select(config, key)
        if value is not None and not value >= least:  # also for NaN
            raise ConfigError(f"{key}={value} is too small: at least {least}")
    for key, most in _MAXIMUM.items():
        value = OmegaConf.select(config, key)
        if str(value).isdecimal() and int(value) > most:
            raise ConfigError(f"{key}={value} is too large: at most {most}")
    for key in _ABOVE_ZERO:
        value = OmegaConf.select(config, key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value} is too small: above 0; null sets no limit")


def _check_keys(node: DictConfig, path: str = "") -> None:
    """Refuse keys that the schema does not have, which Hydra adds for a ``+``."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return
    names = {field.name for field in fields(schema)}
    for key in map(str, node):
        if f"{path}{key}" == "hydra":  # a job of a sweep has Hydra's own configuration, too
            continue
        if key not in names:
            raise ConfigError(f"there is no key {path}{key}. {known_keys(schema, path, key)}")
        inner = node._get_node(key)
        if isinstance(inner, DictConfig):
            _check_keys(inner, f"{path}{key}.")


def known_keys(schema: Any, parent: str, key: str) -> str:
    """The remedy for a key that a part of the schema does not have; ``parent`` is empty or ends with a dot."""
    names = [field.name for field in fields(schema)]
    near = get_close_matches(key, names, 1)
    return f"Did you mean {parent}{near[0]}?" if near else f"There are: {', '.join(parent + name for name in names)}"


def refuse_secrets(config: DictConfig) -> None:
    """Raise ConfigError for the first secret that is written out, before Hydra makes a folder or a file of it."""
    keys = [field.name for field in fields(Config)]
    if "hydra" in config:
        _check_parameters(config.hydra.sweeper)
        keys += _HYDRA
    in_sweep = _secrets_of_sweep(config) if "hydra" in config else ()
    plain: Any = OmegaConf.to_container(config, resolve=False)
    values = {key: reduce(getitem, key.split("."), plain) for key in keys}
    for key in chain(*(find_secrets(value, key) for key, value in values.items()), in_sweep):
        problem = "looks like a secret and is written out, which would end in files and in the process list"
        remedy = "Put it into an environment variable and give '${oc.env:NAME}'"
        store = "for a store, leave it to what its own library reads (AWS_*, AZURE_*, GOOGLE_*, ssh keys and agents)"
        raise ConfigError(f"{key} {problem}. {remedy}; or, {store}")
    for key in ("run.root", "run.name", "run.parent"):  # also as a part of them
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and redacted(value) != value:
            remedy = "Name it otherwise; what a store wants to know has its place in run.storage_options"
            raise ConfigError(f"{key} has a secret in it, and would be the name of a folder and stored. {remedy}")


def _check_parameters(sweeper: DictConfig) -> None:
    """Refuse secrets in the sweeper's own parameters: Hydra resolves them, and makes the names of jobs of them."""
    parameters = plain_value(sweeper, "params") if sweeper.get("params") else {}
    for key, value in parameters.items():
        words = re.split(r"[\s,()]+", str(value.value)) if isinstance(value, Unresolved) else []
        if any(redacted(word) != word or may_be_secret(word) for word in words):
            problem = "a secret of the environment, which would end in names of jobs"
            remedy = f"give it on the command line, {shlex.quote(f'{key}={value}')}"
            raise ConfigError(f"hydra.sweeper.params.{key} has {problem}: {remedy}")


def _secrets_of_sweep(config: DictConfig) -> Iterator[str]:
    """The keys with secrets among the values of a sweep, which are in no configuration but its jobs'."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    for override in OverridesParser.create().parse_overrides(overrides):
        values = override.value()
        if isinstance(values, ChoiceSweep):
            for value in values.list:
                yield from find_secrets(Override._convert_value(value), override.key_or_group)


_NO_DEFAULT = object()
# Below these keys a value of the environment is hidden only if its name says that it is secret: messages need them.
_SHOWN = re.compile(r"(run\.(root|name|parent)|runtime|checkpoint|metrics\.every_steps|sweep|hydra)\b")
_requested: ContextVar[list[str] | None] = ContextVar("requested", default=None)  # names of variables
_masked: ContextVar[bool] = ContextVar("masked", default=False)  # answer with interpolations


def plain_value(parent: Container, key: Any) -> Any:
    """The value of a key as plain values, with ``Unresolved`` texts in place of those from the environment. Numbers,
    booleans and choices stay: they are no secrets, and decide what is computed.
    """
    value, variables = _recorded(lambda: _plain(parent[key]))
    return _leaves(parent, key) if variables else value


def _leaves(parent: Any, key: Any) -> Any:
    node, variables = _recorded(lambda: parent[key])
    if not variables and OmegaConf.is_dict(node):
        return {_plain(inner): _leaves(node, inner) for inner in node}
    if not variables and OmegaConf.is_list(node):
        return [_leaves(node, place) for place in range(len(node))]
    value = _plain(node)
    harmless = isinstance(node, int | float | Enum) and not names_a_secret(str(key))
    return value if harmless or not variables else Unresolved(_masked_text(parent, key), value)


def _masked_text(parent: Any, key: Any) -> str:
    """The text as it would be if each variable held its own interpolation; else as it is written."""
    token = _masked.set(True)
    try:
        text = parent[key]
    except Exception:  # the type is no text, or a resolver wants another one
        text = None
    finally:
        _masked.reset(token)
    return text if isinstance(text, str) and "${oc.env:" in text else str(parent._get_node(key)._value())


def _plain(node: Any) -> Any:
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True, enum_to_str=True)
    return node.name if isinstance(node, Enum) else node


def _recorded(read: Callable[[], Any]) -> tuple[Any, list[str]]:
    variables: list[str] = []
    token = _requested.set(variables)
    try:
        return read(), variables
    finally:
        _requested.reset(token)


def _env(variable: str, default: Any = _NO_DEFAULT, *, _node_: Node) -> str | None:
    requested = _requested.get()
    if requested is not None:
        requested.append(variable)
    if _masked.get():
        text = "" if default is _NO_DEFAULT else f",{'null' if default is None else default}"
        return f"${{oc.env:{variable}{text}}}"
    if variable not in os.environ:
        if default is _NO_DEFAULT:
            raise KeyError(f"Environment variable '{variable}' not found")
        return None if default is None else str(default)
    value, key = os.environ[variable], str(_node_._get_full_key(None))
    # Hidden in all messages: a text of three letters would be hidden in the middle of words, too.
    named = names_a_secret(variable) or names_a_secret(key)
    if (named and len(value) >= 4) or (may_be_secret(value) and not _SHOWN.match(key)):
        hide_secret(value)
    return value


OmegaConf.register_new_resolver("oc.env", _env, replace=True)

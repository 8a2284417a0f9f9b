"""Every key of a configuration with its type, by which Hydra refuses a misspelt key and a wrong value.

``conf/config.yaml`` has the defaults and says what each key means.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore

LEAST_KEPT = 2  # verified checkpoints are always kept, so that the loss of any one object leaves one to resume from


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Parallel(Enum):
    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"


class Randomness(Enum):
    sample = "sample"
    batch = "batch"
    off = "off"


class Tail(Enum):
    carry = "carry"
    drop = "drop"


class OnBadRecord(Enum):
    stop = "stop"
    substitute = "substitute"


class Mode(Enum):
    min = "min"
    max = "max"


class Every(Enum):
    auto = "auto"


class OnDrift(Enum):
    refuse = "refuse"
    accept = "accept"
    fork = "fork"


class Inherit(Enum):
    model = "model"
    all = "all"


class Load(Enum):
    matching = "matching"
    strict = "strict"


class OnConflict(Enum):
    fail = "fail"
    wait = "wait"
    steal = "steal"


@dataclass
class StreamsConfig:
    count: int
    window: int
    chunk: int | None


@dataclass
class DataConfig:
    train: Any
    validation: Any
    batch_size: int
    evaluation_batch_size: int
    shuffle: bool
    tail: Tail
    randomness: Randomness
    collate: Any
    streams: StreamsConfig
    max_tokens: int | None
    on_bad_record: OnBadRecord
    replay: bool


@dataclass
class EarlyStoppingConfig:
    patience: int | None
    min_delta: float


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
    writers: dict[str, Any]


@dataclass
class RuntimeConfig:
    device: str
    parallel: Parallel
    shard: int | None
    timeout: float
    compile: bool
    num_workers: int
    prefetch: int
    start_method: str | None
    num_threads: int | None
    audit: bool
    deterministic: bool


@dataclass
class RunConfig:
    root: str
    storage_options: dict[str, Any]
    name: str | None
    parent: str | None
    inherit: Inherit
    load: Load
    on_drift: OnDrift
    on_conflict: OnConflict


@dataclass
class SweepConfig:
    max_retries: int
    retry_failed: bool
    isolate: bool


@dataclass
class Config:
    """The whole configuration. ``Any`` stands for an object by its ``_target_``."""

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
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    runtime: RuntimeConfig
    run: RunConfig
    sweep: SweepConfig


def register() -> None:
    """Register the schema with Hydra as ``schema``, the first entry of the defaults list."""
    ConfigStore.instance().store(name="schema", node=Config)

"""Every key of a configuration, with its type. A misspelt key or a wrong type is refused by Hydra itself.

The first nine keys of ``Config`` say *what is computed* and make the identity of a run; the rest say *how it is
executed* and may change between attempts (``identity.IDENTITY`` spells the split).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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


class OnConflict(Enum):
    fail = "fail"
    wait = "wait"
    steal = "steal"


@dataclass
class StreamsConfig:
    count: int = 96  # divisible by data workers x processes x streams per micro-batch; 0: samples in any order
    window: int = 128  # consecutive samples of a stream that are shuffled together; what is held in memory
    chunk: int | None = None  # samples from one stream before the next one's turn; absent: a quarter of a micro-batch


@dataclass
class DataConfig:
    train: Any = MISSING  # _target_ of a dataset with __len__ and __getitem__, or of an iterable one
    validation: Any = None  # the same; absent: no evaluation
    batch_size: int = MISSING  # samples per optimizer step, over all micro-batches
    evaluation_batch_size: int = 256
    shuffle: bool = True
    tail: Tail = Tail.carry  # the last batch of an epoch: goes on into the next epoch, or is dropped
    randomness: Randomness = Randomness.sample  # seeds python, numpy and torch before each sample, each batch, never
    collate: Any = None  # _target_ (with _partial_) of a collate function; absent: torch's default
    streams: StreamsConfig = field(default_factory=StreamsConfig)  # for data in shards, read nearly in sequence
    max_tokens: int | None = None  # per micro-batch, padding included; needs a length for each sample
    on_bad_record: OnBadRecord = (
        OnBadRecord.stop
    )  # a sample that cannot be read ends the run, or another takes its place
    replay: bool = False  # an iterable without a state is read again from its start at every resume


@dataclass
class EarlyStoppingConfig:
    patience: int | None = None  # evaluations in a row without an improvement of the objective; absent: never stop
    min_delta: float = 0.0


@dataclass
class TrainerConfig:
    max_steps: int | None = None
    max_epochs: int | None = None
    max_seconds: float | None = None  # of training, over all attempts
    evaluate_every_steps: int | None = None
    evaluate_every_epochs: int | None = None  # with neither of the two: once, at the end
    accumulate: int = 1  # micro-batches per optimizer step; several processes share them out
    clip_norm: float | None = None
    precision: Precision = Precision.fp32
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    ema_decay: float | None = None  # evaluate and export an exponential moving average of the weights
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


@dataclass
class ObjectiveConfig:
    metric: str | None = None
    mode: Mode = Mode.min


@dataclass
class CheckpointConfig:
    every: Every | None = Every.auto  # as often as costs less than a hundredth of the time; comes beside the next two
    every_steps: int | None = None
    every_seconds: float | None = None
    max_unsaved: float = 1800.0  # seconds of training that may be lost to a storage that fails; then the run ends
    background: bool = True  # write while training goes on; false: wait for each checkpoint
    keep_last: int = 2
    keep_every_steps: int | None = None  # of every multiple one is made and stays
    keep_best: int = 1  # by the objective


@dataclass
class MetricsConfig:
    every_steps: int = 10  # training metrics are means over so many steps


@dataclass
class RuntimeConfig:
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    parallel: Parallel = Parallel.auto  # of several processes, started by torchrun: ddp has the whole model in each
    shard: int | None = None  # fsdp: processes that a replica of the model lies on; absent: all
    # Seconds until a process that stopped, or keeps the others waiting, ends all of them; one that saves or restores
    # has max_unsaved more. Where one builds its data for longer than the others, this has to be longer, too.
    timeout: float = 600.0
    compile: bool = False  # the model, by torch.compile
    num_workers: int = 0  # processes that load data; 0 loads in the training process
    prefetch: int = 2  # batches in flight per worker
    start_method: str | None = None  # fork, spawn, forkserver; absent: Python's default
    num_threads: int | None = None  # absent: torch's default
    audit: bool = True  # at the start, draw a few samples twice and compare them
    deterministic: bool = True  # refuse kernels whose result varies from call to call


@dataclass
class RunConfig:
    root: str = "outputs"  # a folder, or a URL of any store that fsspec knows: s3://bucket/experiments
    storage_options: dict[str, Any] = field(default_factory=dict)  # fsspec's, for a URL; secrets as ${oc.env:NAME}
    name: str | None = None  # instead of the name made from the overrides
    parent: str | None = None  # a run's directory, @step or @best: begin from its state instead of from scratch
    inherit: Inherit = Inherit.model  # from the parent: only weights, or all: also optimizer, position, step
    on_drift: OnDrift = OnDrift.refuse
    on_conflict: OnConflict = OnConflict.fail


@dataclass
class SweepConfig:
    max_retries: int = 2  # of a run whose attempts fail one after the other, over all commands
    retry_failed: bool = True


@dataclass
class Config:
    seed: int = 0
    model: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    task: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)  # by name: _target_ of a runner.callbacks.base.Callback
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def register() -> None:
    """Make the schema known to Hydra as ``schema``, the first of the defaults."""
    ConfigStore.instance().store(name="schema", node=Config)

"""Every key of a configuration, with its type. A misspelt key or a wrong type is refused by Hydra itself.

The first nine keys of ``Config`` say *what is computed* and make the identity of a run; the rest say *how it is
executed* and may change between attempts (``identity.IDENTITY`` spells the split).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

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


class OnConflict(Enum):
    fail = "fail"
    wait = "wait"
    steal = "steal"


@dataclass
class StreamsConfig:
    """How shards are read almost sequentially (``data.windows``). ``count: 0`` shuffles all samples with each other."""

    count: int = 96  # streams; best a multiple of data workers x processes x streams per micro-batch
    window: int = 128  # consecutive samples of a stream that are shuffled together and held in memory
    chunk: int | None = None  # samples taken from one stream before the next; null: a quarter of a micro-batch


@dataclass
class DataConfig:
    train: Any = MISSING  # _target_ of a data set with __len__ and __getitem__, or of an iterable
    validation: Any = None  # _target_ of a data set with __len__ and __getitem__; null: no evaluation
    batch_size: int = MISSING  # samples per optimizer step, over all micro-batches and processes
    evaluation_batch_size: int = 256
    shuffle: bool = True
    tail: Tail = Tail.carry  # carry: an epoch's last, short batch is filled from the next epoch; drop: it is left out
    randomness: Randomness = (
        Randomness.sample
    )  # when python, numpy and torch are seeded: per sample, per batch, or never
    collate: Any = None  # _target_ of a function that makes a batch of a list of samples; null: torch's default_collate
    streams: StreamsConfig = field(default_factory=StreamsConfig)  # for data in shards
    max_tokens: int | None = None  # per micro-batch, padding included; the data set needs ``lengths``
    # If a sample cannot be read: stop ends the run, substitute trains on another sample in its place.
    on_bad_record: OnBadRecord = OnBadRecord.stop
    replay: bool = False  # for an iterable without a state: every resume reads the current pass again from its start


@dataclass
class EarlyStoppingConfig:
    patience: int | None = None  # stop after so many evaluations in a row without an improvement; null: never
    min_delta: float = 0.0  # a smaller improvement of the objective does not count


@dataclass
class TrainerConfig:
    max_steps: int | None = None  # at least one of these three limits is required
    max_epochs: int | None = None
    max_seconds: float | None = None  # of training, summed over all attempts
    evaluate_every_steps: int | None = None
    evaluate_every_epochs: int | None = None  # if neither of the two is set, evaluate once, at the end
    accumulate: int = 1  # micro-batches per optimizer step; several processes divide them among themselves
    clip_norm: float | None = None  # the largest norm of all gradients together
    precision: Precision = Precision.fp32
    on_nonfinite: OnNonfinite = OnNonfinite.stop  # if the loss is NaN or infinite: stop the run, or skip the step
    ema_decay: float | None = None  # evaluate and export an exponential moving average of the weights
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


@dataclass
class ObjectiveConfig:
    """The metric that decides about the best checkpoint, early stopping, sweeps and comparisons."""

    metric: str | None = None  # of an evaluation, for example val/loss
    mode: Mode = Mode.min


@dataclass
class CheckpointConfig:
    """When to save, and what to keep. A checkpoint is saved whenever one of the three ``every`` settings is due."""

    every: Every | None = Every.auto  # auto: as often as saving costs less than 1 % of the time; null: not at all
    every_steps: int | None = None
    every_seconds: float | None = None
    max_unsaved: float = 1800.0  # seconds of training after which a run whose storage keeps failing ends
    background: bool = True  # write while training continues; false: wait for each checkpoint
    keep_last: int = LEAST_KEPT  # the newest ones
    # Also save and keep one at every multiple of so many steps, and the best ones by the objective. Training waits if
    # they come faster than the storage writes: there is memory for two copies.
    keep_every_steps: int | None = None
    keep_best: int = 1


@dataclass
class MetricsConfig:
    every_steps: int = 10  # training metrics are written as means over so many steps


@dataclass
class RuntimeConfig:
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    # For several processes (torchrun). ddp: each has the whole model; fsdp: each has a slice of it; auto: fsdp for
    # models that would fill more than half of a GPU.
    parallel: Parallel = Parallel.auto
    shard: int | None = None  # fsdp: processes that together hold one replica of the model; null: all
    # Seconds without a step, or a batch of an evaluation, after which the run ends and says what every thread does; the
    # longest step must take less. For several processes: also after which one that does not respond, or keeps the
    # others waiting, ends the run; must exceed the longest time to build the data. For a save, max_unsaved is added.
    timeout: float = 600.0
    compile: bool = False  # the model, with torch.compile
    num_workers: int = 0  # processes that load data; 0: the training process does
    prefetch: int = 2  # batches that each worker loads ahead
    start_method: str | None = None  # of data workers: fork, spawn, forkserver; null: Python's default
    num_threads: int | None = None  # of torch on the CPU; null: torch's default
    audit: bool = True  # at the start, draw a few samples twice and require that they are equal
    deterministic: bool = True  # refuse operations whose result can differ from call to call


@dataclass
class RunConfig:
    root: str = "outputs"  # a folder, or a URL of any store that fsspec supports: s3://bucket/experiments
    storage_options: dict[str, Any] = field(default_factory=dict)  # for fsspec; secrets only as ${oc.env:NAME}
    name: str | None = None  # of the run's directory; null: made from the overrides
    parent: str | None = None  # start from a checkpoint of another run: <its directory>, ...@<step> or ...@best
    inherit: Inherit = (
        Inherit.model
    )  # what to take from the parent. model: weights; all: also optimizer, data position, step
    on_drift: OnDrift = (
        OnDrift.refuse
    )  # if the configuration of an existing run changed: refuse, accept it, or fork the run
    on_conflict: OnConflict = OnConflict.fail  # if another process is working on the run: fail, wait, or steal the run


@dataclass
class SweepConfig:
    max_retries: int = 2  # of a run that fails repeatedly, counted over all commands
    retry_failed: bool = True
    # Each job of the basic and the joblib launcher in a process of its own; false: in that of the launcher, as a
    # debugger needs it.
    isolate: bool = True


@dataclass
class Config:
    """The whole configuration."""

    seed: int = 0
    model: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    task: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)  # name -> _target_ of a runner.callbacks.base.Callback
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def register() -> None:
    """Register the schema with Hydra as ``schema``, the first entry of the defaults list."""
    ConfigStore.instance().store(name="schema", node=Config)

"""From a configuration and a data set to the stream of training batches."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from runner.config.schema import Config, DataConfig, OnBadRecord
from runner.data.evaluation_data import require_map_style
from runner.data.fetch import Collate, Samples
from runner.data.iterable_stream import IterableStream
from runner.data.loader import LoaderOptions
from runner.data.mixture import Mixture
from runner.data.order import Interleaving
from runner.data.plan import Plan, Source
from runner.data.stream import MapStyleStream, TrainingStream
from runner.distributed.world import World
from runner.errors import ConfigError, DataError

log = logging.getLogger("runner")


def training_data(
    config: Config, samples: Any, loading: LoaderOptions, device: torch.device, collate: Collate | None, world: World
) -> tuple[TrainingStream, Plan | None]:
    """The stream of ``data.train``, and its plan if it is map-style. Raises DataError, ConfigError."""
    data = config.data
    if isinstance(samples, IterableDataset) or (hasattr(samples, "__iter__") and not hasattr(samples, "__getitem__")):
        _require_one(world, samples)
        return IterableStream(
            samples,
            seed=config.seed,
            batch_size=data.batch_size,
            micro_batches=config.trainer.accumulate,
            randomness=data.randomness.name,
            loading=loading,
            device=device,
            collate=collate,
            drop_last=data.tail.name == "drop",
            replay=data.replay,
            audit=config.runtime.audit,
        ), None
    plan = plan_of(config, require_map_style(samples, "data.train"), world)
    if plan.interleaving is not None:
        loading = _without_overlap(loading, plan, samples)
    stream = MapStyleStream(
        samples,
        plan,
        loading=loading,
        device=device,
        collate=collate,
        substitute=data.on_bad_record is OnBadRecord.substitute,
        audit=config.runtime.audit,
    )
    return stream, plan


def plan_of(config: Config, samples: Samples, world: World) -> Plan:
    """The plan for these samples and that number of processes. Raises DataError, ConfigError."""
    data = config.data
    in_streams = data.streams.count > 0 and data.shuffle
    shards = _shards(samples) if in_streams else ()
    sources: tuple[Source, ...] = ()
    if isinstance(samples, Mixture):
        sources = tuple(
            Source(len(source), share, _shards(source) if in_streams else ())
            for source, share in zip(samples.sources, samples.shares, strict=True)
        )
    sharded = bool(shards) or any(source.shards for source in sources)
    return Plan(
        samples=len(samples),
        seed=config.seed,
        batch_size=data.batch_size,
        micro_batches=_micro_batches(config, world),
        shuffle=data.shuffle,
        tail=data.tail.name,
        randomness=data.randomness.name,
        shards=shards,
        interleaving=_interleaving(data, config.trainer.accumulate) if sharded else None,
        sources=sources,
        max_tokens=data.max_tokens,
        lengths=() if data.max_tokens is None else _lengths(samples),
        world=world,
    )


def _micro_batches(config: Config, world: World) -> int:
    """Micro-batches per process and step, such that a step has the same samples as with one process, and no micro-batch
    is larger. Raises ConfigError for a number of processes that does not divide the step.
    """
    size, wanted = config.data.batch_size, config.trainer.accumulate
    if world.size == 1:
        return wanted
    if config.data.max_tokens is not None:  # these are planned ahead, for as many in a step
        if wanted % world.size:
            fits = [number for number in range(1, wanted + 1) if wanted % number == 0]
            raise ConfigError(_cannot_share(world, f"trainer.accumulate={wanted} micro-batches", fits))
        return wanted // world.size
    if size % world.size:
        fits = [number for number in range(1, size + 1) if size % number == 0]
        raise ConfigError(_cannot_share(world, f"data.batch_size={size} samples", fits))
    share = size // world.size
    equal = (number for number in range(-(-wanted // world.size), share + 1) if share % number == 0)
    return next(equal, wanted)


def _cannot_share(world: World, what: str, fits: Sequence[int]) -> str:
    return (
        f"{what} of a step cannot be shared out among {world.size} processes equally; "
        f"start {', '.join(map(str, fits))} of them. Another number is no other run"
    )


def _require_one(world: World, samples: Any) -> None:
    if world.size > 1:
        raise ConfigError(
            f"data.train is a {type(samples).__qualname__}, an iterable: each of {world.size} processes would read all "
            "of it. Make it map-style (__len__, __getitem__), which is dealt out to them, or train in one process"
        )


def _interleaving(data: DataConfig, micro_batches: int) -> Interleaving:
    size = max(1, data.batch_size // micro_batches)
    parts = next((parts for parts in range(4, size) if size % parts == 0), size)  # of a micro-batch, one per stream
    return Interleaving(data.streams.count, data.streams.window, data.streams.chunk or size // parts)


def _shards(samples: Any) -> tuple[int, ...]:
    counts: Sequence[int] = getattr(samples, "counts", ())
    return tuple(int(count) for count in counts)


def _lengths(samples: Any) -> tuple[int, ...]:
    lengths = getattr(samples, "lengths", None)
    if lengths is None:
        raise DataError(
            f"data.max_tokens needs the length of every sample before it is read, and data.train "
            f"({type(samples).__qualname__}) has no lengths; give it an attribute with one integer for each sample"
        )
    return tuple(np.asarray(lengths, dtype=np.int64).tolist())


def _without_overlap(loading: LoaderOptions, plan: Plan, samples: Any) -> LoaderOptions:
    """Reduce the number of workers so that no two read the same streams; tell the data set how much to hold."""
    assert plan.interleaving is not None
    count, wanted, world_size = plan.interleaving.count, loading.num_workers, plan.world.size
    if plan.sources or plan.max_tokens:  # neighbours come from streams in any order: each worker reads all of them
        workers, held = wanted, 2 * count
    else:
        slice_size = plan.batch_size // plan.slices_per_step
        chunks = max(1, slice_size // plan.interleaving.chunk)
        workers = plan.interleaving.max_workers(wanted, slice_size=slice_size, world=world_size)
        # One more for each micro-batch than it has streams, because epochs need not end with a micro-batch.
        held = min(count, count * (chunks + 1) // (chunks * max(1, workers) * world_size) + 1)
        if workers < wanted:
            log.warning(
                "workers  %d, not %d: more would read the same streams. Make data.streams.count a multiple of "
                "runtime.num_workers x %d",
                workers,
                wanted,
                chunks * world_size,
            )
    if hasattr(samples, "hold"):
        samples.hold(held, plan.interleaving.window)
    return replace(loading, num_workers=workers)

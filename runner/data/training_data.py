"""Builds the stream of training batches from a configuration and a data set."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate

from runner.config.schema import Config, OnBadRecord, RuntimeConfig
from runner.data.fetch import Collate, Fetcher, Samples
from runner.data.iterable import BatchOptions, IterableStream
from runner.data.limits import Limits, cores
from runner.data.loader import LoaderOptions
from runner.data.mixture import Mixture
from runner.data.order import Interleaving
from runner.data.plan import Plan, Source
from runner.data.stream import MapStyleStream, TrainingStream, stateful
from runner.data.weights import integer_weights
from runner.distributed.world import World, local_size
from runner.errors import ConfigError, DataError

Weights = Callable[[Any], Any]  # data set -> weights [samples], or first epoch -> weights from there on

log = logging.getLogger("runner")


def training_data(
    config: Config,
    samples: Any,
    loading: LoaderOptions,
    device: torch.device,
    collate: Collate | None,
    world: World,
    weights: Weights | None = None,
) -> tuple[TrainingStream, Plan | None]:
    """The stream of ``data.train``, and its plan if it is map-style. Raises DataError or ConfigError."""
    data = config.data
    if isinstance(samples, IterableDataset) or (hasattr(samples, "__iter__") and not hasattr(samples, "__getitem__")):
        if world.size > 1:
            raise ConfigError(
                f"data.train is an iterable ({type(samples).__qualname__}): each of {world.size} processes would read "
                "all of it. Make it map-style (__len__, __getitem__), or train in one process"
            )
        if weights is not None:
            raise ConfigError("data.weights need a data set with __len__ and __getitem__; an iterable draws by itself")
        options = BatchOptions(
            config.seed,
            data.batch_size // config.trainer.accumulate,
            data.randomness.name,
            collate or default_collate,
            drop_last=data.tail.name == "drop",
            replay=data.replay,
            audit=config.runtime.audit,
        )
        accumulate = config.trainer.accumulate
        return IterableStream(samples, options, micro_batches=accumulate, loading=loading, device=device), None
    plan = _plan(config, require_map_style(samples, "data.train"), weights, world)
    if plan.interleaving is not None:
        loading = _without_overlap(loading, plan, plan.interleaving, samples)
    substitute = data.on_bad_record is OnBadRecord.substitute
    fetcher = Fetcher(samples, plan, label="train", collate=collate, substitute=substitute)
    return MapStyleStream(fetcher, loading=loading, device=device, audit=config.runtime.audit), plan


def loader_options(runtime: RuntimeConfig, *, pin_memory: bool) -> LoaderOptions:
    """How batches are loaded in this process."""
    automatic = runtime.num_workers == "auto"
    return LoaderOptions(
        0 if automatic else int(runtime.num_workers),
        runtime.prefetch,
        runtime.start_method,
        pin_memory,
        limits=Limits(cores() / local_size(), timeout=runtime.timeout) if automatic else None,
    )


def require_map_style(samples: Any, key: str) -> Samples:
    """``samples``, if it is a map-style data set with at least one sample. Raises DataError naming the key."""
    name = type(samples).__qualname__
    both = ("__len__", "__getitem__")
    missing = both if isinstance(samples, IterableDataset) else [each for each in both if not hasattr(samples, each)]
    if missing:
        raise DataError(
            f"{key} is of class {name} without {' and '.join(missing)}; both are needed, so that a position says "
            "which sample comes next"
        )
    try:
        size = len(samples)
    except (TypeError, ValueError) as error:  # raised by a user's __len__
        raise DataError(f"{key} is of class {name}, whose length is not a number of samples: {error}") from error
    if size == 0:
        raise DataError(f"{key} is empty: {name} of length 0")
    if stateful(samples):
        why = "the position alone says which sample comes next, so no state of a data set with __getitem__ is saved"
        log.warning("ignored  state_dict of %s (a %s): %s", key, name, why)
    map_style: Samples = samples
    return map_style


def _plan(config: Config, samples: Samples, weights: Weights | None, world: World) -> Plan:
    data = config.data
    interleaved = data.streams.count > 0 and data.shuffle
    shards = _shards(samples) if interleaved and weights is None else ()
    sources: tuple[Source, ...] = ()
    if isinstance(samples, Mixture):
        sources = tuple(
            Source(len(source), share, _shards(source) if interleaved else ())
            for source, share in zip(samples.sources, samples.shares, strict=True)
        )
    interleaving, lengths = None, getattr(samples, "lengths", None)
    if shards or any(source.shards for source in sources):
        size = max(1, data.batch_size // config.trainer.accumulate)
        parts = next((n for n in range(4, size) if size % n == 0), size)  # the number of streams in a micro-batch
        interleaving = Interleaving(data.streams.count, data.streams.window, data.streams.chunk or size // parts)
    if data.max_tokens is not None and lengths is None:
        raise DataError(
            f"data.max_tokens needs the length of every sample before it is read, and data.train "
            f"({type(samples).__qualname__}) has no lengths; give it an attribute with one integer for each sample"
        )
    return Plan(
        samples=len(samples),
        seed=config.seed,
        batch_size=data.batch_size,
        micro_batches=_micro_batches(config, world),
        shuffle=data.shuffle,
        tail=data.tail.name,
        randomness=data.randomness.name,
        shards=shards,
        interleaving=interleaving,
        sources=sources,
        max_tokens=data.max_tokens,
        lengths=() if data.max_tokens is None else tuple(np.asarray(lengths, dtype=np.int64).tolist()),
        weights={} if weights is None else integer_weights(weights(samples), len(samples)),
        world=world,
    )


def _micro_batches(config: Config, world: World) -> int:
    """Micro-batches per process and step: none is larger than with one process. Raises ConfigError for a number of
    processes that does not divide the samples (or the planned micro-batches) of a step.
    """
    size, accumulate = config.data.batch_size, config.trainer.accumulate
    if world.size == 1:
        return accumulate
    by_tokens = config.data.max_tokens is not None  # the plan then fixes the number of micro-batches in a step
    total = accumulate if by_tokens else size
    if total % world.size:
        divisors = [number for number in range(1, total + 1) if total % number == 0]
        key = f"trainer.accumulate={total} micro-batches" if by_tokens else f"data.batch_size={total} samples"
        raise ConfigError(
            f"{key} of a step cannot be shared out among {world.size} processes equally; start "
            f"{', '.join(map(str, divisors))} of them. Changing the number of processes does not start a new run"
        )
    share = total // world.size
    if by_tokens:
        return share
    return next((n for n in range(-(-accumulate // world.size), share + 1) if share % n == 0), accumulate)


def _shards(samples: Any) -> tuple[int, ...]:
    return tuple(map(int, getattr(samples, "counts", ())))


def _without_overlap(loading: LoaderOptions, plan: Plan, interleaving: Interleaving, samples: Any) -> LoaderOptions:
    """Reduce the workers so that no two read the same streams, and say how many windows to hold."""
    count, limit, world_size = interleaving.count, loading.num_workers, plan.world.size
    if plan.sources or plan.max_tokens:  # any sample may be of any stream, so each worker reads all
        workers, windows = limit, 2 * count
    else:
        slice_size = plan.batch_size // plan.slices_per_step
        chunks = max(1, slice_size // interleaving.chunk)
        workers = interleaving.max_workers(limit, slice_size=slice_size, world=world_size)
        # A micro-batch may have one more stream than chunks, because an epoch may end inside it.
        windows = min(count, count * (chunks + 1) // (chunks * max(1, workers) * world_size) + 1)
        if loading.limits is not None:
            fit = partial(interleaving.max_workers, slice_size=slice_size, world=world_size)
            loading = replace(loading, limits=replace(loading.limits, fit=fit))
        if workers < limit:
            remedy = f"make data.streams.count a multiple of runtime.num_workers x {chunks * world_size}"
            log.warning("workers  %d, not %d: more would read the same streams; %s", workers, limit, remedy)
    if hasattr(samples, "hold"):
        samples.hold(windows, interleaving.window)
    return replace(loading, num_workers=workers)

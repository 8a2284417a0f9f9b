"""From a configuration to live objects: the one place that instantiates what a configuration names."""

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import chain
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from runner.average import moving_average
from runner.callbacks.base import Callback, notify, observers
from runner.checkpoint.structure import Structure
from runner.config.schema import Config, OnNonfinite, Parallel, Precision, TrainerConfig
from runner.data.evaluation_data import EvaluationData, require_map_style
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan
from runner.data.training_data import training_data
from runner.distributed.team import Parallelism, SingleDevice, Team
from runner.distributed.world import World
from runner.errors import ConfigError, RunnerError
from runner.evaluation import evaluate
from runner.metrics.writer import MetricWriter, WriterContext
from runner.modes import train_mode
from runner.rng import seed_all
from runner.seeds import derive
from runner.state import Progress, Stateful, TrainState
from runner.task import Task
from runner.update import WeightUpdate

log = logging.getLogger("runner")


@dataclass(frozen=True, slots=True)
class Parts:
    """The live objects of an experiment. ``evaluate`` is None if there is no validation data."""

    state: TrainState
    task: Task
    update: WeightUpdate
    parallelism: Parallelism
    plan: Plan | None  # None for iterable data
    recipe: dict[str, Any]  # from which the ledger can reconstruct the order of the samples
    evaluate: Callable[[TrainState], dict[str, float | str]] | None
    held_out: EvaluationData | None  # the data of ``evaluate``
    callbacks: dict[str, Callback]  # the user's, by the names that the configuration gives them


def build(config: Config, device: torch.device, team: Team) -> Parts:
    """Build all parts. Data and model get different random seeds, so that a change of one does not change the other."""
    loading = _loading(config, device)
    seed_all(derive("data", config.seed))
    collate = _partial(config.data.collate, "data.collate") if config.data.collate is not None else None
    stream, plan = training_data(
        config, _instance(config.data.train, "data.train"), loading, device, collate, team.world
    )
    validation = _validation(config, loading, device, collate, team.world)

    seed_all(derive("model", config.seed))
    model = _model(config.model).to(device)
    train_mode(model)
    task = _instance(config.task, "task", kind=Task)
    average = None if config.trainer.ema_decay is None else moving_average(model, config.trainer.ema_decay)
    parallelism = _parallelism(config, model, average, plan, device, team.world)
    if config.runtime.compile:
        model.compile()
    optimizer = _stepping(config.optimizer, [*model.named_parameters()], "optimizer")
    if isinstance(optimizer, Optimizer):
        optimizer.add_param_group = partial(_add_group, optimizer, model)  # type: ignore[method-assign]
    scheduler = _stepping(config.scheduler, optimizer, "scheduler")
    update = _update(config.trainer, model, optimizer, device, average, parallelism)
    state = TrainState(
        model=model,
        optimizer=parallelism.optimizer_part(optimizer),
        scheduler=scheduler,
        update=update,
        average=average,
        task=task if isinstance(task, Stateful) else None,
        stream=stream,
        progress=Progress(),
    )
    state.built = Structure({"model": model, **state.parts()}, optimizer, partial(_model, config.model))
    recipe = {"kind": "opaque"} if plan is None else plan.recipe()
    evaluation = _evaluation(config.seed, task, update, parallelism, validation, team)
    callbacks: dict[str, Callback] = {
        str(name): _instance(node, f"callbacks.{name}", kind=Callback) for name, node in config.callbacks.items()
    }
    return Parts(state, task, update, parallelism, plan, recipe, evaluation, validation, callbacks)


def _add_group(optimizer: Optimizer, model: nn.Module, group: dict[str, Any]) -> None:
    """``Optimizer.add_param_group`` that also takes weights without names: torch refuses them beside weights with
    names, which is how this optimizer was built.
    """
    weights = group["params"]
    weights = [weights] if isinstance(weights, Tensor) else weights
    if isinstance(weights, Sequence | Iterator) and "param_names" in optimizer.param_groups[0]:
        names = {id(weight): name for name, weight in model.named_parameters()}
        first = sum(len(each["params"]) for each in optimizer.param_groups)
        group = {
            **group,
            "params": [
                (names.get(id(weight), f"added.{number}"), weight) if isinstance(weight, Tensor) else weight
                for number, weight in enumerate(weights, first)
            ],
        }
    type(optimizer).add_param_group(optimizer, group)


def _model(node: Any) -> nn.Module:
    model: nn.Module = _instance(node, "model", kind=nn.Module)
    tensors = chain(model.named_parameters(), model.named_buffers())
    shapeless = [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]
    if shapeless:
        raise ConfigError(
            f"model: {', '.join(shapeless)} of lazy modules have no shape yet, and without one no checkpoint can be "
            "loaded: give the sizes, or call the model on zeros at the end of its constructor"
        )
    return model


def _update(
    trainer: TrainerConfig,
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    average: AveragedModel | None,
    parallelism: Parallelism,
) -> WeightUpdate:
    return WeightUpdate(
        model,
        optimizer,
        device=device,
        precision=trainer.precision.name,
        scaler=torch.amp.GradScaler(device.type) if trainer.precision is Precision.fp16 else None,
        clip_norm=trainer.clip_norm,
        skip_nonfinite=trainer.on_nonfinite is OnNonfinite.skip,
        average=average,
        parallelism=parallelism,
    )


def _parallelism(
    config: Config,
    model: nn.Module,
    average: AveragedModel | None,
    plan: Plan | None,
    device: torch.device,
    world: World,
) -> Parallelism:
    """Replicate or shard the model over the processes. Raises ConfigError for settings that contradict each other."""
    if world.size == 1:
        if config.runtime.parallel is not Parallel.auto or config.runtime.shard is not None:
            log.warning(
                "alone    runtime.parallel and runtime.shard are for several processes: start them with torchrun"
            )
        return SingleDevice()
    assert plan is not None, "iterable data was refused"
    runtime = config.runtime
    models = [model] if average is None else [model, average.module]
    if not _sharded(runtime.parallel, model, device):
        from runner.distributed.parallel import Replicated

        return Replicated(models, micro_batches=plan.micro_batches)
    from runner.distributed.parallel import Sharded

    shard = runtime.shard or world.size
    if world.size % shard:
        raise ConfigError(f"runtime.shard={shard} does not divide the {world.size} processes into equal replicas")
    if config.trainer.precision is Precision.fp16:
        raise ConfigError("trainer.precision=fp16 needs runtime.parallel=ddp: losses are not scaled in slices; or bf16")
    return Sharded(models, device=device, shard=shard, micro_batches=plan.micro_batches)


def _sharded(parallel: Parallel, model: nn.Module, device: torch.device) -> bool:
    """Whether to shard. ``auto``: if weights, gradients and two moments need more than half of the device's memory."""
    if parallel is not Parallel.auto or device.type != "cuda":
        return parallel is Parallel.fsdp
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return 4 * size > torch.cuda.get_device_properties(device).total_memory / 2


def _validation(
    config: Config, loading: LoaderOptions, device: torch.device, collate: Callable[..., Any] | None, world: World
) -> EvaluationData | None:
    if config.data.validation is None:
        return None
    return EvaluationData(
        require_map_style(_instance(config.data.validation, "data.validation"), "data.validation"),
        seed=config.seed,
        batch_size=config.data.evaluation_batch_size,
        randomness=config.data.randomness.name,
        loading=loading,
        device=device,
        collate=collate,
        world=world,
        audit=config.runtime.audit,
    )


def _evaluation(
    seed: int, task: Task, update: WeightUpdate, parallelism: Parallelism, data: EvaluationData | None, team: Team
) -> Callable[[TrainState], dict[str, float | str]] | None:
    if data is None:
        return None

    changed: set[str] = set()

    def report(state: TrainState) -> dict[str, float | str]:
        key, model, how = derive("evaluation", seed, state.progress.step), state.evaluated_model, update.autocast
        metrics = evaluate(task, model, data, key=key, autocast=how, team=team, trained=state.model, changed=changed)
        parallelism.sync_buffers()  # an evaluation may move buffers, too, in each process by the batches that it has
        return {f"val/{name}": value for name, value in metrics.items()}

    return report


def _loading(config: Config, device: torch.device) -> LoaderOptions:
    runtime = config.runtime
    return LoaderOptions(runtime.num_workers, runtime.prefetch, runtime.start_method, pin_memory=device.type == "cuda")


def _instance(node: Any, key: str, *, kind: type = object, **options: Any) -> Any:
    """The object that the configuration names under ``key``. Raises ConfigError if it cannot be constructed, or
    is not of that ``kind``; errors of the runner that its constructor raises pass through.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(
            f"{key} needs a _target_: the dotted path of the class or function that makes it, as in "
            f"{key.rpartition('.')[2]}: {{_target_: my_module.MyClass}}"
        )
    try:
        instance = instantiate(node, **{"_convert_": node.get("_convert_", "all"), **options})  # plain lists and dicts
    except InstantiationException as error:
        if isinstance(error.__cause__, RunnerError):
            raise error.__cause__ from None
        raise ConfigError(_why(node, key, error)) from error
    if not isinstance(instance, kind):
        raise ConfigError(f"{key} is a {_path(type(instance))}; expected an object of a subclass of {_path(kind)}")
    notify(observers, "on_instance", key, instance)
    return instance


def _partial(node: Any, key: str) -> Callable[..., Any]:
    maker: Callable[..., Any] = _instance(node, key, _partial_=True)
    return maker


def _stepping(node: Any, argument: Any, key: str) -> Any:
    """An optimizer or scheduler. Raises ConfigError if it has no ``step()`` without arguments, as training calls it."""
    maker = _partial(node, key)
    try:
        instance = maker(argument)
    except (TypeError, ValueError) as error:
        path = _path(maker.func if isinstance(maker, partial) else maker)
        raise ConfigError(f"{key}: {path}: {error}{_hint(str(error), key)}") from error
    try:
        signature(type(instance).step).bind(instance)
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"{key}: training calls step() without arguments, which {_path(type(instance))} does not take: {error}"
        ) from error
    return instance


def metric_writer(node: Any, name: str, context: WriterContext) -> MetricWriter:
    """The writer that the configuration names under ``metrics.writers``. Raises ConfigError if it cannot be
    constructed or lacks a method; errors of the runner that its constructor raises pass through.
    """
    key = f"metrics.writers.{name}"
    maker = _partial(node, key)
    try:
        writer: MetricWriter = maker(context)
    except RunnerError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}: {node._target_} raised an error:\n{_frames(error)}") from error
    lacking = [name for name in ("add", "mark", "flush", "close") if not callable(getattr(writer, name, None))]
    if lacking:
        raise ConfigError(
            f"{key}: {_path(type(writer))} has no method {', '.join(lacking)}; runner.metrics.writer.MetricWriter "
            "describes what a writer needs"
        )
    return writer


def _why(node: DictConfig, key: str, error: InstantiationException) -> str:
    """Hydra's message in the words of the cause, with the lines of the constructor that led to an error inside it."""
    cause = error.__cause__
    if cause is None:
        return f"{key}: {error}"
    if str(error).startswith("Error locating target"):
        return f"{key}._target_: {cause}"
    message = _frames(cause)
    return f"{key}: {node._target_} cannot be called with the configured arguments:\n{message}{_hint(message, key)}"


def _frames(error: BaseException) -> str:
    """An error with the lines of code that led to it, without the first: the call of the constructor."""
    lines = traceback.format_list(traceback.extract_tb(error.__traceback__)[1:])
    return "".join([*lines, f"{type(error).__name__}: {error}"])


def _hint(message: str, key: str) -> str:
    """The remedy where a key of the default option, over which Hydra lays the experiment's own, does not fit."""
    if "unexpected keyword argument" not in message:
        return ""
    return f". If the default {key} gave it, leave that out: `defaults: [override /{key}: null]`"


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"

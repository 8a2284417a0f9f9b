"""From a configuration to live objects: the one place that instantiates what a configuration names."""

import copy
import logging
import re
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch import nn
from torch.optim import Optimizer

from runner.callbacks.base import Callback, Observer, TrainingSetup, notify, observers
from runner.callbacks.evaluate import Best, EarlyStopping, Evaluate, Interval, LastEvaluation, StepSchedule
from runner.callbacks.reporting import FiniteLoss, KeepLedger, NoteProgress, Report, ShowProgress
from runner.callbacks.saving import SaveCheckpoint, SaveTimer
from runner.checkpoint.store import CheckpointStore, Retention
from runner.checkpoint.structure import Structure
from runner.config.schema import Config, Every, OnDrift, OnNonfinite, Parallel, Precision, TrainerConfig, plain_value
from runner.data.ledger import Ledger
from runner.data.mixture import head
from runner.data.plan import Plan
from runner.data.stream import EvaluationData, TrainingStream
from runner.data.training_data import loader_options, require_map_style, training_data
from runner.distributed.communicator import Parallelism, Team
from runner.distributed.world import World
from runner.errors import ConfigError, RunnerError, import_hint
from runner.evaluation import Evaluator
from runner.hashing import derive
from runner.metrics.lines import LinesWriter
from runner.metrics.service import ServiceProcess, ServiceWriter
from runner.metrics.writer import MetricWriter, MetricWriters, WriterContext
from runner.optimizers import (
    Named,
    NamedWeights,
    add_group,
    divide,
    for_each,
    grouped,
    matching,
    require_plain_step,
    settings_of,
    step_error,
    takes_metric,
    without_names,
)
from runner.rng import seed_all
from runner.run.attempts import Attempt
from runner.run.opening import RunSpec
from runner.state import Progress, Stateful, TrainState
from runner.task import Task
from runner.update import WeightUpdate, moving_average, not_averaged, train_mode

log = logging.getLogger("runner")


@dataclass(frozen=True, slots=True)
class Parts:
    """The live objects of an experiment."""

    state: TrainState
    task: Task
    update: WeightUpdate
    parallelism: Parallelism
    plan: Plan | None  # None for iterable data
    recipe: dict[str, Any]  # from which the ledger can reconstruct the order of the samples
    evaluator: Evaluator
    reference: nn.Module | None  # the model as it was built, for a task that needs a reference
    own_callbacks: dict[str, Callback]  # the user's, by the names that the configuration gives them


def build(config: Config, device: torch.device, team: Team) -> Parts:
    """Build all parts. Data and model get different random seeds, so that a change of one does not change the other."""
    trainer = config.trainer
    seed_all(derive("data", config.seed))
    stream, plan, sets = _data(config, device, team.world)

    seed_all(derive("model", config.seed))
    model = _model(config.model).to(device)
    train_mode(model)
    task = instance(config.task, "task", kind=Task)
    reference = copy.deepcopy(model) if task.needs_reference else None
    for part in vars(task).values():
        if isinstance(part, nn.Module):
            part.to(device)
    if type(task).setup is not Task.setup:
        seed_all(derive("task", config.seed))
        task.setup(model, device)
    average = None if trainer.ema_decay is None else moving_average(model, trainer.ema_decay)
    models = [model] if average is None else [model, average.module]
    parallelism = _parallelism(config, models, plan, device, team.world)  # before the optimizer: FSDP replaces weights
    if config.runtime.compile:
        model.compile()
    optimizer = _optimizers(config.optimizer, model, task)
    scheduler, interval = _schedulers(config, optimizer, plan)
    update = WeightUpdate(
        model,
        optimizer,
        device=device,
        precision=trainer.precision.name,
        scaler=torch.amp.GradScaler(device.type) if trainer.precision is Precision.fp16 else None,
        clip_norm=trainer.clip_norm,
        skip_nonfinite=trainer.on_nonfinite is OnNonfinite.skip,
        average=average,
        not_averaged=not_averaged(model, trainer.ema_params),
        parallelism=parallelism,
        positions=lambda: stream.positions,
        gather=team.all_gather,
    )
    state = TrainState(
        model=model,
        optimizer=for_each(parallelism.optimizer_part, optimizer),
        scheduler=scheduler,
        update=update,
        average=average,
        task=task if isinstance(task, Stateful) else None,
        stream=stream,
        progress=Progress(),
        scheduler_interval=interval,
    )
    state.structure = Structure({"model": model, **state.parts()}, optimizer, partial(_model, config.model))
    recipe = {"kind": "opaque"} if plan is None else plan.recipe()
    metric = config.objective.metric
    evaluator = Evaluator(
        task, update.autocast, parallelism, team, config.seed, metric, *sets, config.runtime.check_batches
    )
    own = {str(name): instance(node, f"callbacks.{name}", kind=Callback) for name, node in config.callbacks.items()}
    return Parts(state, task, update, parallelism, plan, recipe, evaluator, reference, own)


def _data(
    config: Config, device: torch.device, world: World
) -> tuple[TrainingStream, Plan | None, tuple[dict[str, EvaluationData], dict[str, EvaluationData]]]:
    """The training data with its plan, and the sets of validation and test data."""
    data, runtime = config.data, config.runtime
    loading = loader_options(runtime, pin_memory=device.type == "cuda")
    collate = _collate(data.collate, "data.collate")
    train = instance(data.train, "data.train")
    if data.overfit is not None:
        train = head(require_map_style(train, "data.train"), data.overfit)
    weighted = data.weights is not None and data.overfit is None
    weights = instance(data.weights, "data.weights", _partial_=True) if weighted else None
    stream, plan = training_data(config, train, loading, device, collate, world, weights)
    collate = _collate(data.evaluation_collate, "data.evaluation_collate") or collate

    def evaluation_data(node: Any, key: str) -> EvaluationData:
        held_out = require_map_style(train if data.overfit is not None else instance(node, key), key)
        return EvaluationData(
            head(held_out, 2 * data.evaluation_batch_size) if config.run.dry else held_out,
            seed=config.seed,
            batch_size=data.evaluation_batch_size,
            randomness=data.randomness.name,
            loading=loading,
            device=device,
            collate=collate,
            world=world,
            audit=runtime.audit,
            key=key,
        )

    def sets(node: Any, key: str, name: str) -> dict[str, EvaluationData]:
        if node is None:
            return {}
        if not isinstance(node, DictConfig) or "_target_" in node:
            return {name: evaluation_data(node, key)}
        nodes = {str(each): inner for each, inner in node.items()}
        if invalid := [each for each in nodes if "/" in each]:
            raise ConfigError(f"{key}.{invalid[0]}: the name of a set has no slash")
        return {f"{name}/{each}": evaluation_data(inner, f"{key}.{each}") for each, inner in nodes.items()}

    return stream, plan, (sets(data.validation, "data.validation", "val"), sets(data.test, "data.test", "test"))


def _model(node: Any) -> nn.Module:
    model: nn.Module = instance(node, "model", kind=nn.Module)
    tensors = chain(model.named_parameters(), model.named_buffers())
    if shapeless := [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]:
        raise ConfigError(
            f"model: {', '.join(shapeless)} of lazy modules have no shape yet, and without one no checkpoint can be "
            "loaded: give the sizes, or call the model on zeros at the end of its constructor"
        )
    scripts = (name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule))
    if (script := next(scripts, None)) is not None:
        raise ConfigError(
            f"model{'.' * bool(script)}{script} is a TorchScript module, whose buffers cannot be restored: give the "
            "module as it was before torch.jit, and runtime.compile=true for speed; script the exported weights later"
        )
    return model


def _parallelism(
    config: Config, models: list[nn.Module], plan: Plan | None, device: torch.device, world: World
) -> Parallelism:
    """Replicate or shard the model over the processes. Raises ConfigError for settings that contradict each other."""
    if world.size == 1:
        if config.runtime.parallel is not Parallel.auto or config.runtime.shard is not None:
            log.warning("alone    runtime.parallel and runtime.shard need several processes, which torchrun starts")
        return Parallelism()
    assert plan is not None, "iterable data was refused"
    runtime = config.runtime
    micro_batches = None if _is_by_name(config.optimizer) else plan.micro_batches
    sharded = runtime.parallel is Parallel.fsdp
    if runtime.parallel is Parallel.auto and device.type == "cuda":
        # Weights, gradients and two moments would need more than half of the device's memory.
        size = sum(parameter.numel() * parameter.element_size() for parameter in models[0].parameters())
        sharded = 4 * size > torch.cuda.get_device_properties(device).total_memory / 2
    from runner.distributed.parallel import Replicated, Sharded

    if not sharded:
        return Replicated(models, micro_batches=micro_batches)
    shard = runtime.shard or world.size
    if world.size % shard:
        raise ConfigError(f"runtime.shard={shard} does not divide the {world.size} processes into equal replicas")
    if config.trainer.precision is Precision.fp16:
        raise ConfigError("trainer.precision=fp16 needs runtime.parallel=ddp: losses are not scaled in slices; or bf16")
    return Sharded(models, device=device, shard=shard, micro_batches=micro_batches)


def make_callbacks(
    config: Config,
    parts: Parts,
    spec: RunSpec,
    configured: Mapping[str, Callback],
    number: int,
    attempt: Attempt | None,
    team: Team,
) -> dict[str, Callback]:
    """All callbacks of an attempt in the order in which they run, by the names under which a checkpoint holds their
    state. All processes have the same callbacks with state; only rank 0 has those that write records.
    """
    location, writers = spec.directory.location, MetricWriters()
    guard, evaluation = FiniteLoss(), _evaluation_callbacks(config, parts)
    callbacks: dict[str, Callback] = {}
    if attempt is not None:
        accept = config.run.on_drift is OnDrift.accept or bool(spec.changes)
        ledger = Ledger(location, attempt=number, recipe=parts.recipe, grouping=config.data.batch_size, accept=accept)
        callbacks["ledger"] = KeepLedger(ledger, parts.task)
    if config.trainer.on_nonfinite is OnNonfinite.stop:
        callbacks["finite_loss"] = guard
    callbacks |= evaluation | {f"own.{name}": own for name, own in parts.own_callbacks.items()}
    callbacks |= {"last": LastEvaluation([*evaluation.values()]), **configured}
    best: Any = evaluation.get("best")
    callbacks["report"] = Report(every_steps=config.metrics.every_steps, writers=writers, best=best, team=team)
    if attempt is not None:
        callbacks |= {"progress": ShowProgress(config.metrics.show), "heartbeat": NoteProgress(attempt)}
    checkpoint, goal = config.checkpoint, config.objective
    mode = goal.mode.name if goal.metric else None
    callbacks["checkpoint"] = SaveCheckpoint(
        CheckpointStore(location, team.channel("writer")),
        SaveTimer(checkpoint.every_steps, checkpoint.every_seconds, checkpoint.every is Every.auto),
        Retention(
            last=checkpoint.keep_last, every_steps=checkpoint.keep_every_steps, best=checkpoint.keep_best, mode=mode
        ),
        attempt_number=number,
        identity=spec.identity,
        attempt=attempt,
        records=[] if attempt is None else [ledger, writers],
        guard=guard,
        max_unsaved=checkpoint.max_unsaved,
        background=checkpoint.background,
        comm=team.comm,
    )
    return callbacks


def make_observers(config: Config) -> dict[str, Callback]:
    """The configured observers, by the names that they have among the callbacks of an attempt."""
    nodes = {str(name): node for name, node in config.observers.items() if node is not None}
    return {f"observer.{name}": instance(node, f"observers.{name}", kind=Observer) for name, node in nodes.items()}


def _evaluation_callbacks(config: Config, parts: Parts) -> dict[str, Callback]:
    """The callback that evaluates, and the callbacks that use its results."""
    trainer, metric, mode = config.trainer, config.objective.metric, config.objective.mode.name
    if not parts.evaluator.validation:
        return {}
    interval = Interval(steps=trainer.evaluate_every_steps, epochs=trainer.evaluate_every_epochs)
    callbacks: dict[str, Callback] = {"evaluate": Evaluate(interval, parts.evaluator)}
    if metric is not None:
        callbacks["best"] = Best(metric, mode, config.checkpoint.keep_best)
        if parts.state.schedulers("evaluation"):
            callbacks["schedule"] = StepSchedule()
        stopping = trainer.early_stopping
        if stopping.patience is not None or stopping.target is not None:
            callbacks["early_stopping"] = EarlyStopping(mode, stopping.patience, stopping.min_delta, stopping.target)
    return callbacks


def instance(node: Any, key: str, *arguments: Any, kind: type = object, **options: Any) -> Any:
    """The object that the configuration names under ``key``, made with ``arguments`` and ``options`` in addition.
    Raises ConfigError if it cannot be constructed, or is not of that ``kind``; errors of the runner that its
    constructor raises pass through.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        example = f"as in {key.rpartition('.')[2]}: {{_target_: my_module.MyClass}}"
        raise ConfigError(f"{key} needs a _target_: the dotted path of the class or function that makes it, {example}")
    try:
        options["_convert_"] = node.get("_convert_", "all")  # to plain lists and dicts
        thing = instantiate(node, *arguments, **options)
    except InstantiationException as error:
        if isinstance(error.__cause__, RunnerError):
            raise error.__cause__ from None
        raise ConfigError(_instantiation_error(node, key, error)) from error
    if not isinstance(thing, kind):
        raise ConfigError(f"{key} is a {_path(type(thing))}; expected an object of a subclass of {_path(kind)}")
    notify(observers, "on_instance", key, thing)
    return thing


def _collate(node: Any, key: str) -> Any:
    """What makes a batch of samples: a function, or an object with ``__call__``, as in transformers; None for null."""
    maker = None if node is None else instance(node, key, _partial_=True)
    kind = getattr(maker, "func", None)
    return instance(node, key) if any("__call__" in vars(base) for base in getattr(kind, "__mro__", ())) else maker


def _is_by_name(node: Any) -> bool:
    """Whether a configuration has several optimizers or schedulers, by name."""
    inner = [*node.values()] if isinstance(node, DictConfig) and "_target_" not in node else []
    return bool(inner) and all(isinstance(each, DictConfig) for each in inner)


def _optimizers(node: Any, model: nn.Module, task: Task) -> Any:
    """The optimizer, or several by name, each with its share of the weights. Raises ConfigError."""
    if not _is_by_name(node):
        return _optimizer(node, model, task, "optimizer", [*model.named_parameters()])
    if wrong := [name for name in map(str, node) if not name.isidentifier()]:
        raise ConfigError(f"optimizer: {wrong[0]!r} is not a name: use letters, digits and _")
    with_params = {str(name): plain_value(each, "params") if "params" in each else None for name, each in node.items()}
    shares = divide(model, with_params, task.divide(model))
    return Named({name: _optimizer(node[name], model, task, f"optimizer.{name}", shares[name]) for name in shares})


def _optimizer(node: Any, model: nn.Module, task: Task, key: str, weights: NamedWeights) -> Any:
    maker = instance(node, key, _partial_=True)
    settings = settings_of(maker)
    if (patterns := settings.pop("params", None)) is not None and key == "optimizer":
        matches = {*matching(dict(weights), patterns, "optimizer.params")}
        weights = [(name, weight) for name, weight in weights if name in matches]
    rate = getattr(maker, "keywords", {}).get("lr")
    groups = partial(grouped, model, weights, key, lr=rate, **settings)
    with_names = groups()
    try:
        optimizer = maker(with_names)
    except Exception:  # not every optimizer takes weights with their names
        optimizer = _construct(maker, without_names(groups()), key)
    if type(task).optimization_step is Task.optimization_step:
        require_plain_step(optimizer, key)
    if isinstance(optimizer, Optimizer):
        optimizer.add_param_group = partial(add_group, optimizer, model)  # type: ignore[method-assign]
    return optimizer


def _construct(maker: Any, argument: Any, key: str) -> Any:
    """An optimizer or scheduler, built by what the configuration names."""
    try:
        return maker(argument)
    except (TypeError, ValueError) as error:
        path = _path(maker.func if isinstance(maker, partial) else maker)
        raise ConfigError(f"{key}: {path}: {error}{_hint(str(error), key)}") from error


def training_steps(trainer: TrainerConfig, plan: Plan | None) -> int | None:
    """The smaller of ``max_steps`` and the steps in ``max_epochs``; the latter are unknown for some data."""
    epochs = None if trainer.max_epochs is None or plan is None else plan.steps_of(trainer.max_epochs)
    return min((limit for limit in (trainer.max_steps, epochs) if limit is not None), default=None)


def _schedulers(config: Config, optimizer: Any, plan: Plan | None) -> tuple[Any, Any]:
    """The scheduler and its interval; for several optimizers those of each. Raises ConfigError."""
    # A step without an update moves the schedule, too: one whose rollouts are all dropped, or that overflowed.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    node = config.scheduler
    if not isinstance(optimizer, Named):
        return _scheduler(config, node, "scheduler", optimizer, plan)
    nodes = dict.fromkeys(optimizer, (node, "scheduler"))
    if _is_by_name(node):
        nodes = {name: (node[name], f"scheduler.{name}") for name in node}
    if nodes.keys() != optimizer.keys():
        expected = ", ".join(optimizer)
        raise ConfigError(f"scheduler has {', '.join(nodes)}: give one for each optimizer ({expected}), or one for all")
    pairs = {name: _scheduler(config, *nodes[name], each, plan) for name, each in optimizer.items()}
    schedulers, intervals = zip(*pairs.values(), strict=True)
    return Named(zip(pairs, schedulers, strict=True)), Named(zip(pairs, intervals, strict=True))


def _scheduler(config: Config, node: Any, key: str, optimizer: Any, plan: Plan | None) -> tuple[Any, str]:
    """A scheduler, and when it steps: after each ``step`` or ``epoch`` (``scheduler.interval``), or after each
    ``evaluation``, if its ``step`` takes a metric, as that of ReduceLROnPlateau does.

    ``total_steps`` that is null becomes the number of intervals of the run. Raises ConfigError.
    """
    interval, options = None, dict[str, Any]()
    if isinstance(node, DictConfig) and "interval" in node:
        node = copy.copy(node)
        with open_dict(node):
            interval = node.pop("interval")
        if interval not in ("step", "epoch"):
            raise ConfigError(f"{key}.interval={interval} is not one of step, epoch")
    last = config.trainer.max_epochs if interval == "epoch" else training_steps(config.trainer, plan)
    if isinstance(node, DictConfig) and "total_steps" in node:
        if node.total_steps is None:
            options["total_steps"] = last
        elif last is not None and node.total_steps > last:
            unit = interval or "step"
            log.warning("schedule %s.total_steps=%d, but the run ends at %s %d", key, node.total_steps, unit, last)
    scheduler = _construct(instance(node, key, _partial_=True, **options), optimizer, key)
    if not step_error(scheduler) or not takes_metric(scheduler):
        require_plain_step(scheduler, key)
        return scheduler, interval or "step"
    _require_objective(config, key, scheduler, interval)
    return scheduler, "evaluation"


def _require_objective(config: Config, key: str, scheduler: Any, interval: str | None) -> None:
    """Raise ConfigError if there is no objective for a scheduler that steps by it, or it is of the other mode."""
    goal, path = config.objective, _path(type(scheduler))
    if goal.metric is None or config.data.validation is None:
        raise ConfigError(
            f"{key}: {path} steps by the objective: set data.validation and objective.metric, for example val/loss"
        )
    if (mode := getattr(scheduler, "mode", goal.mode.name)) != goal.mode.name:
        raise ConfigError(f"{key}.mode={mode} contradicts objective.mode={goal.mode.name}; make them the same")
    if interval is not None:
        raise ConfigError(f"{key}.interval={interval}: {path} steps after evaluations; leave the interval out")


def open_writers(spec: RunSpec, setup: TrainingSetup, step: int, facts: Mapping[str, Any]) -> None:
    """Construct the configured metric writers, each with its mark among the ``facts`` of the commit that was resumed.

    Raises ConfigError for a writer that cannot be constructed; errors of the runner that its
    constructor raises pass through.
    """
    report, directory = setup.callbacks["report"], spec.directory
    assert isinstance(report, Report)
    place = (directory.location, directory.experiment, directory.name, spec.identity, setup.attempt, step)
    context = WriterContext(*place, id=str((directory.record() or {}).get("id")), options=directory.options)
    writers = report.writers
    writers.resume(facts)
    for name, node in setup.writers.items():
        writers.by_name[name] = _writer(node, name, replace(context, mark=writers.marks.get(name)))
    if services := [name for name, writer in writers.by_name.items() if isinstance(writer, ServiceProcess)]:
        if not any(isinstance(writer, LinesWriter) for writer in writers.by_name.values()):
            raise ConfigError(f"metrics.writers.{services[0]} sends the lines of metrics.writers.lines, which is null")
        writers.committed()


def _writer(node: Any, name: str, context: WriterContext) -> MetricWriter:
    key = f"metrics.writers.{name}"
    maker = instance(node, key, _partial_=True)
    if isinstance(kind := getattr(maker, "func", maker), type) and issubclass(kind, ServiceWriter):
        return ServiceProcess(name, f"{kind.__module__}:{kind.__qualname__}", getattr(maker, "keywords", {}), context)
    writer: MetricWriter = instance(node, key, context, kind=MetricWriter)
    return writer


def _instantiation_error(node: DictConfig, key: str, error: InstantiationException) -> str:
    """Hydra's message in the words of the cause, with its own causes and the lines of code that led to them."""
    cause = error.__cause__
    if cause is None:
        return f"{key}: {error}"
    if str(error).startswith("Error locating target"):
        version = f" This is torch {torch.__version__}." if str(node._target_).startswith("torch.") else ""
        where = version + import_hint(cause)
        if "." not in str(node._target_):
            dotted = str(node._target_).replace(":", ".")
            example = dotted if "." in dotted else f"my_module.{dotted}"
            return f"{key}._target_: {node._target_} needs its module and a dot, as in {example}"
        # Hydra asks so, too, where the module is there and its import fails.
        return f"{key}._target_: {f'{cause}{where}' if where else str(cause).partition('Are you sure that module')[0]}"
    cause.__traceback__ = cause.__traceback__ and cause.__traceback__.tb_next  # without the call of the constructor
    message = "".join(traceback.format_exception(cause)).replace("Traceback (most recent call last):\n", "").rstrip()
    problem = "raised" if "\n" in message else "cannot be called with the configured arguments:"
    return f"{key}: {node._target_} {problem}\n{message}{_hint(message, key)}"


def _hint(message: str, key: str) -> str:
    """The remedy for an argument that may come from an option, with which Hydra merges the experiment's own keys."""
    if not (argument := re.search(r"unexpected keyword argument '(\w+)'", message)):
        return ""
    remedy = f". '~{key}.{argument[1]}' leaves it out. If an option gave it, "
    if "." in key:
        return f"{remedy}which Hydra merges with your {key}, give its whole group without the option"
    return f"{remedy}choose none: `defaults: [override /{key}: null]`"


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"

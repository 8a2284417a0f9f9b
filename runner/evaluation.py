"""One pass over evaluation data: exact means, rows in order, and no change of the training state."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from runner import signals
from runner.activity import doing
from runner.checkpoint.encoding import decode, encode, is_expanded
from runner.checkpoint.sharding import is_distributed, local
from runner.data.stream import EvaluationData
from runner.distributed.communicator import Parallelism, Team, on_all_ranks
from runner.errors import ConfigError, EvaluationFailed, Interrupted, TaskError, printable
from runner.hashing import derive
from runner.rng import seed_all, temporary_seed
from runner.task import Task, check_metrics, type_text

_SAMPLES = ""  # the key of the number of samples among the sums; no metric has this name
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
_REMEDY = (
    "A sum that a task keeps by itself covers only the batches of its own process. Return from evaluation_step values "
    "that can be averaged over samples (such as the share of correct answers), or tensors with a row for each sample, "
    "and compute the rest in evaluation_end from these means and the rows of all processes"
)
_SIDE_EFFECT = (
    "the evaluation changes %s of the model in training, so that training depends on how often it is evaluated: let "
    "%s.evaluation_step neither call model.train() nor write to the model"
)
_NOT_RESET = (
    "%s keeps the values of this evaluation, and the next evaluation, or the next set, adds its own to them: call "
    "its reset() in evaluation_end"
)

log = logging.getLogger("runner")

T = TypeVar("T")


class EvaluationInterrupted(Exception):
    """A stop signal arrived during the evaluation; the resumed run repeats it."""


@dataclass(eq=False)
class Evaluator:
    """Evaluates a state on the sets of ``data.validation``, whose names are ``val`` or ``val/NAME``, and once, with the
    weights of the result, on those of ``data.test`` (``test`` or ``test/NAME``). The processes of the team divide the
    batches of a set among themselves.
    """

    task: Task
    autocast: Callable[[], AbstractContextManager[Any]]
    parallelism: Parallelism
    team: Team
    seed: int
    metric: str | None
    validation: Mapping[str, EvaluationData]
    test: Mapping[str, EvaluationData]
    check_batches: int = 0

    def __post_init__(self) -> None:
        self._changed: set[str] = set()  # names of weights, buffers and metrics whose change was warned of

    @doing("ends evaluation")
    def evaluate_validation(self, model: nn.Module, trained: nn.Module, step: int) -> dict[str, float | str]:
        """The report on all validation sets after a step. ``trained`` is the model in training, of which ``model`` may
        be the average. Warns, once for each, of its weights and buffers that the evaluation changed, and of metrics of
        the task that it did not reset.

        Raises EvaluationInterrupted after a stop signal, and EvaluationFailed for any error and for a report without
        the objective, in all processes and with the buffers of both models and the task's state as they were before. An
        evaluation that has changed weights cannot be undone: after a signal it is finished first, and its own error is
        raised as it is. Nor can a failure of ``evaluation_step`` with FSDP, since other processes may wait for its
        slices.
        """
        backup = _Backup([*dict.fromkeys([model, trained])], self.task)
        updates = _updates(self.task)
        key = derive("evaluation", self.seed, step)
        report = self._evaluate(model, self.validation, key, backup, metric=self.metric)
        self._warn(_SIDE_EFFECT, backup.changes(), type(self.task).__name__)
        self._warn(_NOT_RESET, {name for name, count in _updates(self.task).items() if count > updates.get(name, 0)})
        return report

    @doing("ends evaluation")
    def evaluate_test(self, model: nn.Module) -> dict[str, float | str]:
        """The report on all test sets; every step is committed. Raises Interrupted and EvaluationFailed."""
        try:
            return self._evaluate(model, self.test, derive("test", self.seed), _Backup([model], self.task))
        except EvaluationInterrupted:
            raise self._interrupted("in the evaluation of data.test, before which every step was committed") from None
        except EvaluationFailed as error:
            remedy = "Correct the code, and run the same command again"
            error.extend(f"This is the evaluation of data.test, before which every step was committed. {remedy}")
            raise
        finally:
            self.team.disarm_timeout()

    @doing("ends evaluation")
    def rehearse(self, models: Sequence[nn.Module]) -> None:
        """Evaluate ``check_batches`` of each set by the first of the ``models``, so that a mistake shows before
        training. Leaves no trace in any of them.
        """
        batches = self.check_batches
        if not batches or not (self.validation or self.test):
            return
        with ExitStack() as stack:
            copies = stack.enter_context(without_trace(self.task, [*dict.fromkeys(models)], self.team))
            if copies is None:
                log.info("check    no batch is evaluated before training: a copy of model and task cannot be made")
                return
            if "torch._dynamo" in sys.modules:  # its guards would remember the shapes
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            heads = [{name: data.head(batches) for name, data in sets.items()} for sets in (self.validation, self.test)]
            for data in (data for sets in heads for data in sets.values()):
                stack.callback(data.close)
            task, (model, *_) = copies
            rehearsal = replace(self, task=task)
            try:
                rehearsal._evaluate(model, heads[0], 0, _Backup([model], task), metric=self.metric)
                rehearsal._evaluate(model, heads[1], 0, _Backup([model], task))
            except EvaluationInterrupted:
                raise self._interrupted("during start-up, nothing to commit") from None
            except EvaluationFailed as error:
                where = f"the first {batches} batches of each evaluation set, without a trace, before the first step"
                error.extend(f"This is the evaluation of {where} (runtime.check_batches; 0 leaves it out)")
                raise
        self.team.disarm_timeout()

    def close(self) -> None:
        """End the workers."""
        for data in (*self.validation.values(), *self.test.values()):
            data.close()

    def _evaluate(
        self,
        model: nn.Module,
        sets: Mapping[str, EvaluationData],
        key: int,
        backup: "_Backup",
        metric: str | None = None,
    ) -> dict[str, float | str]:
        """The task's report over all data of each of the ``sets``, as ``set/metric``. Means are weighted by batch size,
        and summed in double precision. Runs without gradients, in evaluation mode and with a random seed of ``key``.
        """
        report: dict[str, float | str] = {}
        try:
            for name, data in sets.items():
                seed = derive(name, key) if len(sets) > 1 else key
                with evaluation_mode(model), temporary_seed(seed), torch.no_grad(), self.autocast():
                    values = self._report(model, data, backup, seed)
                report |= {f"{name}/{each}": value for each, value in values.items()}
            if metric is not None:
                _in_all(self.team, lambda: objective(report, metric))
        except EvaluationInterrupted:
            raise
        except (signals.Stopped, Exception) as error:
            agreed = getattr(error, "agreed", False)
            if (self.team.world.size > 1 and not agreed) or not backup.restore(self.team):
                raise
            if not isinstance(error, Exception):
                raise EvaluationInterrupted from error
            raise error if isinstance(error, EvaluationFailed) else EvaluationFailed.of(error, agreed=agreed) from error
        # An evaluation may move buffers, too, in each process by the batches that it has.
        self.parallelism.sync_buffers()
        return report

    def _report(
        self, model: nn.Module, data: EvaluationData, backup: "_Backup", seed: int
    ) -> Mapping[str, float | str]:
        metrics = _aggregate(self.task, model, data, self.team, backup)
        if self.team.world.size > 1:  # the batches of the processes may have drawn different random numbers
            seed_all(seed)
        report = _in_all(self.team, lambda: _checked_report(self.task.evaluation_end(model, metrics), self.task))
        return same_for_all(report, self.team, f"{type(self.task).__name__}.evaluation_end", _REMEDY)

    def _warn(self, text: str, names: set[str], *arguments: str) -> None:
        if names := names - self._changed:
            self._changed |= names
            log.warning(text, printable(shorten(", ".join(sorted(names)), 200)), *arguments)

    def _interrupted(self, where: str) -> Interrupted:
        return Interrupted(f"{self.team.stop} {where}; run the same command again to continue", agreed=True)


def _updates(task: Task) -> dict[str, int]:
    """How often each metric of torchmetrics that the task has was updated since its last reset."""
    parts = {f"task.{name}": part for name, part in vars(task).items() if isinstance(part, nn.Module)}
    return {name: max(getattr(each, "update_count", 0) for each in part.modules()) for name, part in parts.items()}


def _in_all(team: Team, work: Callable[[], T], polls: Iterable[bool] = ()) -> T:
    """The result of ``work``, once all processes have done it. If it raises in any, all raise EvaluationFailed. Where
    ``work`` goes through ``polls``, a process that fails makes those that are left, because the others wait for them.
    """
    if team.world.size == 1:
        return work()

    def work_or_drain() -> T:
        try:
            return work()
        except EvaluationInterrupted:  # in all
            raise
        except Exception as error:
            # At once: the others may wait for this process in an exchange of the task's own.
            log.warning("failed   in the evaluation on rank %d: %s: %s", team.world.rank, type(error).__name__, error)
            for _ in polls:
                pass
            raise EvaluationFailed.of(error) from error

    try:
        return on_all_ranks(team.comm, work_or_drain)
    except EvaluationFailed as error:
        error.agreed = True
        raise


def objective(report: Mapping[str, float | str], metric: str) -> float:
    """The objective in an evaluation's report. Raises a ConfigError that names all metrics."""
    value = report.get(metric)
    if value is None or isinstance(value, str):
        names = ", ".join(sorted(name for name, value in report.items() if not isinstance(value, str)))
        raise ConfigError(
            f"objective.metric={metric} is not among the metrics of the evaluation: {names}. Set it to one of them; "
            "add run.on_drift=accept if the run has begun"
        )
    return value


def same_for_all(report: Mapping[str, float | str], team: Team, source: str, remedy: str) -> Mapping[str, float | str]:
    """Return the report if it is the same in all processes. Else raises a TaskError in all of them that shows the first
    metric that differs.
    """
    if team.world.size == 1:
        return report
    first = team.comm.broadcast(dict(report))
    differs = json.dumps(first, sort_keys=True) != json.dumps(report, sort_keys=True)
    if not team.sum_tensors({"": torch.tensor(float(differs))})[""]:
        return report
    reports = team.all_gather(dict(report))
    texts = [{name: json.dumps(value) for name, value in each.items()} for each in reports]
    name = min(name for each in texts for name in each if any(other.get(name) != each[name] for other in texts))
    values = ", ".join(f"{each.get(name, 'nothing')} on rank {rank}" for rank, each in enumerate(reports))
    raise TaskError(f"{source} reports {name!r} as {values}. {remedy}", agreed=True)


@doing("evaluates")
def _aggregate(task: Task, model: nn.Module, data: EvaluationData, team: Team, backup: "_Backup") -> dict[str, Any]:
    """Of each metric the mean over all samples of all processes, or all rows in the order of the samples."""
    polls = _interruption_points(len(data) + 1, team, backup)  # the last one before the end of the data is seen
    measure = partial(_measure, polls, task, model, data)
    sharded = any(map(is_distributed, model.parameters()))
    samples, totals, rows = measure() if sharded else _in_all(team, measure, polls)
    zero = torch.zeros((), dtype=torch.double, device=data.device)
    shares = {name: totals.get(name, zero) for name in team.union([*totals])}
    sums = team.sum_tensors({**shares, _SAMPLES: zero + samples})
    means = {name: value.item() / sums[_SAMPLES].item() for name, value in sums.items() if name != _SAMPLES}
    return means | _join_rows(rows, team, f"{type(task).__name__}.evaluation_step")


def _interruption_points(number: int, team: Team, backup: "_Backup") -> Iterator[bool]:
    """Exchange signals with the other processes ``number`` times. Yields whether a signal may interrupt a wait for
    data: where a single process can return to the state before.
    """
    for _ in range(number):
        if team.poll() and backup.restore(team):
            raise EvaluationInterrupted
        yield team.world.size == 1 and not backup.irreversible


def _measure(
    polls: Iterator[bool], task: Task, model: nn.Module, data: EvaluationData
) -> tuple[int, dict[str, Tensor], list[dict[str, Tensor]]]:
    """The number of samples of this process, the sums of its metrics, weighted by samples, and the rows of each batch.
    A batch without samples shows the names of metrics alone.
    """
    samples, sums, rows = 0, dict[str, Tensor](), list[dict[str, Tensor]]()
    step = f"{type(task).__name__}.{_step_of(task)}"
    batches = iter(data)
    for at_once in polls:
        with signals.stop_reads(at_once=at_once):
            if (item := next(batches, None)) is None:
                break
        count, batch = item
        own = task
        if not count:  # the batch of another process, which must not count in what the task adds up
            task = copy_of(task, [model, *_weights_of(task, model)]) or task
        metrics = check_metrics(task.evaluation_step(model, batch), step, training=False)
        for name, value in metrics.items():
            if not value.dim():
                weighted = value.detach().double() * count if count else torch.zeros_like(value, dtype=torch.double)
                sums[name] = sums[name] + weighted if name in sums else weighted
        if count:
            samples += count
            rows.append({name: value.detach().cpu() for name, value in metrics.items() if value.dim()})
        if task is not own:
            _type_empty_lists(own, task)
    return samples, sums, rows


def _type_empty_lists(task: Task, copy: Task) -> None:
    """Give empty lists in metrics of torchmetrics an empty tensor of the type that ``copy`` has there: it takes the
    list of a process without a batch for floats, whatever the others send.
    """
    parts = [part for part in vars(task).values() if isinstance(part, nn.Module)]
    copies = [part for part in vars(copy).values() if isinstance(part, nn.Module)]
    for own, other in zip(parts, copies, strict=True):
        for mine, theirs in zip(own.modules(), other.modules(), strict=False):
            for name in getattr(mine, "_reductions", ()):
                if getattr(mine, name) == [] and (values := getattr(theirs, name)):
                    setattr(mine, name, [values[0][:0]])


def _join_rows(rows: list[dict[str, Tensor]], team: Team, step: str) -> dict[str, Tensor]:
    """The rows of all batches of all processes, to which the batches were dealt in turn."""
    names = team.union([*dict.fromkeys(name for batch in rows for name in batch)])
    if not names:
        return {}
    rounds = zip_longest(*team.all_gather(rows), fillvalue={})
    batches: list[dict[str, Tensor]] = [batch for each in rounds for batch in each]
    columns = {}
    for name in names:
        tensors = [batch[name] for batch in batches if name in batch]
        if len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) > 1:
            kinds = sorted({f"[*, {', '.join(map(str, each.shape[1:]))}] {each.dtype}" for each in tensors})
            remedy = "Give the rows of all batches one shape and dtype, for example by padding"
            raise TaskError(f"{step} returned {name!r} as {' and '.join(kinds)} in different batches. {remedy}")
        columns[name] = torch.cat(tensors)
    return columns


def copy_of(thing: T, shared: Iterable[object]) -> T | None:
    """A deep copy, except of the objects in ``shared``; None for what cannot be copied: a lock, a file, a generator."""
    try:
        return deepcopy(thing, {id(each): each for each in shared})
    except Exception:
        return None


@contextmanager
def without_trace(task: Task, models: Sequence[nn.Module], team: Team) -> Iterator[tuple[Task, list[nn.Module]] | None]:
    """Within the block, the copies of task and models may be evaluated: training does not change. None if they cannot
    be copied. Frozen weights and sharded models are not copied; buffers of the latter are restored after the block.

    Raises TaskError if weights that were not copied have changed, or were replaced.
    """
    backup = _Backup(models)
    sharded = [model for model in models if any(map(is_distributed, model.parameters()))]
    frozen = [weight for weight in _weights_of(task, *models) if not weight.requires_grad]
    yield copy_of((task, [*models]), [*frozen, *sharded])
    if not backup.restore(team):
        raise TaskError("an evaluation before the first step changed or replaced weights, which cannot be undone")


def _weights_of(task: Task, *models: nn.Module) -> Iterator[nn.Parameter]:
    for module in (*models, *(part for part in (task, *vars(task).values()) if isinstance(part, nn.Module))):
        yield from module.parameters()


class _Backup:
    """What an evaluation may change, as it was before: buffers and extra states of the models, and the task's state.
    Weights are not copied, only summed up: an evaluation that changes them (such as one that swaps in other
    weights for a while) is ``irreversible`` until it ends.
    """

    def __init__(self, models: Sequence[nn.Module], task: Task | None = None) -> None:
        self._task: Any = task if hasattr(task, "state_dict") and hasattr(task, "load_state_dict") else None
        modules = [module for model in models for module in model.modules()]
        self._buffers = [(module, {n: (b, _copy(module, n)) for n, b in module._buffers.items()}) for module in modules]
        with_extra = [module for module in modules if type(module).get_extra_state is not nn.Module.get_extra_state]
        self._extra = [(module, deepcopy(module.get_extra_state())) for module in with_extra]
        self._memory, tensors = encode(None if self._task is None else self._task.state_dict(), "task")
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._models = models
        self._weights = self._current_weights()
        self._sums = _sums(self._weights)
        self.irreversible = False

    def restore(self, team: Team) -> bool:
        """Restore the state. Returns False, in all processes, if weights have changed in any process."""
        if not self.irreversible:
            changed = torch.tensor(float(self._weights_changed()))
            self.irreversible = bool(team.sum_tensors({"": changed})[""])
        if self.irreversible:
            return False
        for module, saved in self._buffers:
            module._buffers.clear()
            for name, (buffer, copy) in saved.items():
                if buffer is not None and copy is not None and not is_expanded(buffer):
                    buffer = buffer.copy_(copy) if buffer.shape == copy.shape else copy
                module._buffers[name] = buffer
        for module, extra in self._extra:
            module.set_extra_state(extra)
        if self._task is not None:
            self._task.load_state_dict(decode(self._memory, lambda name: self._tensors[name].cpu()))
        return True

    def changes(self) -> set[str]:
        """The names of weights and saved buffers of the model in training, the last, that have changed since. Weights
        of FSDP are left out.
        """
        model = self._models[-1]
        before = {id(weight): total for weight, total in zip(self._weights, self._sums, strict=True)}
        pairs: dict[str, tuple[Tensor | None, Tensor]] = {}
        if not any(map(is_distributed, self._weights)):
            pairs = {name: (before.get(id(weight)), weight) for name, weight in model.named_parameters()}
        names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        for module, saved in self._buffers:
            for name, (_, copy) in saved.items() if module in names else ():
                if copy is not None and (now := module._buffers.get(name)) is not None:
                    pairs[names[module] + name] = _sums([copy])[0], now
        return {name for name, (was, now) in pairs.items() if was is None or _sums([now]) != [was]}

    def _weights_changed(self) -> bool:
        """Whether a weight has another value or was replaced. FSDP replaces a sharded weight by the whole weight while
        a layer computes, which is no change.
        """
        pairs = zip_longest(self._weights, self._current_weights())
        replaced = any(new is not old and not (old is not None and is_distributed(old)) for old, new in pairs)
        return replaced or _sums(self._weights) != self._sums

    def _current_weights(self) -> list[Tensor]:
        return [weight for model in self._models for weight in model.parameters()]


def _copy(module: nn.Module, name: str) -> Tensor | None:
    """A copy of a buffer; None for a buffer that no checkpoint holds."""
    buffer = module._buffers[name]
    return None if buffer is None or name in module._non_persistent_buffers_set else buffer.detach().clone()


def _sums(weights: Sequence[Tensor]) -> list[Tensor]:
    """The sum of the bits of each weight, read as integers: any change of a value shows, also of NaN and -0.0."""
    tensors = (local(weight.detach()) for weight in weights)
    reals = (torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors)
    return [tensor.view(_INTEGERS[tensor.element_size()]).sum() for tensor in reals]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; afterwards each module has its earlier mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _checked_report(report: Any, task: Task) -> Mapping[str, float | str]:
    """The report with numbers for tensors and arrays of a single value, as torchmetrics and scikit-learn return."""
    owner = type(task).__name__
    example = "expected a dict of numbers and texts, as in {**metrics, 'perplexity': math.exp(metrics['loss'])}"
    if not isinstance(report, Mapping):
        raise TaskError(f"{owner}.evaluation_end returned a {type(report).__name__}; {example}")
    values = {}
    for name, value in report.items():
        if getattr(value, "shape", None) is not None and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, int | float | str):
            values[name] = value
        elif type(task).evaluation_end is Task.evaluation_end:
            remedy = "return a mean in its place, or make a number of all rows in evaluation_end"
            raise TaskError(f"{owner}.{_step_of(task)} returned {name!r} with a row for each sample; {remedy}")
        else:
            raise TaskError(f"{owner}.evaluation_end returned {name!r} as a {type_text(value)}; {example}")
    return values


def _step_of(task: Task) -> str:
    """The method that computes the metrics of a batch."""
    return "training_step" if type(task).evaluation_step is Task.evaluation_step else "evaluation_step"

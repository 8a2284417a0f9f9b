"""One optimizer step: precision, loss scaling, clipping, what to do without a finite loss, weight averaging; and how a
model is prepared for training.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.distributed.communicator import Parallelism
from runner.errors import ConfigError, NonFiniteError, TaskError
from runner.optimizers import Named, Patterns, by_name, matching, weights_of

log = logging.getLogger("runner")

_NORM = "grad_norm"

_MAX_SKIPS = 32  # steps in a row; more than an fp16 loss scale needs to adapt

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class WeightUpdate:
    """Implements ``task.Update`` over one optimizer, or over several by name.

    ``skipped`` counts the steps whose loss or gradients were not finite and that therefore changed no weight;
    ``consecutive_skips`` the last of them in a row, up to now.
    """

    model: nn.Module
    optimizer: Any  # an Optimizer, or ``Named``
    _: KW_ONLY
    device: torch.device
    precision: str = "fp32"
    scaler: torch.amp.GradScaler | None = None
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    average: AveragedModel | None = None
    not_averaged: Collection[str] = ()  # names of weights that the average takes over as they are
    parallelism: Parallelism = field(default_factory=Parallelism)
    skipped: int = 0
    consecutive_skips: int = 0
    gradient_listeners: Sequence[Callable[[], None]] = ()  # called when all gradients are there, unscaled
    # Since the last ``end``: an optimizer had gradients; gradients or a loss were not finite; weights were moved.
    _has_gradients: bool = field(default=False, init=False)
    _is_nonfinite: bool = field(default=False, init=False)
    _has_stepped: bool = field(default=False, init=False)
    positions: Callable[[], range] = lambda: range(0)
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    in_own_step: bool = False  # the task is in its own step, and not in `apply`

    def __post_init__(self) -> None:
        for optimizer in by_name(self.optimizer).values():
            for each in (optimizer, *getattr(optimizer, "__dict__", {}).values()):  # SAM wraps another optimizer
                if isinstance(each, Optimizer) and hasattr(each, "_optimizer_step_pre_hooks"):
                    each.register_step_pre_hook(self._require_apply)

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise TaskError(
                "the loss depends on no parameter that is trained: it was detached or computed without gradients, or "
                "every parameter of the model has requires_grad=False"
            )
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str) -> "NamedUpdate":
        if not isinstance(self.optimizer, Named) or name not in self.optimizer:
            names = ", ".join(by_name(self.optimizer)) or "one without a name: use update.step(loss)"
            raise TaskError(f"there is no optimizer {name!r} for update[...]; there is {names}")
        return NamedUpdate(self, name)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        if isinstance(self.optimizer, Named):
            return self.apply(loss, [*self.optimizer.values()])
        measured = self.apply(loss, [self.optimizer])
        self.end()
        return measured

    def apply(self, loss: Tensor, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Move the weights of these optimizers by their gradients, or skip them, and clear all gradients."""
        self.parallelism.reduce_gradients()
        own = weights_of(optimizers)
        weights = self._weights(own)
        if len(optimizers) > 1:
            optimizers = [each for each in optimizers if any(weight.grad is not None for weight in weights_of([each]))]
        if self.scaler is not None:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)
            self._unscale(weights, optimizers)
        for listener in self.gradient_listeners:
            listener()
        measured = {}
        if self.clip_norm is not None:
            measured[_NORM] = self._clip(_gradient_values(weights), self.clip_norm)
        self._has_gradients = self._has_gradients or bool(optimizers)
        if self.skip_nonfinite and not self._finite(loss, _gradient_values(weights)):
            self._is_nonfinite = True
        else:
            in_own_step, self.in_own_step = self.in_own_step, False
            for optimizer in optimizers:
                self._step_optimizer(optimizer)
            self.in_own_step = in_own_step
        self._clear([*weights, *own], optimizers)
        return measured

    def _require_apply(self, *_: Any) -> None:
        """Hook: an optimizer steps. Raises TaskError if the task calls it itself and something would be left out."""
        if not self.in_own_step:
            return
        settings = {
            "trainer.clip_norm": self.clip_norm is not None,
            "trainer.ema_decay": self.average is not None,
            "trainer.precision=fp16": self.scaler is not None,
            "trainer.on_nonfinite=skip": self.skip_nonfinite,
            "the sum of gradients over several processes": bool(self.parallelism.description),
        }
        if any(settings.values()):
            left_out = ", ".join(name for name, is_set in settings.items() if is_set)
            raise TaskError(
                f"the task calls step() of an optimizer itself, which leaves out {left_out}. Call update.step(loss), "
                "or, where the optimizer needs a closure, do without"
            )

    def end(self) -> None:
        """Once per step, after all optimizers: the moving average, buffers and the loss scale. Raises TaskError."""
        if isinstance(self.optimizer, Named):
            self._require_no_gradients()
        if not self._has_gradients:
            return
        if self.average is not None and self._has_stepped:
            update_average(self.average, self.model, self.not_averaged)
        self.parallelism.sync_buffers()
        skipped = self._is_nonfinite
        self.skipped += skipped
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            self.scaler.update()
            skipped = skipped or self.scaler.get_scale() < scale
        self._has_gradients = self._is_nonfinite = self._has_stepped = False
        self._count(skipped)

    def state_dict(self) -> dict[str, Any]:
        scaler = self.scaler.state_dict() if self.scaler else None
        return {"skipped": self.skipped, "in_a_row": self.consecutive_skips, "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.consecutive_skips = state["skipped"], state.get("in_a_row", 0)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _require_no_gradients(self) -> None:
        names = [name for name, weight in self.model.named_parameters() if weight.grad is not None]
        if names:
            remedy = 'take a step with them, or differentiate for one optimizer alone: update["name"].backward(loss)'
            raise TaskError(
                f"{names[0]} still has a gradient after the step, and checkpoints hold no gradients: {remedy}"
            )

    def _weights(self, own: list[Tensor]) -> list[Tensor]:
        """The weights of the model and the optimizers' ``own`` that have a gradient; a sparse gradient has each of its
        elements once.

        Collected anew for each step, and whether they are trained now or not: a task may freeze, thaw, add and replace
        weights, and an optimizer moves whatever has a gradient.
        """
        all_weights = _weights(self.model) + own
        weights = {id(weight): weight for weight in all_weights if weight is not None and weight.grad is not None}
        for weight in weights.values():
            if weight.grad is not None and weight.grad.is_sparse:
                weight.grad = weight.grad.coalesce()
        return [*weights.values()]

    def _clear(self, weights: list[Tensor], optimizers: Sequence[Any]) -> None:
        """No state has a gradient: clear also those of weights that are not the optimizers'."""
        for optimizer in optimizers:
            zero_grad = optimizer.zero_grad
            if getattr(zero_grad, "__func__", None) is not Optimizer.zero_grad:  # torch takes as long as a kernel
                zero_grad(set_to_none=True)
        for weight in weights:
            weight.grad = None

    def _unscale(self, weights: list[Tensor], optimizers: Sequence[Optimizer]) -> None:
        """Unscale gradients of what is not the optimizer's, too: they are part of the norm."""
        assert self.scaler is not None
        own = {id(weight) for weight in weights_of(optimizers)}
        for weight in weights:
            if id(weight) not in own and weight.grad is not None:
                weight.grad.div_(self.scaler.get_scale())

    def _count(self, skipped: bool) -> None:
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        if self.consecutive_skips >= _MAX_SKIPS:
            why = "because their loss or gradients were NaN or infinite: nothing is learned any more"
            remedy = "Look at their samples and at the loss, or lower the learning rate"
            raise NonFiniteError(f"{self.consecutive_skips} steps in a row were skipped, {why}. {remedy}")

    def _step_optimizer(self, optimizer: Any) -> None:
        if self.scaler is None:
            optimizer.step()
            self._has_stepped = True
            return
        self.scaler.step(optimizer)
        if self.average is not None:  # where the loss was scaled too far, the optimizer did not step
            infinite = self.scaler._found_inf_per_device(optimizer).values()
            self._has_stepped = self._has_stepped or not any(flag.item() for flag in infinite)

    def _clip(self, gradients: list[Tensor], most: float) -> Tensor:
        """``nn.utils.clip_grad_norm_`` for gradients that may be sparse, and distributed over processes."""
        norm = self.parallelism.full_tensor(nn.utils.get_total_norm(gradients))
        if gradients:
            torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _finite(self, loss: Tensor, gradients: list[Tensor]) -> bool:
        """Whether loss and gradients are finite. Synchronises with the device, once per step."""
        norms = map(self.parallelism.full_tensor, torch._foreach_norm(gradients) if gradients else ())
        return bool(self.parallelism.all_true(torch.isfinite(torch.stack([loss, *norms])).all()))


class NamedUpdate:
    """The part of a ``WeightUpdate`` that one of several optimizers has: gradients, clipping and checks are of its
    weights alone.
    """

    def __init__(self, update: WeightUpdate, name: str) -> None:
        self.update, self.name = update, name
        self.optimizer: Optimizer = update.optimizer[name]
        self.autocast = update.autocast

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of ``loss`` for the weights of this optimizer; others keep theirs."""
        with self._alone():
            self.update.backward(loss)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """Update the weights of this optimizer, and clear their gradients."""
        with self._alone():
            measured = self.update.apply(loss, [self.optimizer])
        return {f"{name}/{self.name}": value for name, value in measured.items()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block, the weights of the other optimizers have no gradients."""
        others = [each for each in self.update.optimizer.values() if each is not self.optimizer]
        before = [(weight, weight.grad) for weight in weights_of(others)]
        for weight, _ in before:
            weight.grad = None
        try:
            yield
        finally:
            for weight, gradient in before:
                weight.grad = gradient


def is_measured(metric: str) -> bool:
    """Whether the update measures this metric, over all processes."""
    return metric.partition("/")[0] == _NORM


def _weights(model: nn.Module) -> list[Tensor | None]:
    """``model.parameters()`` in the same order, several times as fast, with repetitions."""
    weights: list[Tensor | None] = []
    modules: list[nn.Module | None] = [model]
    walked = set[nn.Module]()
    while modules:
        module = modules.pop()
        if module is not None and module not in walked:
            walked.add(module)
            weights += module._parameters.values()
            modules += reversed(module._modules.values())
    return weights


def _gradient_values(weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, of sparse ones the values."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return [each._values() if each.is_sparse else each for each in gradients]


def train_mode(model: nn.Module) -> None:
    """Call ``model.train()``, because ``from_pretrained`` returns models in evaluation mode; and log what this changed.

    In a model that is in training mode, two kinds of children keep their evaluation mode, since somebody meant it:
    frozen ones (weights, none of which is trained), and single layers such as a batch norm.
    """
    evaluating: set[nn.Module] = set()
    for part in model.modules() if model.training else ():
        for child in part.children():
            single = part.training and not any(True for _ in child.children())
            frozen = [weight.requires_grad for weight in child.parameters()]
            if not child.training and (single or (frozen and not any(frozen))):
                evaluating |= {inner for inner in child.modules() if not inner.training}
    names = {name for name, part in model.named_modules() if not part.training and part not in evaluating}
    try:
        model.train()
    except NotImplementedError as error:
        remedy = "Give the module as it was before torch.export, and export the trained weights later"
        raise ConfigError(f"model cannot be put into training mode: {error} {remedy}") from error
    for part in evaluating:
        part.training = False
    outer = [name for name in names if name.rpartition(".")[0] not in names - {name}]
    if names:
        log.info("model    %s came in evaluation mode, and trains now", ", ".join(sorted(outer)) or "it")


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model for its moving average. Raises ConfigError for a model that cannot be copied."""
    try:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    except Exception as error:
        names = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        reason, remedy = f"{type(error).__name__}: {error}", ""
        if names:
            reason = f"{', '.join(names)} is computed from other weights"
            remedy = "; use torch.nn.utils.parametrizations in place of the old weight_norm and its like"
        raise ConfigError(
            f"trainer.ema_decay needs a copy of the model, and copy.deepcopy cannot make it: {reason}{remedy}, or set "
            "trainer.ema_decay=null"
        ) from error


def not_averaged(model: nn.Module, patterns: Patterns | None) -> list[str]:
    """The names of the weights that do not match ``trainer.ema_params``, which the average takes over as they are."""
    names = [name for name, _ in model.named_parameters()]
    averaged = names if patterns is None else {*matching(names, patterns, "trainer.ema_params")}
    return [name for name in names if name not in averaged]


def update_average(average: AveragedModel, model: nn.Module, copied: Collection[str] = ()) -> None:
    """Move the average towards the model; weights of the names ``copied``, and buffers, also new ones, are copied.
    Raises TaskError if the set or the shapes of the weights have changed.
    """
    if _outline(average.module) != _outline(model):
        _require_same_weights(average.module, model)
        copies = {id(buffer): buffer.detach().clone() for buffer in model.buffers()}  # shared as in the model
        for old, new in zip(average.module.modules(), model.modules(), strict=True):
            old._buffers.clear()
            old._buffers.update({name: b if b is None else copies[id(b)] for name, b in new._buffers.items()})
            old._non_persistent_buffers_set = {*new._non_persistent_buffers_set}
    average.update_parameters(model)
    if copied:
        live, averaged = dict(model.named_parameters()), dict(average.module.named_parameters())
        for name in copied:
            averaged[name].detach().copy_(live[name].detach())


def _outline(model: nn.Module) -> list[object]:
    """Modules, weights and buffers in order, for a comparison at each step: equal outlines can be averaged."""
    first: dict[int, int] = {}  # tensor -> number of its first use: tied weights and buffers must be tied alike
    outline: list[object] = []
    for module in model.modules():
        outline += module._modules
        for name, weight in module._parameters.items():
            outline += [name, None if weight is None else (weight.shape, first.setdefault(id(weight), len(first)))]
        for name, b in module._buffers.items():
            outline += [name, None if b is None else (b.shape, b.dtype, first.setdefault(id(b), len(first)))]
    return outline


def _require_same_weights(copy: nn.Module, model: nn.Module) -> None:
    before, now = _shapes(copy), _shapes(model)
    names = [name for name in {**before, **now} if before.get(name, 0) != now.get(name, 0)]
    if names := names or [name for name, other in zip(before, now, strict=True) if name != other]:
        raise TaskError(
            f"trainer.ema_decay averages the weights that the model had at the start, and {', '.join(names)} came, "
            "went or changed its shape since. Give it to the model in its constructor, or set trainer.ema_decay=null"
        )


def _shapes(model: nn.Module) -> dict[str, Any]:
    modules = dict.fromkeys(name for name, _ in model.named_modules() if name)
    return {**modules, **{name: weight.shape for name, weight in model.named_parameters()}}

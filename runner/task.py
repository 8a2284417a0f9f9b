"""``Task``: the loss and the metrics that a user defines, and the interface to the training loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from runner.errors import TaskError

Metrics = Mapping[str, Tensor]

_EXAMPLE = '{"loss": loss, "accuracy": hits.float().mean()}'


class OptimizerUpdate(Protocol):
    """The parts of an optimizer step, with the configured precision, loss scaling, clipping and weight averaging."""

    optimizer: Any  # an Optimizer, or several by their names

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of ``loss``."""

    def step(self, loss: Tensor) -> Metrics:
        """Update the weights by the accumulated gradients and clear these; returns metrics of the update.

        ``loss`` is the loss of the whole step; it is used only to decide whether the step is skipped as not finite.
        """


class Update(OptimizerUpdate, Protocol):
    """The update by all optimizers; ``update["generator"]`` is that by one of several: its ``backward`` and ``step``
    concern the weights of that optimizer alone, in any order and number.
    """

    def __getitem__(self, name: str) -> OptimizerUpdate:
        """The update by one of several optimizers."""

    def positions(self) -> range:
        """The positions, in the endless stream of samples, of the micro-batch that was taken last: with a seed, the key
        of what is random about each sample.
        """

    def gather(self, value: Any) -> list[Any]:
        """What all processes pass, in the order of their ranks; tensors on the CPU, and plain values."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Data that a task generated from the samples of a step, such as completions, and its use: for the ledger.

    ``digest`` (64 bits) covers the rollouts of this step's samples. ``trained`` are the positions of samples,
    of this or an earlier step, that were trained ``times`` times now; ``dropped`` those that never will be.
    """

    digest: int
    trained: Sequence[int] = ()
    times: int = 1
    dropped: Sequence[int] = ()


class Task:
    """One way to turn a batch into a loss and metrics.

    A task that keeps state between steps needs ``state_dict`` and ``load_state_dict``; it is then saved and restored
    with the model. ``load_state_dict`` gets tensors on the CPU. Modules that are attributes of a task, such as metrics
    of torchmetrics, are moved to the run's device. Metrics are tensors of shape [], means over the samples of the
    batch, left on their device; or numbers, for which a device has to be waited for.

    A task with ``needs_reference`` gets a second model in ``reference``: frozen, with the weights with which the run
    began (those of its parent). No checkpoint holds it; every attempt loads it before the state is restored. A task
    that generates training data in ``optimization_step`` reports it in ``rollouts``.
    """

    needs_reference = False
    reference: nn.Module | None = None
    rollouts: Rollouts | None = None

    def setup(self, model: nn.Module, device: torch.device) -> None:
        """Make what the task needs besides the model: a teacher, a critic, reference weights.

        Called once in every attempt and process, when the model is built, in training mode and on the device; before it
        is averaged, compiled or divided among processes, before the optimizer is made, and before anything is restored,
        also the weights of ``run.parent``. The random generators have a seed of their own here. What training changes
        later belongs into ``state_dict``; what stays as ``setup`` made it does not.
        """

    sink: ClassVar[Callable[[str, Any], None] | None] = None  # of ``log``, while a run reports

    def log(self, name: str, value: Any) -> None:
        """Show a picture or a text of this step, or of the evaluation after it, in TensorBoard: a str, a matplotlib
        figure, images as a tensor or array of shape [height, width], [channels, height, width] or [images, channels,
        height, width] (floats from 0 to 1, or bytes), or the histogram of a vector. If a name is
        logged twice in a step, the last value counts; only rank 0's are shown. Raises TaskError for anything else.
        """
        if Task.sink is not None:
            Task.sink(name, value)

    def training_step(self, model: nn.Module, batch: Any) -> Metrics:
        """The metrics of one micro-batch; the one called ``"loss"`` is minimised. An output of Hugging Face's models
        will do, for its ``loss``. Not needed where ``optimization_step`` and ``evaluation_step`` are the task's own.
        """
        raise TaskError(f"{type(self).__name__} has no training_step(self, model, batch), which gives the loss")

    def evaluation_step(self, model: nn.Module, batch: Any) -> Metrics:
        """The metrics of one evaluation batch, without gradients. By default those of training.

        A tensor with a first dimension has a row for each sample (or any number of rows), such as scores and labels of
        which ``evaluation_end`` computes metrics that are not means.
        """
        return self.training_step(model, batch)

    def evaluation_end(self, model: nn.Module, metrics: dict[str, Any]) -> Mapping[str, float | str]:
        """What an evaluation reports: numbers, and strings, which are shown as text. It is made from ``metrics``, the
        means over all samples, and the rows of all samples of all processes in the order of the data, on the CPU.

        Runs under a random seed of its own, so it may sample.
        """
        return metrics

    def divide(self, model: nn.Module) -> Mapping[str, Iterable[nn.Parameter]]:
        """The weights that each of several optimizers trains, by the names of these; by default the configuration
        divides them (``optimizer.NAME.params``).
        """
        return {}

    def optimization_step(
        self, model: nn.Module, micro_batches: Iterable[tuple[float, Any]], update: Update
    ) -> Metrics:
        """One optimizer step over the micro-batches of a global batch, each with its share of the samples.

        Override this for several losses or another update rule: adversaries, distillation, reinforcement learning.
        Consume all micro-batches, and return means over the global batch.
        """
        total: dict[str, Tensor] = {}
        for share, batch in micro_batches:
            with update.autocast():
                metrics = check_metrics(self.training_step(model, batch), f"{type(self).__name__}.training_step")
            update.backward(metrics["loss"] * share if share != 1 else metrics["loss"])
            for name, value in metrics.items():
                value = value.detach() * share if share != 1 else value.detach()
                total[name] = total[name] + value if name in total else value
        total.update(update.step(total["loss"]))
        return total


def check_metrics(metrics: Any, step: str, *, training: bool = True) -> Metrics:
    """``metrics``, if they are a dict of tensors; in ``training`` all of shape [], and one of them the ``"loss"``.
    Numbers become tensors.

    Of an output of transformers, which is a mapping, the loss is taken. Raises TaskError, with the name of the method
    ``step`` that returned the metrics.
    """
    if type(metrics) is not dict and any(base.__name__ == "ModelOutput" for base in type(metrics).__mro__):
        if metrics.loss is None and training:
            raise TaskError(
                f"{step} returned a {type_text(metrics)} without a loss: the model needs labels in its batch"
            )
        metrics = {} if metrics.loss is None else {"loss": metrics.loss}
    if type(metrics) is not dict and not isinstance(metrics, Mapping):
        raise TaskError(f"{step} returned a {type_text(metrics)}; expected a dict of scalar tensors, as in {_EXAMPLE}")
    numbers: dict[str, Real] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            usable = not (training and value.dim())
        elif usable := isinstance(value, Real):
            numbers[name] = value
        if not usable:
            expected = f"a tensor of shape []: a mean over the samples of the batch, as in {_EXAMPLE}"
            raise TaskError(f"{step} returned {name!r} as a {type_text(value)}; expected {expected}")
    if training and "loss" not in metrics:
        names = ", ".join(map(repr, metrics)) or "nothing"
        raise TaskError(f"{step} returned {names} and no 'loss', which is minimised; expected a dict as in {_EXAMPLE}")
    if not numbers:
        return metrics
    device = next((value.device for value in metrics.values() if isinstance(value, Tensor)), None)
    tensors = {n: torch.tensor(float(each), dtype=torch.float64, device=device) for n, each in numbers.items()}
    return {**metrics, **tensors}


def type_text(value: Any) -> str:
    """The type of a value, for a message; of a tensor its shape."""
    return f"tensor of shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__

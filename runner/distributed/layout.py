"""How the model is distributed over the processes (not at all, replicated, sharded), and what follows for a step."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Layout(Protocol):
    """All processes make the same calls in the same order."""

    told: str  # a description for people

    def each(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        """The micro-batches of a step. Only the backward pass of the last one reduces gradients over processes."""

    def gather_gradients(self) -> None:
        """After the last backward pass: finish the reduction, so that every gradient is the sum over all processes."""

    def whole(self, value: Tensor) -> Tensor:
        """The full tensor of a value of which each process may hold a part."""

    def all(self, verdict: Tensor) -> Tensor:
        """Whether ``verdict`` is true in all processes."""

    def settle(self) -> None:
        """After a step: copy rank 0's buffers, such as running means, to all processes."""

    def state_of(self, optimizer: Any) -> Any:
        """The optimizer as a part of the training state."""


class Single:
    """A single process with the whole model."""

    told = ""

    def each(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        return micro_batches

    def gather_gradients(self) -> None:
        pass

    def whole(self, value: Tensor) -> Tensor:
        return value

    def all(self, verdict: Tensor) -> Tensor:
        return verdict

    def settle(self) -> None:
        pass

    def state_of(self, optimizer: Any) -> Any:
        return optimizer


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the children of a ``ModuleList`` or ``Sequential``, where there are two or more,
    all of one class and with parameters. Blocks within blocks do not count.
    """
    found: list[nn.Module] = []
    for child in model.children():
        inner: Sequence[nn.Module] = [*child.children()] if isinstance(child, nn.ModuleList | nn.Sequential) else []
        repeated = len(inner) > 1 and len({type(one) for one in inner}) == 1
        found += inner if repeated and all(any(True for _ in one.parameters()) for one in inner) else blocks(child)
    return found

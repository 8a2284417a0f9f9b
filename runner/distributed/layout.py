"""How the model lies on the processes: what a task is given, and when gradients, buffers and norms are whole."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Layout(Protocol):
    """The same calls in every process, in the same order."""

    told: str  # for people

    def each(self, micro_batches: Iterator[tuple[float, Any]]) -> Iterable[tuple[float, Any]]:
        """The micro-batches of a step. Only the last one's backward pass brings gradients together."""

    def gather_gradients(self) -> None:
        """After the last backward pass: every gradient is the sum over all processes."""

    def whole(self, value: Tensor) -> Tensor:
        """A result that each process may have a part of."""

    def all(self, verdict: Tensor) -> Tensor:
        """Whether it is true in all processes."""

    def settle(self) -> None:
        """After a step: what is not trained, such as running means, is that of rank 0 everywhere."""

    def state_of(self, optimizer: Any) -> Any:
        """The optimizer as a part of the state."""


class Single:
    """One process has all of it."""

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

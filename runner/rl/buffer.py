"""A queue of items that wait to be trained, as a part of the state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Buffer(Generic[T]):
    """First in, first out. Items are instances of the dataclass ``kind``, whose fields are plain values and CPU
    tensors; all tensors of a field have one dtype, and any shape. A checkpoint has one tensor for each such field.

    Every checkpoint has the buffer as a whole. Its size is bounded by the age at which items are dropped, and small
    beside the weights and their moments: 1000 groups of 8 samples of 1000 tokens take 96 MB.
    """

    def __init__(self, kind: type[T]) -> None:
        self._kind: Any = kind
        self._items: list[T] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def extend(self, items: Sequence[T]) -> None:
        """Append items."""
        self._items = [*self._items, *items]

    def take(self, count: int) -> list[T]:
        """Remove and return the ``count`` oldest items, or all if there are fewer."""
        items, self._items = self._items[:count], self._items[count:]
        return items

    def remove(self, condition: Callable[[T], bool]) -> list[T]:
        """Remove and return the items for which ``condition`` is true."""
        items = [*filter(condition, self._items)]
        self._items = [item for item in self._items if not condition(item)]
        return items

    def state_dict(self) -> dict[str, Any]:
        names = [field.name for field in fields(self._kind)] if self._items else []
        return {name: _pack([getattr(item, name) for item in self._items]) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        columns = [*map(_unpack, state.values())]
        self._items = [self._kind(**dict(zip(state, row, strict=True))) for row in zip(*columns, strict=True)]


def _pack(column: list[Any]) -> Any:
    """Tensors become one flat tensor with their shapes; plain values stay a list."""
    if not isinstance(column[0], Tensor):
        return column
    return {"flat": torch.cat([value.flatten() for value in column]), "shapes": [[*value.shape] for value in column]}


def _unpack(column: Any) -> list[Any]:
    if isinstance(column, list):
        return column
    sizes = [torch.Size(shape).numel() for shape in column["shapes"]]
    return [
        part.clone().view(*shape) for part, shape in zip(column["flat"].split(sizes), column["shapes"], strict=True)
    ]

"""A small cache of the most recently used values."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Keeps the ``capacity`` most recently used values. Pickled as an empty cache, so that workers do not get its
    content.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: dict[Hashable, Value] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, computed by ``make`` if it is not in the cache."""
        try:
            value = self._values.pop(key)
        except KeyError:
            value = make()
            while self._values and len(self._values) >= self.capacity:
                del self._values[next(iter(self._values))]
        self._values[key] = value  # a dict is in order of insertion, so the last one is the most recent
        return value

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> "tuple[type[LRUCache[Value]], tuple[int]]":
        return LRUCache, (self.capacity,)

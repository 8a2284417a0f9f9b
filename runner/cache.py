"""A small cache of the values used last."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Keeps the ``capacity`` values used last. Pickles as an empty cache, so that workers are not sent its content."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: dict[Hashable, Value] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``; ``make`` computes it if it is not in the cache."""
        try:
            value = self._held.pop(key)
        except KeyError:
            value = make()
            while self._held and len(self._held) >= self.capacity:
                del self._held[next(iter(self._held))]
        self._held[key] = value  # a dict is in order of insertion: the last one used stands last
        return value

    def __len__(self) -> int:
        return len(self._held)

    def __reduce__(self) -> "tuple[type[LRUCache[Value]], tuple[int]]":
        return LRUCache, (self.capacity,)

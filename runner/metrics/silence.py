"""Where the curves of a process go that is not the one to write them."""

from collections.abc import Mapping
from typing import Any


class Silence:
    """Has the verbs of ``Curves`` and of ``MetricLines``, and writes nothing."""

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def mark(self, step: int = 0) -> dict[str, Any]:
        return {}

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

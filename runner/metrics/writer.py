"""The metrics of a process that does not write them: only rank 0 of a run does."""

from collections.abc import Mapping
from typing import Any


class NullMetrics:
    """Has the methods of ``Curves`` and of ``MetricLines``, and writes nothing."""

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def mark(self, step: int = 0) -> dict[str, Any]:
        return {}

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

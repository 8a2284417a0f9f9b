"""Ranks among threads: what several processes tell each other, in one."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class Meeting:
    """Where the ranks of one channel meet. Values pass as JSON, as they do between processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=300)
        self._values: list[str] = [""] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks, for each."""
        self._values[rank] = json.dumps(value)
        self._barrier.wait()
        found = [json.loads(value) for value in self._values]
        self._barrier.wait()
        return found

    def leave(self) -> None:
        """A rank is gone; the others hear of it."""
        self._barrier.abort()


@dataclass(frozen=True)
class ThreadRanks:
    """One of the ranks that meet."""

    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def gather(self, value: Any) -> list[Any] | None:
        found = self.meeting.exchange(self.rank, value)
        return found if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        return self.meeting.exchange(self.rank, value if self.rank == 0 else None)[0]

    def describe_wait(self) -> str:
        return f"rank {self.rank} is not alone"


def among(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """What ``work`` returns on each of so many ranks. Raises what it raised on the first rank on which it did."""
    ends = ends_among(size, work)
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return ends  # type: ignore[return-value]


def ends_among(size: int, work: Callable[[ThreadRanks], T]) -> list[T | BaseException]:
    """What ``work`` returns or raises on each of so many ranks."""
    meeting = Meeting(size)
    ends: list[T | BaseException] = [BrokenPipeError()] * size

    def run(rank: int) -> None:
        try:
            ends[rank] = work(ThreadRanks(meeting, rank))
        except BaseException as error:
            ends[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends

"""A parent lets its children do blocks of steps in turn. Imports nothing of the runner: a child may have another
environment.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

BARE = "bare"
NEVER = 1_000_000_000  # steps


class Gate:
    """In a child: lets it go on for as many steps as the parent asks for, and prints how long they took by ``clock``,
    per step, or per unit of the ``work`` that was done since its last call.
    """

    def __init__(self, warm_up: int, clock: Callable[[], float], work: Callable[[], float] | None = None) -> None:
        self._left = self._steps = warm_up
        self._clock = clock
        self._work = work
        self.output = sys.stdout
        self._since = clock()

    def passed(self) -> bool:
        """Call after every step; False when there are no more to be done."""
        self._left -= 1
        if self._left:
            return True
        print(
            (self._clock() - self._since) / (self._work() if self._work else self._steps), file=self.output, flush=True
        )
        request = sys.stdin.readline()
        if not request:
            return False
        self._left = self._steps = int(request)
        self._since = self._clock()
        return True


def endless(loader: Any) -> Iterator[Any]:
    """One epoch after the other."""
    while True:
        yield from loader

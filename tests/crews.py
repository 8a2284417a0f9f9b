"""Runs of several real processes to kill: what ``lives`` is for one process. Each rank is a life in a process group of
its own, as a launcher would start it.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lives import Life, Lives
from servers import free_ports


@dataclass(frozen=True)
class Ended:
    """How each rank ended (its exit status, None by SIGKILL), what each printed, and how long the last one took."""

    statuses: list[int | None]
    outputs: list[str]
    seconds: float

    @property
    def output(self) -> str:
        """All that was printed."""
        return "\n".join(self.outputs)


class Crews:
    """Starts crews with a server of lives."""

    def __init__(self, life: Lives) -> None:
        self._life = life

    def __call__(
        self, size: int, *arguments: str, cwd: Path | None = None, to: Sequence[int] | None = None, **mines: Any
    ) -> Ended:
        """One life of ``size`` ranks. The ``mines`` are those of ``lives``, for the ranks ``to`` (default all), but
        ``step`` and ``hang`` for rank ``to[0]`` alone. A stopped rank is killed when the others have ended.
        """
        ranks = range(size) if to is None else to
        shared = {name: value for name, value in mines.items() if name not in ("step", "hang")}
        lives = self._started(size, arguments, cwd, {**dict.fromkeys(ranks, shared), ranks[0]: mines})
        stopped = [lives[rank] for rank in ranks] if mines.get("send") == signal.SIGSTOP else []
        return _ended(lives, stopped)

    def side_by_side(self, *crews: Sequence[Any]) -> list[Ended]:
        """Several crews at the same time, each with a port of its own; nobody is killed."""
        started = [self._started(size, arguments, None, {}) for size, *arguments in crews]
        return [_ended(lives, []) for lives in started]

    def _started(self, size: int, arguments: Sequence[str], cwd: Path | None, mines: Mapping[int, Any]) -> list[Life]:
        team = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1))}
        return [
            self._life.start(
                *arguments,
                cwd=cwd,
                environment=team | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **mines.get(rank, {}),
            )
            for rank in range(size)
        ]


def _ended(lives: Sequence[Life], stopped: Sequence[Life]) -> Ended:
    for life in lives:
        if life not in stopped:
            life.wait()
    for life in stopped:
        life.send(signal.SIGKILL)
    ends = [life.wait() for life in lives]
    return Ended(
        statuses=[end.status for end in ends],
        outputs=[end.output for end in ends],
        seconds=max(end.seconds for end in ends),
    )

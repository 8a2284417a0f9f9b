"""From a launcher's environment variables to the team of this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from runner.distributed.team import SingleProcessTeam, Team
from runner.distributed.world import World, rendezvous


@contextmanager
def join_team(world: World, *, timeout: float, patience: float) -> Iterator[Team]:
    """Within the block, this process is a member of the team of ``world``. Raises ConfigError if it cannot reach the
    other processes.

    A process that keeps the others waiting for more than ``timeout`` seconds (plus ``patience`` while it saves or
    restores) ends the run; so does the only one if it takes no step for as long. An error in one process ends all of
    them with the same exit status; only one prints it, and the errors raised in the others have an empty text.
    """
    if world.size == 1:
        alone = SingleProcessTeam(timeout=timeout, patience=patience)
        try:
            yield alone
        finally:
            alone.leave()
        return
    # Otherwise torch prints C++ stack traces when another process dies.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from runner.distributed.processes import process_team

    with process_team(world, rendezvous(), timeout=timeout, patience=patience) as team:
        yield team

"""Several processes that train one run: ranks, exchange of values, detection of failures, layout of the model.

Modules that only several processes need, and only these, import ``torch.distributed``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from runner.distributed.communicator import Team
from runner.distributed.world import World, rendezvous


@contextmanager
def join_team(world: World, *, timeout: float, patience: float) -> Iterator[Team]:
    """Within the block, this process is a member of its team. Raises ConfigError if it cannot reach the others.

    A process that keeps the others waiting for more than ``timeout`` seconds (plus ``patience`` while it saves or
    restores) ends the run; so does a single process that takes no step for as long. An error in one process ends all
    processes with the same exit status. Only one of them prints it; the errors that the others raise have no text.
    """
    if world.size == 1:
        single = Team(timeout=timeout, patience=patience)
        try:
            yield single
        finally:
            if single.watch is not None:
                single.watch.close()
        return
    # Otherwise torch prints C++ stack traces when another process dies.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from runner.distributed.processes import process_team

    with process_team(world, rendezvous(), timeout=timeout, patience=patience) as team:
        yield team

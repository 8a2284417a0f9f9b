"""From the environment of a launcher to the team of a process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from runner.distributed.team import Alone, Team
from runner.distributed.world import World, meeting


@contextmanager
def joined(world: World, *, timeout: float, patience: float) -> Iterator[Team]:
    """Be in the team of that world meanwhile, in which nobody may keep the others waiting for longer than ``timeout``
    seconds, or ``patience`` more at its storage. Raises ConfigError where the others cannot be found.

    Whatever one process raises ends all of them, with the same exit status. It is told by one: what is raised in the
    others has no text.
    """
    if world.size == 1:
        yield Alone()
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # whoever died is told, without stack traces of sockets
    from runner.distributed.many import met

    with met(world, meeting(), timeout=timeout, patience=patience) as team:
        yield team

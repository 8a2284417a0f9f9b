"""What all ranks do alike when a state is saved: copy it at its step, and commit the copy together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runner.agreement import together
from runner.callbacks.base import Loop
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.staging import Staging
from runner.checkpoint.store import CheckpointStore
from runner.errors import StorageError, printable
from runner.ranks import Ranks

log = logging.getLogger("runner")


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot on its way to the storage, and the room its tensors take meanwhile. An ``exact`` one
    must be of this step; instead of another, a newer one will do as well."""

    snapshot: Snapshot
    staging: Staging
    exact: bool

    @property
    def step(self) -> int:
        return self.snapshot.step


@dataclass(frozen=True, slots=True)
class Hooks:
    """What else a commit is made of.

    ``mark`` is called at the step, in the training thread; what it returns goes into the commit as facts. The others
    are called in the thread that writes: ``flush`` before the commit, to make durable what was marked; ``successor``
    after it, to name a newer attempt; ``committed`` when it is acknowledged; ``retain`` to remove what is not kept.
    """

    mark: Callable[[int], dict[str, Any]]
    flush: Callable[[], None]
    successor: Callable[[], str | None]
    committed: Callable[[CommitId], None]
    retain: Callable[[], None]


class Saves:
    """Copies of the state, and their commits. ``rooms`` are those of copies that are no longer needed."""

    def __init__(self, store: CheckpointStore, hooks: Hooks, *, attempt: int, ranks: Ranks) -> None:
        self.store = store
        self.hooks = hooks
        self.attempt = attempt
        self.ranks = ranks
        self.rooms: list[Staging] = []

    def check(self, loop: Loop) -> None:
        """Raise StateError for a state that cannot be saved: now, not hours later."""
        Snapshot.of(loop.step, loop.state.state_dict(), ranks=self.ranks)

    def stage(self, loop: Loop, *, exact: bool) -> Job:
        """Copy what this rank writes of the state."""
        facts = self.hooks.mark(loop.step)
        if loop.objective is not None:
            facts["objective"] = loop.objective
        facts |= {"elapsed": loop.elapsed, "stop": loop.stop}
        snapshot = Snapshot.of(loop.step, loop.state.state_dict(), ranks=self.ranks, **facts)
        staging = self.rooms.pop() if self.rooms else Staging()
        return Job(staging.stage(snapshot), staging, exact)

    def commit(self, job: Job) -> CommitId:
        """Commit a copy; in the thread that writes, on all ranks at once."""
        # What is flushed is not fenced by the number in its name alone.
        self.store.require_newest(self.hooks.successor)
        together(self.store.ranks, lambda: self._prepare(job))
        commit = self.store.commit(job.snapshot, attempt=self.attempt, successor=self.hooks.successor)
        self.rooms.append(job.staging)
        return commit

    def settle(self, commit: CommitId) -> None:
        """What follows a commit that is acknowledged."""
        self.hooks.committed(commit)
        try:
            self.hooks.retain()
        except StorageError as error:
            log.warning("older checkpoints were not removed: %s", printable(error))

    def _prepare(self, job: Job) -> None:
        job.staging.wait()
        self.hooks.flush()

"""Commits the state every so often, when the objective improved, and at the end."""

from collections.abc import Callable
from typing import Any

from runner.callbacks.base import Callback, Loop
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.retention import Retention
from runner.checkpoint.store import CheckpointStore, Snapshot
from runner.errors import StorageError
from runner.interval import Interval


class SaveCheckpoint(Callback):
    """Takes a snapshot and commits it under retention. Runs last, when the step has been evaluated and reported.

    ``prepare`` is called before each commit with the step; what the calls return goes into the commit as facts.
    ``acknowledged`` is told of every commit.
    """

    def __init__(
        self,
        store: CheckpointStore,
        interval: Interval,
        *,
        attempt: int,
        retention: Retention,
        prepare: Callable[[int], dict[str, Any]],
        successor: Callable[[], str | None],
        acknowledged: Callable[[CommitId], None],
    ) -> None:
        self.store = store
        self.interval = interval
        self.attempt = attempt
        self.retention = retention
        self.prepare = prepare
        self.successor = successor
        self.acknowledged = acknowledged
        self._saved = 0

    def on_start(self, loop: Loop) -> None:
        Snapshot.of(loop.step, loop.state.state_dict())  # what cannot be saved is an error now, not hours later
        self._saved = loop.step
        self.interval.restart()
        if loop.improved:  # evaluated only now: the checkpoint that this attempt began from does not say so
            self._save(loop)

    def on_step(self, loop: Loop) -> None:
        if loop.improved or self.interval.due(loop.step) or self.retention.pins(loop.step):
            self._save(loop)

    def on_end(self, loop: Loop) -> None:
        if self._saved != loop.step:
            self._save(loop)

    def _save(self, loop: Loop) -> None:
        facts = self.prepare(loop.step)
        if loop.objective is not None:
            facts["objective"] = loop.objective
        snapshot = Snapshot.of(loop.step, loop.state.state_dict(), elapsed=loop.elapsed, **facts)
        try:
            commit = self.store.commit(snapshot, attempt=self.attempt, successor=self.successor)
        except StorageError as error:
            raise StorageError(
                f"the checkpoint of step {loop.step} could not be written: {error}.\n"
                f"The last one is of step {self._saved} and is whole; mend the storage and run the same command again."
            ) from error
        self._saved = loop.step
        self.acknowledged(commit)
        self.store.retain(self.retention, attempt=self.attempt)
        self.interval.restart()

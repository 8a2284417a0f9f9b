"""What all ranks do when a state is saved: copy it at its step, and commit the copies together."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runner.agreement import together
from runner.callbacks.base import Loop
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.staging import Staging
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensors import is_finite
from runner.errors import NonFiniteError, StorageError, printable
from runner.ranks import Ranks

log = logging.getLogger("runner")


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot to be written, and the buffers that hold its tensors until then. An ``exact`` one is needed itself;
    any other may be replaced by a newer one. ``weights`` are the names of its tensors that have to be finite.
    """

    snapshot: Snapshot
    staging: Staging
    exact: bool
    weights: Collection[str] = ()

    @property
    def step(self) -> int:
        return self.snapshot.step


@dataclass(frozen=True, slots=True)
class Hooks:
    """What else happens with a commit.

    ``mark`` is called at the step, in the training thread; the commit stores what it returns as facts. The others are
    called in the writer's thread: ``flush`` before the commit, to make durable what was marked; ``successor`` after it,
    for the name of a newer attempt; ``committed`` when it is acknowledged; ``retain`` to remove old checkpoints.
    """

    mark: Callable[[int], dict[str, Any]]
    flush: Callable[[], None]
    successor: Callable[[], str | None]
    committed: Callable[[CommitId], None]
    retain: Callable[[], None]


class Saves:
    """Copies of the state, and their commits. ``rooms`` are buffers that can be reused; ``weights`` names the tensors
    that have to be finite.
    """

    def __init__(
        self,
        store: CheckpointStore,
        hooks: Hooks,
        *,
        attempt: int,
        ranks: Ranks,
        weights: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.store = store
        self.hooks = hooks
        self.attempt = attempt
        self.ranks = ranks
        self.weights = weights
        self.rooms: list[Staging] = []

    def check(self, loop: Loop) -> None:
        """Raise StateError for a state that cannot be saved, at the start instead of hours later."""
        Snapshot.of(loop.step, loop.state.state_dict(), ranks=self.ranks)

    def stage(self, loop: Loop, *, exact: bool) -> Job:
        """Copy the part of the state that this rank writes."""
        facts = self.hooks.mark(loop.step)
        if loop.objective is not None:
            facts["objective"] = loop.objective
        facts |= {"elapsed": loop.elapsed, "stop": loop.stop}
        snapshot = Snapshot.of(loop.step, loop.state.state_dict(), ranks=self.ranks, **facts)
        staging = self.rooms.pop() if self.rooms else Staging()
        return Job(staging.stage(snapshot), staging, exact, frozenset(self.weights()))

    def commit(self, job: Job) -> CommitId:
        """Commit a copy; in the writer's thread, on all ranks together."""
        # Metrics and ledger are flushed before the commit: a superseded attempt must not do so.
        self.store.require_newest(self.hooks.successor)
        together(self.store.ranks, lambda: self._prepare(job))
        commit = self.store.commit(job.snapshot, attempt=self.attempt, successor=self.hooks.successor)
        self.rooms.append(job.staging)
        return commit

    def settle(self, commit: CommitId) -> None:
        """Tell that a commit is acknowledged, and remove old checkpoints."""
        self.hooks.committed(commit)
        try:
            self.hooks.retain()
        except StorageError as error:
            log.warning("older checkpoints were not removed: %s", printable(error))

    def _prepare(self, job: Job) -> None:
        job.staging.wait()
        for name, tensor in job.snapshot.tensors.items():
            if _is_spoiled(name, tensor, job.weights):
                raise NonFiniteError(
                    f"the state of step {job.step} is not saved: {name} is NaN or infinite, though no loss was until "
                    "then. The checkpoints from before are finite and are kept"
                )
        self.hooks.flush()


def _is_spoiled(name: str, tensor: Tensor, weights: Collection[str]) -> bool:
    """Whether training cannot go on with a tensor. Buffers may have what they like, such as masks; of an optimizer's
    moments a maximum may be infinite, while NaN reaches the weights with the next step.
    """
    moments = name.startswith("optimizer/") and tensor.is_floating_point()
    if is_finite(tensor) if moments or name in weights else True:
        return False
    return not moments or bool(tensor.float().isnan().any())

"""What all ranks do when a state is saved: copy it at its step, and commit the copies together.

Saves checkpoints in the background: periodically, when the objective improved, and at the end.

Saving on ranks other than 0: they copy and commit the same steps as rank 0, and decide nothing.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runner.activity import doing
from runner.callbacks.base import Callback, Loop
from runner.checkpoint.background_writer import Follower, Writer
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.snapshot import Snapshot, Staging
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import is_finite
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, on_all_ranks, on_rank_zero
from runner.errors import NonFiniteError, StorageError, printable
from runner.interval import CostBudget, Interval

log = logging.getLogger("runner")


@dataclass(frozen=True, slots=True)
class PendingSave:
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
        comm: Communicator,
        weights: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.store = store
        self.hooks = hooks
        self.attempt = attempt
        self.comm = comm
        self.weights = weights
        self.rooms: list[Staging] = []
        self.save_listeners: Sequence[Callable[[Loop], None]] = ()  # called when the state was copied
        self.commit_listeners: Sequence[Callable[[int], None]] = ()  # called with the step, in the writer's thread

    def check(self, loop: Loop) -> None:
        """Raise StateError for a state that cannot be saved, at the start instead of hours later."""
        Snapshot.of(loop.step, loop.state.state_dict(), comm=self.comm)

    def stage(self, loop: Loop, *, exact: bool) -> PendingSave:
        """Copy the part of the state that this rank writes."""
        facts = self.hooks.mark(loop.step)
        if loop.objective is not None:
            facts["objective"] = loop.objective
        facts |= {"elapsed": loop.elapsed, "stop": loop.stop}
        snapshot = Snapshot.of(loop.step, loop.state.state_dict(), comm=self.comm, **facts)
        staging = self.rooms.pop() if self.rooms else Staging()
        job = PendingSave(staging.stage(snapshot), staging, exact, frozenset(self.weights()))
        for listener in self.save_listeners:
            listener(loop)
        return job

    def commit(self, job: PendingSave) -> CommitId:
        """Commit a copy; in the writer's thread, on all ranks together."""
        # Metrics and ledger are flushed before the commit: a superseded attempt must not do so.
        self.store.require_newest(self.hooks.successor)
        on_all_ranks(self.store.comm, lambda: self._prepare(job))
        commit = self.store.commit(job.snapshot, attempt=self.attempt, successor=self.hooks.successor)
        for listener in self.commit_listeners:
            listener(commit.step)
        self.rooms.append(job.staging)
        return commit

    def settle(self, commit: CommitId) -> None:
        """Tell that a commit is acknowledged, and remove old checkpoints."""
        self.hooks.committed(commit)
        try:
            self.hooks.retain()
        except StorageError as error:
            log.warning("older checkpoints were not removed: %s", printable(error))

    def _prepare(self, job: PendingSave) -> None:
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


# What rank 0 decides and all ranks do, as JSON: copy the state now (``exact``: this very step is needed), or write the
# copy of the step ``again`` once more; and give up the copies of the steps in ``drop``. ``more`` orders may follow.
Order = dict[str, Any]

_LONGEST_PAUSE = 60.0  # seconds between two attempts to save
_LOOK_SECONDS = 1.0  # while waiting for a save: how often to check that it does not take too long
QUIET_SECONDS = 5.0  # that training waits for room without a word
_PATIENCE = 60.0  # seconds that a save may always take


class SaveCheckpoint(Callback):
    """Copies the state between two steps and commits the copy in the background. Runs last, after the step has been
    evaluated and reported.

    A periodic save waits until the previous one is written, and then copies the state of that moment, so that one copy
    in memory is enough. A state that improved the objective, or is of a step that retention ``pins``, must be saved at
    its own step: it is copied at once, into a second buffer if needed. If that has a copy which must be kept, too,
    training waits until it is being written, and says so. Only where the ``best`` one alone is kept does a better one
    replace it.

    A storage that fails does not stop training: the next save is tried after a growing pause. Only after it has failed
    for ``max_unsaved`` seconds does training end, with the cause. The last save is tried for just as long.

    Rank 0 decides, and has this callback; other ranks have ``FollowCheckpoint``.
    """

    def __init__(
        self,
        store: CheckpointStore,
        interval: Interval,
        affordable: CostBudget | None,
        hooks: Hooks,
        *,
        attempt: int,
        pins: Callable[[int], bool],
        max_unsaved: float,
        background: bool,
        best: int = 1,
        weights: Callable[[], Collection[str]] = tuple,
        comm: Communicator = SINGLE_PROCESS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.comm = comm
        self.saves = Saves(store, hooks, attempt=attempt, comm=comm, weights=weights)
        self.interval = interval
        self.affordable = affordable
        self.pins = pins
        self.best = best
        self.max_unsaved = max_unsaved
        self.background = background
        self._clock = clock
        self._writer = Writer(self._commit)
        self.begins = False  # whether the state at the start is in no commit of this run yet
        self._unwritten: list[PendingSave] = []  # exact copies that could not be written, to be tried again
        self._again: PendingSave | None = None  # the copy that the current order is to write once more
        self._dropped: list[int] = []  # steps whose copies other ranks must give up, too
        self._saved = 0  # the step of the last acknowledged commit
        self._owed = False  # a save was due and could not begin
        self._unsaved_since: float | None = None  # when a save was first due that is not acknowledged yet
        self._pause = 1.0
        self._retry_at = 0.0
        self._cost = _Cost(clock)

    @doing("saves")
    def on_start(self, loop: Loop) -> None:
        self.saves.check(loop)
        self._saved = loop.step
        self._restart()
        # An evaluation that was interrupted has just been made: the checkpoint resumed from does not contain it. What a
        # run begins with may be gone from its parent when it is next started.
        first = loop.evaluation is not None or self.begins
        self.act(loop, on_rank_zero(self.comm, lambda: self._order(exact=True) if first else None))
        if self.begins:
            self._wait()

    def on_step(self, loop: Loop) -> None:
        self._cost.step(writing=not self._writer.idle, counts=loop.evaluation is None)
        while order := on_rank_zero(self.comm, lambda: self.decide(loop)):
            self.act(loop, order)
            if not order["more"]:
                break

    def decide(self, loop: Loop) -> Order | None:
        """What is to be saved now, for all ranks to ``act`` on. Raises errors that must end training."""
        self._look()
        if loop.improved or loop.save or self.pins(loop.step):
            return self._exact(loop)
        if self._owed or self.interval.due(loop.step) or (self.affordable is not None and self.affordable.due()):
            self._owed = True
            self._unsaved_since = self._unsaved_since or self._clock()
            if self._writer.idle and self._clock() >= self._retry_at:
                return self._order()
        return None

    @doing("saves")
    def act(self, loop: Loop, order: Order | None) -> None:
        """Do what ``decide`` returned."""
        if order is None:
            return
        began = self._clock()
        job, self._again = self._again, None
        self._writer.put(job or self.saves.stage(loop, exact=order["exact"]))
        if loop.save or not self.background:
            self._wait()
            on_rank_zero(self.comm, self._look)
        self._cost.saved(stall=self._clock() - began)

    @doing("saves")
    def on_end(self, loop: Loop) -> None:
        self._wait()
        order = on_rank_zero(self.comm, lambda: self._last(loop, pause=False))
        while order is not None:
            self.act(loop, order)
            self._wait()
            order = on_rank_zero(self.comm, lambda: self._last(loop, pause=True))

    @doing("saves")
    def close(self) -> None:
        """Finish the commit in flight, if there is one and the storage is not dead."""
        since = self._unsaved_since or self._clock()
        self._writer.close(max(since + self.max_unsaved - self._clock(), 5.0))

    def _wait(self) -> None:
        """Wait until all copies are written."""
        while not self._writer.wait(_LOOK_SECONDS):
            self._raise_if_stuck()

    def _last(self, loop: Loop, *, pause: bool) -> Order | None:
        """What is left to be saved at the end; with a ``pause`` before a save that failed is tried again."""
        self._look()
        if pause and self._owed:
            time.sleep(min(self._pause, 5.0))
        return self._order() if self._saved != loop.step or self._unwritten else None

    @doing("saves")
    def _exact(self, loop: Loop) -> Order:
        """Order a copy of this step as soon as there is room for it; before that, what makes room."""
        began, told = time.monotonic(), False
        while (held := self._held(loop)) is not None:
            if self._unwritten and self._writer.waiting is None:
                if self._clock() < self._retry_at:
                    time.sleep(min(self._pause, 5.0))
                return {**self._order(), "more": True}
            if not told and time.monotonic() - began > QUIET_SECONDS:
                told = True
                log.warning(
                    "training waits: the states of steps %d and %d are both to be kept, and the first one is "
                    "not yet being written",
                    held.step,
                    loop.step,
                )
            self._writer.wait_for_room(_LOOK_SECONDS)
            self._look()
        return self._order(exact=True)

    def _held(self, loop: Loop) -> PendingSave | None:
        """The copy that is not written yet, and must not be given up for that of this step."""
        waiting = self._writer.waiting
        copies = [*self._unwritten, *([waiting] if waiting is not None and waiting.exact else [])]
        replaceable = loop.improved and self.best == 1
        return next((job for job in copies if not replaceable or self.pins(job.step)), None)

    def _order(self, *, exact: bool = False) -> Order:
        """Order a new copy, or another try to write an exact one that failed."""
        job = self._unwritten.pop(0) if self._unwritten and not exact else None
        if job is None:
            waiting = self._writer.cancel()
            for unwanted in (*self._unwritten, *([] if waiting is None else [waiting])):
                self._drop(unwanted)
            self._unwritten = []
        self._again = job
        self._owed = job is not None
        self._restart()
        dropped, self._dropped = self._dropped, []
        return {"exact": exact, "again": job and job.step, "drop": dropped, "more": False}

    def _drop(self, job: PendingSave) -> None:
        self.saves.rooms.append(job.staging)
        self._dropped.append(job.step)

    def _commit(self, job: PendingSave) -> None:
        """Commit one copy; runs in the writer's thread."""
        self._unsaved_since = self._unsaved_since or self._clock()
        self.saves.store.comm.broadcast(job.step)  # tells the other ranks which of their copies to write
        commit = self.saves.commit(job)
        self._saved, self._unsaved_since, self._pause = max(commit.step, self._saved), None, 1.0
        self.saves.settle(commit)

    def _look(self) -> None:
        """Handle what happened in the writer's thread. Raises errors that must end training."""
        if self.affordable is not None and self._writer.idle and (spent := self._cost.of_last_save()) is not None:
            self.affordable.spent(spent)
        while self._writer.failures:
            job, error = self._writer.failures.popleft()
            if not isinstance(error, StorageError):
                raise error
            self._failed(job, error)
        self._raise_if_stuck()

    def _raise_if_stuck(self) -> None:
        unsaved = self._unsaved()
        if unsaved > max(self.max_unsaved, _PATIENCE):
            where = self.saves.store.comm.describe_wait()
            raise StorageError(
                f"a checkpoint has been on its way for {unsaved:.0f} seconds. {where and f'{where}. '}{self._remedy()}"
            )

    def _failed(self, job: PendingSave, error: StorageError) -> None:
        step, left = job.step, self.max_unsaved - self._unsaved()
        if left <= 0:
            raise StorageError(
                f"the checkpoint of step {step} could not be written: {error}.\n{self._remedy()}"
            ) from error
        if job.exact:
            self._unwritten.append(job)
        else:
            self._drop(job)
        self._owed, self._retry_at = True, self._clock() + self._pause
        log.warning(
            "the checkpoint of step %d could not be written: %s. Training goes on and tries again in %.0f seconds; "
            "it ends when that fails for another %.0f",
            step,
            printable(error),
            self._pause,
            left,
        )
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _unsaved(self) -> float:
        """Seconds since the oldest save that was due and is not acknowledged."""
        return 0.0 if self._unsaved_since is None else self._clock() - self._unsaved_since

    def _remedy(self) -> str:
        saved = max([*self.saves.store.verified], default=None)  # of a fork's parent it is none of this run
        told = "No step is saved" if saved is None else f"The last one is of step {saved.step} and is whole"
        again = f"mend the storage and run the same command again (checkpoint.max_unsaved={self.max_unsaved:g})."
        return f"{told}; {again}"

    def _restart(self) -> None:
        self.interval.restart()
        if self.affordable is not None:
            self.affordable.restart()


class _Cost:
    """What a save costs training: the stall, and by how much it slows down the steps beside it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._usual: float | None = None  # seconds of a step while nothing is written, averaged over the last ones
        self._spent: float | None = None

    def step(self, *, writing: bool, counts: bool) -> None:
        """A step ended. ``writing``: a save was running; ``counts``: it was an ordinary step, without an evaluation."""
        now = self._clock()
        took, self._last = now - self._last, now
        if not counts:
            return
        if not writing:
            self._usual = took if self._usual is None else 0.9 * self._usual + 0.1 * took
        elif self._usual is not None and self._spent is not None:
            self._spent += took - self._usual

    def saved(self, *, stall: float) -> None:
        """A save began; training waited ``stall`` seconds for it."""
        self._spent = stall
        self._last = self._clock()

    def of_last_save(self) -> float | None:
        """The cost in seconds, once; None when asked again."""
        spent, self._spent = self._spent, None
        return None if spent is None else max(spent, 0.0)


class FollowCheckpoint(Callback):
    """Does what ``SaveCheckpoint`` on rank 0 decides, at the same steps.

    A copy that could not be written is kept until rank 0 decides whether to try again: an error on one rank is an error
    of all ranks, and rank 0 decides what follows.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        attempt: int,
        background: bool,
        comm: Communicator,
        weights: Callable[[], Collection[str]] = tuple,
    ) -> None:
        hooks = Hooks(lambda step: {}, lambda: None, lambda: None, lambda commit: None, lambda: None)
        self.saves = Saves(store, hooks, attempt=attempt, comm=comm, weights=weights)
        self.comm = comm
        self.background = background
        self._writer: Follower[PendingSave] = Follower(self._commit, lambda: int(store.comm.broadcast(None)))

    @doing("saves")
    def on_start(self, loop: Loop) -> None:
        self.saves.check(loop)
        self._act(loop)

    def on_step(self, loop: Loop) -> None:
        while (order := self._act(loop)) and order["more"]:
            pass

    @doing("saves")
    def on_end(self, loop: Loop) -> None:
        self._writer.wait()
        while self._act(loop):
            self._writer.wait()

    @doing("saves")
    def act(self, loop: Loop, order: Order | None) -> None:
        """Do what was decided."""
        if order is None:
            return
        for step in order["drop"]:
            self.saves.rooms.append(self._writer.take(step).staging)
        again = order["again"]
        job = self.saves.stage(loop, exact=order["exact"]) if again is None else self._writer.take(again)
        self._writer.put(job.step, job)
        if loop.save or not self.background:
            self._writer.wait()
            on_rank_zero(self.comm, lambda: None)  # what the first rank makes of it

    @doing("saves")
    def close(self) -> None:
        """Finish the commit in flight, if there is one."""
        self._writer.close(5.0)

    def _act(self, loop: Loop) -> Order | None:
        order: Order | None = on_rank_zero(self.comm, lambda: None)
        self.act(loop, order)
        return order

    def _commit(self, job: PendingSave) -> None:
        self.saves.settle(self.saves.commit(job))

"""Commits the state every so often, when the objective improved, and at the end, while training goes on."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runner.callbacks.base import Callback, Loop
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.snapshot import Snapshot
from runner.checkpoint.staging import Staging
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.writer import Writer
from runner.errors import StorageError, printable
from runner.interval import Affordable, Interval

log = logging.getLogger("runner")

_LONGEST_PAUSE = 60.0  # seconds between two tries to save
_PATIENCE = 60.0  # seconds that a save may take in any case


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot on its way to the storage, and the room its tensors take meanwhile. An ``exact`` one
    must be of this step; instead of another, a newer one will do as well."""

    snapshot: Snapshot
    staging: Staging
    exact: bool


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


class SaveCheckpoint(Callback):
    """Copies the state at a step boundary and has it committed in the background. Runs last, when the step has been
    evaluated and reported.

    One copy is enough for what is merely due: it waits for the one in flight and is taken then, so that the newest
    state is saved. A state that improved the objective is copied at its own step, into a second room if need be; so
    is that of a step that retention ``pins``, unless the second room is taken.

    A storage that fails does not stop training: the next save is tried after a growing pause. Only when it has gone on
    for ``max_unsaved`` seconds, training ends with the cause. At the end, tries go on for as long.
    """

    def __init__(
        self,
        store: CheckpointStore,
        interval: Interval,
        affordable: Affordable | None,
        hooks: Hooks,
        *,
        attempt: int,
        pins: Callable[[int], bool],
        max_unsaved: float,
        background: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.interval = interval
        self.affordable = affordable
        self.hooks = hooks
        self.attempt = attempt
        self.pins = pins
        self.max_unsaved = max_unsaved
        self.background = background
        self._clock = clock
        self._writer = Writer(self._commit)
        self._rooms: list[Staging] = []
        self._failed_exact: Job | None = None  # to be tried again as it is
        self._saved = 0  # the step of the last acknowledged commit
        self._owed = False  # a save was due and could not begin
        self._unsaved_since: float | None = None  # when a save was first due that is not acknowledged yet
        self._pause = 1.0
        self._retry_at = 0.0
        self._cost = _Cost(clock)

    def on_start(self, loop: Loop) -> None:
        Snapshot.of(loop.step, loop.state.state_dict())  # what cannot be saved is an error now, not hours later
        self._saved = loop.step
        self._restart()
        if loop.improved:  # evaluated only now: the checkpoint that this attempt began from does not say so
            self._save(loop, exact=True)

    def on_step(self, loop: Loop) -> None:
        self._cost.step(writing=not self._writer.idle, counts=loop.evaluation is None)
        self._look()
        pinned = self.pins(loop.step) and self._writer.waiting is None and self._failed_exact is None
        if loop.improved or pinned:
            self._save(loop, exact=True)
        elif self._owed or self.interval.due(loop.step) or (self.affordable is not None and self.affordable.due()):
            self._owed = True
            self._unsaved_since = self._unsaved_since or self._clock()
            if self._writer.idle and self._clock() >= self._retry_at:
                self._save(loop)

    def on_end(self, loop: Loop) -> None:
        self._writer.wait()
        self._look()
        while self._saved != loop.step or self._failed_exact:
            self._save(loop)
            self._writer.wait()
            self._look()
            if self._owed:
                time.sleep(min(self._pause, 5.0))

    def close(self) -> None:
        """Finish the commit in flight, if there is one and the storage is not dead."""
        since = self._unsaved_since or self._clock()
        self._writer.close(max(since + self.max_unsaved - self._clock(), 5.0))

    def _save(self, loop: Loop, *, exact: bool = False) -> None:
        began = self._clock()
        job = None if exact else self._failed_exact
        for unwanted in (self._writer.cancel(), self._failed_exact):
            if unwanted is not None and unwanted is not job:
                self._rooms.append(unwanted.staging)
        self._failed_exact = None
        self._owed = job is not None
        self._writer.put(job or self._stage(loop, exact))
        self._restart()
        if not self.background:
            self._writer.wait()
            self._look()
        self._cost.saved(stall=self._clock() - began)

    def _stage(self, loop: Loop, exact: bool) -> Job:
        facts = self.hooks.mark(loop.step)
        if loop.objective is not None:
            facts["objective"] = loop.objective
        snapshot = Snapshot.of(loop.step, loop.state.state_dict(), elapsed=loop.elapsed, **facts)
        staging = self._rooms.pop() if self._rooms else Staging()
        return Job(staging.stage(snapshot), staging, exact)

    def _commit(self, job: Job) -> None:
        """In the thread that writes."""
        self._unsaved_since = self._unsaved_since or self._clock()
        job.staging.wait()
        self.store.require_newest(self.hooks.successor)  # what is flushed is not fenced by the number in its name alone
        self.hooks.flush()
        commit = self.store.commit(job.snapshot, attempt=self.attempt, successor=self.hooks.successor)
        self._saved, self._unsaved_since, self._pause = commit.step, None, 1.0
        self._rooms.append(job.staging)
        self.hooks.committed(commit)
        try:
            self.hooks.retain()
        except StorageError as error:
            log.warning("older checkpoints were not removed: %s", printable(error))

    def _look(self) -> None:
        """Take over what happened in the thread that writes. Raises what training must not survive."""
        if self.affordable is not None and self._writer.idle and (spent := self._cost.of_last_save()) is not None:
            self.affordable.spent(spent)
        while self._writer.failures:
            job, error = self._writer.failures.popleft()
            if not isinstance(error, StorageError):
                raise error
            self._failed(job, error)
        unsaved = self._unsaved()
        if unsaved > max(self.max_unsaved, _PATIENCE):
            raise StorageError(f"a checkpoint has been on its way for {unsaved:.0f} seconds. {self._remedy()}")

    def _failed(self, job: Job, error: StorageError) -> None:
        step, left = job.snapshot.step, self.max_unsaved - self._unsaved()
        if left <= 0:
            raise StorageError(
                f"the checkpoint of step {step} could not be written: {error}.\n{self._remedy()}"
            ) from error
        if job.exact and not self._failed_exact:
            self._failed_exact = job
        else:
            self._rooms.append(job.staging)
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
        """Seconds since a save was due that has not been acknowledged."""
        return 0.0 if self._unsaved_since is None else self._clock() - self._unsaved_since

    def _remedy(self) -> str:
        return (
            f"The last one is of step {self._saved} and is whole; mend the storage and run the same command again "
            f"(checkpoint.max_unsaved={self.max_unsaved:g})."
        )

    def _restart(self) -> None:
        self.interval.restart()
        if self.affordable is not None:
            self.affordable.restart()


class _Cost:
    """What a save takes from training: the stall, and how much longer the steps beside it take than others."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._usual: float | None = None  # seconds of a step while nothing is written, averaged over the last ones
        self._spent: float | None = None

    def step(self, *, writing: bool, counts: bool) -> None:
        """A step ended; ``writing`` if a save went on beside it; ``counts`` if it is like other steps."""
        now = self._clock()
        took, self._last = now - self._last, now
        if not counts:
            return
        if not writing:
            self._usual = took if self._usual is None else 0.9 * self._usual + 0.1 * took
        elif self._usual is not None and self._spent is not None:
            self._spent += took - self._usual

    def saved(self, *, stall: float) -> None:
        """A save began, for which training waited so many seconds."""
        self._spent = stall
        self._last = self._clock()

    def of_last_save(self) -> float | None:
        """Seconds; None if that was told already."""
        spent, self._spent = self._spent, None
        return None if spent is None else max(spent, 0.0)

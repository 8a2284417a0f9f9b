"""Commits the state every so often, when the objective improved, and at the end, while training goes on."""

import logging
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from runner.agreement import led
from runner.callbacks.base import Callback, Loop
from runner.callbacks.saving import Hooks, Job, Saves
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.writer import Writer
from runner.errors import StorageError, printable
from runner.interval import Affordable, Interval
from runner.ranks import ALONE, Ranks

log = logging.getLogger("runner")

Order = dict[str, Any]  # JSON: whether the copy is ``exact``, or which step's is tried ``again``, and which to ``drop``

_LONGEST_PAUSE = 60.0  # seconds between two tries to save
_LOOK_SECONDS = 1.0  # between two looks whether a save that is waited for takes too long
_PATIENCE = 60.0  # seconds that a save may take in any case


class SaveCheckpoint(Callback):
    """Copies the state at a step boundary and has it committed in the background. Runs last, when the step has been
    evaluated and reported.

    One copy is enough for what is merely due: it waits for the one in flight and is taken then, so that the newest
    state is saved. A state that improved the objective is copied at its own step, into a second room if need be; so
    is that of a step that retention ``pins``, unless the second room is taken.

    A storage that fails does not stop training: the next save is tried after a growing pause. Only when it has gone on
    for ``max_unsaved`` seconds, training ends with the cause. At the end, tries go on for as long.

    Of several ranks the first decides, and has this callback; the others have ``FollowCheckpoint``.
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
        ranks: Ranks = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ranks = ranks
        self.saves = Saves(store, hooks, attempt=attempt, ranks=ranks)
        self.interval = interval
        self.affordable = affordable
        self.pins = pins
        self.max_unsaved = max_unsaved
        self.background = background
        self._clock = clock
        self._writer = Writer(self._commit)
        self._failed_exact: Job | None = None  # to be tried again as it is
        self._again: Job | None = None  # it is tried again now
        self._dropped: list[int] = []  # steps whose copies are no longer needed, for the other ranks
        self._saved = 0  # the step of the last acknowledged commit
        self._owed = False  # a save was due and could not begin
        self._unsaved_since: float | None = None  # when a save was first due that is not acknowledged yet
        self._pause = 1.0
        self._retry_at = 0.0
        self._cost = _Cost(clock)

    def on_start(self, loop: Loop) -> None:
        self.saves.check(loop)
        self._saved = loop.step
        self._restart()
        # Evaluated only now: the checkpoint that this attempt began from does not say so.
        self.act(loop, led(self.ranks, lambda: self._order(exact=True) if loop.improved else None))

    def on_step(self, loop: Loop) -> None:
        self.act(loop, led(self.ranks, lambda: self.decide(loop)))

    def decide(self, loop: Loop) -> Order | None:
        """What is to be saved now, for all ranks to ``act`` on. Raises what training must not survive."""
        self._cost.step(writing=not self._writer.idle, counts=loop.evaluation is None)
        self._look()
        pinned = self.pins(loop.step) and self._writer.waiting is None and self._failed_exact is None
        if loop.improved or pinned:
            return self._order(exact=True)
        if self._owed or self.interval.due(loop.step) or (self.affordable is not None and self.affordable.due()):
            self._owed = True
            self._unsaved_since = self._unsaved_since or self._clock()
            if self._writer.idle and self._clock() >= self._retry_at:
                return self._order()
        return None

    def act(self, loop: Loop, order: Order | None) -> None:
        """Do what was decided."""
        if order is None:
            return
        began = self._clock()
        job, self._again = self._again, None
        self._writer.put(job or self.saves.stage(loop, exact=order["exact"]))
        if not self.background:
            self._wait()
            led(self.ranks, self._look)
        self._cost.saved(stall=self._clock() - began)

    def on_end(self, loop: Loop) -> None:
        self._wait()
        tries = count()
        while (order := led(self.ranks, lambda: self._last(loop, again=next(tries) > 0))) is not None:
            self.act(loop, order)
            self._wait()

    def close(self) -> None:
        """Finish the commit in flight, if there is one and the storage is not dead."""
        since = self._unsaved_since or self._clock()
        self._writer.close(max(since + self.max_unsaved - self._clock(), 5.0))

    def _wait(self) -> None:
        """Wait until all copies are written."""
        while not self._writer.wait(_LOOK_SECONDS):
            self._raise_if_stuck()

    def _last(self, loop: Loop, *, again: bool) -> Order | None:
        """What is left to be saved at the end."""
        self._look()
        if again and self._owed:
            time.sleep(min(self._pause, 5.0))
        return self._order() if self._saved != loop.step or self._failed_exact else None

    def _order(self, *, exact: bool = False) -> Order:
        """Have a copy made, or one that could not be written tried again."""
        job = None if exact else self._failed_exact
        for unwanted in (self._writer.cancel(), self._failed_exact):
            if unwanted is not None and unwanted is not job:
                self._drop(unwanted)
        self._failed_exact, self._again = None, job
        self._owed = job is not None
        self._restart()
        dropped, self._dropped = self._dropped, []
        return {"exact": exact, "again": job and job.step, "drop": dropped}

    def _drop(self, job: Job) -> None:
        self.saves.rooms.append(job.staging)
        self._dropped.append(job.step)

    def _commit(self, job: Job) -> None:
        """In the thread that writes."""
        self._unsaved_since = self._unsaved_since or self._clock()
        self.saves.store.ranks.broadcast(job.step)  # of the copies that are there, this one
        commit = self.saves.commit(job)
        self._saved, self._unsaved_since, self._pause = commit.step, None, 1.0
        self.saves.settle(commit)

    def _look(self) -> None:
        """Take over what happened in the thread that writes. Raises what training must not survive."""
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
            where = self.saves.store.ranks.awaited()
            raise StorageError(
                f"a checkpoint has been on its way for {unsaved:.0f} seconds. {where and f'{where}. '}{self._remedy()}"
            )

    def _failed(self, job: Job, error: StorageError) -> None:
        step, left = job.step, self.max_unsaved - self._unsaved()
        if left <= 0:
            raise StorageError(
                f"the checkpoint of step {step} could not be written: {error}.\n{self._remedy()}"
            ) from error
        if job.exact and not self._failed_exact:
            self._failed_exact = job
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

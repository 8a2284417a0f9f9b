"""Saves the state of a run: copies it between two steps, and commits the copy in the background.

The way of a checkpoint: ``SaveCheckpoint`` decides when and copies (``checkpoint.snapshot``); the thread of
``checkpoint.snapshot.CommitThread`` makes the records durable and calls ``CheckpointStore.commit``, which writes the
data files (``checkpoint.tensor_file``) and then the manifest.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from runner import signals
from runner.activity import doing
from runner.callbacks.base import Callback, Loop
from runner.callbacks.reporting import FiniteLoss
from runner.checkpoint.snapshot import CommitThread, Snapshot, Staging
from runner.checkpoint.store import CheckpointStore, Retention
from runner.checkpoint.tensor_file import is_finite
from runner.data.ledger import Ledger
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, on_all_ranks, on_rank_zero
from runner.errors import Interrupted, NonFiniteError, RunnerError, StorageError, printable
from runner.metrics.writer import MetricWriters
from runner.run.attempts import Attempt

log = logging.getLogger("runner")

# What rank 0 decides and all ranks do, as JSON: ``retry`` the commit that failed, or ``drop`` the copies of these steps
# and copy the state now (``exact``: the state of another step will not do).
SaveRequest = dict[str, Any]

_SHARE = 0.01  # of the time, for saves by ``checkpoint.every=auto``
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 10.0, 3600.0  # seconds between two saves by ``auto``
_LONGEST_PAUSE = 60.0  # seconds between two tries to write while training continues ...
_LONGEST_WAIT = 5.0  # ... and while it waits, when nothing else is done in this time
_POLL_SECONDS = 1.0  # while waiting for a save: how often to check that it does not take too long
QUIET_SECONDS = 5.0  # training waits so long for a free buffer before it logs that it waits
_LEAST_LIMIT = 60.0  # seconds that a save may take even if ``max_unsaved`` is less
_STOP_SECONDS = 10.0  # after a stop signal: Slurm and Kubernetes send SIGKILL 30 seconds after SIGTERM
_LAST_SECONDS = 5.0  # ``close`` waits at least so long, and at most for what is left of ``max_unsaved``


@dataclass(eq=False)
class SaveCheckpoint(Callback):
    """Saves checkpoints periodically, when the objective improved, and at the end. Runs last, after the step has been
    evaluated and reported.

    A periodic save waits until the previous one is written, and then copies the state of that moment, so that one copy
    in memory is enough. A state that improved the objective, or is of a milestone of ``retention``, must be
    saved at its own step: it is copied at once, into a second buffer if needed. If both buffers hold states that must
    be saved, training waits until the first is being written, and logs it. Only where retention keeps a single best
    checkpoint does a better state replace it.

    A failing storage does not stop training: the next save is tried after a growing pause. Only after it has failed
    for ``max_unsaved`` seconds does training end, with the cause. The last save is tried for as long; after a stop
    signal for ``_STOP_SECONDS``, and a write that takes longer is reported, since SIGKILL may end it.

    All ranks have this callback. Rank 0 decides in ``decide``, and all ranks ``act`` on its request at the same step.
    Only rank 0 has the ``attempt`` that owns the run, which notices when a newer one takes over, and ``records``.
    """

    store: CheckpointStore
    timer: "SaveTimer"
    retention: Retention
    attempt_number: int
    identity: Mapping[str, Any]
    max_unsaved: float
    background: bool
    attempt: Attempt | None = None
    records: Sequence[Ledger | MetricWriters] = ()  # ``mark`` is called with the copy, ``flush`` before its commit
    guard: FiniteLoss = field(default_factory=FiniteLoss)
    comm: Communicator = SINGLE_PROCESS
    save_listeners: Sequence[Callable[[Loop], None]] = ()  # called when the state was copied
    commit_listeners: Sequence[Callable[[int], None]] = ()  # called with the step, in the commit thread
    save_at_start: bool = False  # the run begins with a state of its parent, which no commit of this run holds yet

    def __post_init__(self) -> None:
        self.commit_thread = CommitThread(self._commit, self.store.comm)
        self._clock = self.timer.clock
        self._listener_error: BaseException | None = None
        self._free: list[Staging] = []
        self._saved = 0  # the step of the last acknowledged commit
        self._overdue = False  # a save was due and could not begin
        self._unsaved_since: float | None = None  # when a save was first due that is not acknowledged yet
        self._pause = 1.0
        self._retry_at = 0.0
        self._stop_since: float | None = None  # when a stop signal was first noticed
        self._warned = False  # that the last save takes longer

    @doing("saves")
    def on_start(self, loop: Loop) -> None:
        # Raise StateError for a state that cannot be saved now, and not hours later.
        Snapshot.of(loop.step, loop.state.state_dict(), comm=self.comm)
        self._saved = loop.step
        self.timer.restart()
        # An evaluation that had been interrupted was just repeated, and its result is in no checkpoint yet. A state of
        # the parent is saved because the parent may remove its checkpoint before the next attempt.
        due = loop.evaluation is not None or self.save_at_start
        if request := on_rank_zero(self.comm, lambda: self._request(exact=True) if due else None):
            self.act(loop, request)
        if self.save_at_start:
            self._wait(loop)

    def on_step(self, loop: Loop) -> None:
        if self._listener_error is not None:
            raise self._listener_error
        self.timer.note_step(during_save=not self.commit_thread.idle, is_plain=loop.evaluation is None)
        while request := on_rank_zero(self.comm, lambda: self.decide(loop)):
            self.act(loop, request)
            if not request["retry"]:
                break

    @doing("saves")
    def on_end(self, loop: Loop) -> None:
        self._wait(loop)
        while request := on_rank_zero(self.comm, lambda: self._request_last(loop)):
            self.act(loop, request)
            self._wait(loop)
            if self.commit_thread.waiting:  # it failed
                time.sleep(min(self._pause, _LONGEST_WAIT))
        if self._listener_error is not None:
            raise self._listener_error

    @doing("saves")
    def close(self) -> None:
        """Finish the commit in flight, if there is one and the storage is not dead."""
        left = self.max_unsaved - self._unsaved() if self.comm.rank == 0 else 0.0
        self.commit_thread.close(max(left, _LAST_SECONDS))

    def decide(self, loop: Loop) -> SaveRequest | None:
        """What is to be saved now, for all ranks to ``act`` on. Raises errors that must end training."""
        self._handle_failure(loop)
        if loop.improved or loop.save or self.retention.is_milestone(loop.step):
            return self._request_exact(loop)
        if self._overdue or self.timer.due(loop.step):
            self._overdue = True
            self._unsaved_since = self._unsaved_since or self._clock()
            if self.commit_thread.idle and self._clock() >= self._retry_at:
                return self._request()
        return None

    @doing("saves")
    def act(self, loop: Loop, request: SaveRequest) -> None:
        """Carry out the request of rank 0: a save begins here."""
        began = self._clock()
        if request["retry"]:
            self.commit_thread.retry()
        else:
            self._free += map(self.commit_thread.take, request["drop"])
            self.commit_thread.put(self._copy(loop, exact=request["exact"]))
        if loop.save or not self.background:
            self._wait(loop)
            on_rank_zero(self.comm, lambda: self._handle_failure(loop))
        self.timer.note_save(stall=self._clock() - began)

    def _copy(self, loop: Loop, *, exact: bool) -> Staging:
        """Copy the part of the state that this rank writes."""
        facts = self._facts(loop) if self.comm.rank == 0 else {}
        snapshot = Snapshot.of(loop.step, loop.state.state_dict(), comm=self.comm, **facts)
        copy = self._free.pop() if self._free else Staging()
        copy.stage(snapshot, exact=exact, weights=frozenset(loop.state.weights()))
        for listener in self.save_listeners:
            listener(loop)
        return copy

    def _facts(self, loop: Loop) -> dict[str, Any]:
        self.guard.check()
        marks = [record.mark(loop.step).items() for record in self.records]
        changes = loop.state.changes()
        facts = {"identity": self.identity, **dict(chain.from_iterable(marks))}
        facts |= {"structure": changes} if changes else {}
        facts |= {} if loop.objective is None else {"objective": loop.objective}
        return facts | {"elapsed": loop.elapsed, "stop": loop.stop}

    def _commit(self, copy: Staging) -> None:
        """Commit a copy; in the commit thread, on all ranks together."""
        if self.store.comm.rank == 0:
            self._unsaved_since = self._unsaved_since or self._clock()
            self.store.comm.broadcast(copy.snapshot.step)  # the commit threads of the other ranks wait for it
        # A superseded attempt must not flush its records.
        on_rank_zero(self.store.comm, self._require_newest)
        on_all_ranks(self.store.comm, lambda: self._prepare(copy))
        commit = self.store.commit(copy.snapshot, attempt=self.attempt_number, require_newest=self._require_newest)
        self._free.append(copy)
        self._saved, self._unsaved_since, self._pause = max(commit.step, self._saved), None, 1.0
        if self.attempt is not None:
            self.attempt.beat(step=commit.step, committed=commit.step)
        if self.store.comm.rank == 0:
            try:
                self.store.retain(self.retention, attempt=self.attempt_number)
            except StorageError as error:
                log.warning("older checkpoints were not removed: %s", printable(error))
        try:
            for listener in self.commit_listeners:
                listener(commit.step)
        except BaseException as error:  # also sys.exit: for the training thread, since the commit itself is whole
            self._listener_error = self._listener_error or error

    def _prepare(self, copy: Staging) -> None:
        copy.wait()
        for name, tensor in copy.snapshot.tensors.items():
            if _spoils_training(name, tensor, copy.weights):
                raise NonFiniteError(
                    f"the state of step {copy.snapshot.step} is not saved: {name} is NaN or infinite, though no loss "
                    "was so far. Earlier checkpoints are finite and are kept"
                )
        for record in self.records:
            record.flush()

    def _require_newest(self) -> None:
        if self.attempt is not None:
            self.attempt.require_newest()

    def _wait(self, loop: Loop) -> None:
        """Wait until all copies are written, or one failed."""
        while not self.commit_thread.wait(_POLL_SECONDS):
            self._raise_if_stuck()
            if self._unsaved() and self._time_left(loop) <= 0 and not self._warned:
                self._warned = True
                text = "%s: the save of step %d goes on after %.0f seconds. %s"
                log.warning(text, self._stop(loop), loop.step, self._unsaved(), self._last_checkpoint())

    def _request_last(self, loop: Loop) -> SaveRequest | None:
        """What is left to be saved at the end."""
        self._handle_failure(loop)
        return self._request() if self.commit_thread.waiting or self._saved != loop.step else None

    def _request_exact(self, loop: Loop) -> SaveRequest:
        """A request to copy this step, once a buffer is free; to write a copy again, if its failure keeps both busy."""
        began, warned = time.monotonic(), False
        while (first := self._step_in_the_way(loop)) is not None:
            if self.commit_thread.idle:  # its commit failed
                if self._clock() < self._retry_at:
                    time.sleep(min(self._pause, _LONGEST_WAIT))
                return self._request()
            if not warned and time.monotonic() - began > QUIET_SECONDS:
                warned = True
                text = "training waits: the states of steps %d and %d must both be saved, and there is room for one"
                log.warning(text, first, loop.step)
            self.commit_thread.wait(_POLL_SECONDS, lambda: self._step_in_the_way(loop) is None)
            self._handle_failure(loop)
        return self._request(exact=True)

    def _step_in_the_way(self, loop: Loop) -> int | None:
        """The step of a waiting copy that must be saved as well, and cannot be dropped for a copy of this step."""
        replaceable = loop.improved and self.retention.best == 1
        steps = (step for step, copy in self.commit_thread.waiting.items() if copy.exact)
        return next((step for step in steps if not replaceable or self.retention.is_milestone(step)), None)

    def _request(self, *, exact: bool = False) -> SaveRequest:
        """A new copy in place of those that wait; unless ``exact``, another try to write an exact copy comes first."""
        waiting = self.commit_thread.hold()  # until the request is carried out
        self.timer.restart()
        retry = not exact and any(copy.exact for copy in waiting.values())
        self._overdue = retry
        return {"exact": exact, "retry": retry, "drop": [*waiting]}

    def _handle_failure(self, loop: Loop) -> None:
        """Handle what happened in the commit thread. Raises errors that must end training."""
        if self.commit_thread.idle:
            self.timer.update_interval()
        if self.commit_thread.failure is not None:
            (step, error), self.commit_thread.failure = self.commit_thread.failure, None
            if not isinstance(error, StorageError):
                raise error
            left, problem = self._time_left(loop), f"the checkpoint of step {step} could not be written: {error}"
            lasting = error.kind == StorageError.LASTING
            if left <= 0 or lasting:
                raise self._error(problem, stop=None if lasting else self._stop(loop)) from error
            self._overdue, self._retry_at = True, self._clock() + self._pause
            text = "%s. It is tried again; the run ends if it keeps failing for another %.0f seconds"
            log.warning(text, printable(problem), left)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._raise_if_stuck()

    def _raise_if_stuck(self) -> None:
        if self._unsaved_since is None:
            return
        unsaved = self._unsaved()
        if unsaved > max(self.max_unsaved, _LEAST_LIMIT):
            rank = self.store.comm.describe_wait()
            raise self._error(f"no checkpoint was written for {unsaved:.0f} seconds{rank and f'. {rank}'}")

    def _unsaved(self) -> float:
        """Seconds since the oldest save that was due and is not acknowledged; 0 on ranks other than 0."""
        return 0.0 if self._unsaved_since is None else self._clock() - self._unsaved_since

    def _stop(self, loop: Loop) -> str | None:
        """The stop signal that any process has received."""
        return loop.stop if loop.stop in signals.NAMES else signals.received()

    def _time_left(self, loop: Loop) -> float:
        """Seconds for which a save that fails is tried again."""
        left = self.max_unsaved - self._unsaved()
        if self._stop(loop) is None:
            return left
        self._stop_since = self._clock() if self._stop_since is None else self._stop_since
        return min(left, self._stop_since + _STOP_SECONDS - self._clock())

    def _error(self, problem: str, stop: str | None = None) -> RunnerError:
        """The error that ends the run with a step that is not saved; after a ``stop`` the storage may be whole again
        for the next attempt.
        """
        if stop is not None:
            return Interrupted(f"{stop}: {problem}.\n{self._last_checkpoint()}; run the same command again to continue")
        remedy = f"fix the storage and run the same command again (checkpoint.max_unsaved={self.max_unsaved:g})."
        return StorageError(f"{problem}.\n{self._last_checkpoint()}; {remedy}")

    def _last_checkpoint(self) -> str:
        newest = max([*self.store.verified], default=None)  # a new fork has none: it began in the store of its parent
        return "No step is saved" if newest is None else f"The last one is of step {newest.step} and is whole"


def _spoils_training(name: str, tensor: Tensor, weights: Collection[str]) -> bool:
    """Whether training cannot go on from a tensor: one of the ``weights`` that is NaN or infinite, or NaN in the state
    of an optimizer, which reaches the weights with the next step. An optimizer may hold an infinite maximum, and
    buffers of the model may hold anything, such as masks.
    """
    moments = name.startswith(("optimizer/", "optimizer.")) and tensor.is_floating_point()
    if not (moments or name in weights) or is_finite(tensor):
        return False
    return not moments or bool(tensor.float().isnan().any())


@dataclass
class SaveTimer:
    """When a periodic save is due: every ``steps`` steps, every ``seconds``, and, with ``auto``, so often that saves
    cost no more than ``_SHARE`` of the time.

    The cost of a save is the time that training waits for it, and by how much it slows down the steps meanwhile.
    """

    steps: int | None = None
    seconds: float | None = None
    auto: bool = False
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._since = self._last = self.clock()  # when the last save began, and when the last step ended
        self._interval = _SHORTEST_INTERVAL  # between two saves by ``auto``
        self._usual: float | None = None  # seconds of a step while nothing is written, averaged over the last ones
        self._spent: float | None = None  # seconds that the save now running has cost

    def due(self, step: int) -> bool:
        """Whether a save is due after ``step``."""
        if self.steps is not None and step % self.steps == 0:
            return True
        elapsed = self.clock() - self._since
        return (self.seconds is not None and elapsed >= self.seconds) or (self.auto and elapsed >= self._interval)

    def restart(self) -> None:
        """Count the seconds from now."""
        self._since = self.clock()

    def note_step(self, *, during_save: bool, is_plain: bool) -> None:
        """A step ended, beside a save or not. ``is_plain``: without an evaluation, so that its seconds count."""
        now = self.clock()
        seconds, self._last = now - self._last, now
        if not is_plain:
            return
        if not during_save:
            self._usual = seconds if self._usual is None else 0.9 * self._usual + 0.1 * seconds
        elif self._usual is not None and self._spent is not None:
            self._spent += seconds - self._usual

    def note_save(self, *, stall: float) -> None:
        """A save began; training waited ``stall`` seconds for it."""
        self._spent, self._last = stall, self.clock()

    def update_interval(self) -> None:
        """No save is running: the cost of the last one is known, and with it the interval before the next one."""
        if self._spent is not None:
            self._interval = min(max(self._spent / _SHARE, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
            self._spent = None

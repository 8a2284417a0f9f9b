"""The thread that commits copies of the state during training, one at a time.

Every rank has such a thread. Rank 0 takes the copy that waits and announces its step; the threads of the other ranks
wait for the announcement and write their copy of the same step.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from runner.activity import doing
from runner.checkpoint.snapshot import Snapshot, Staging
from runner.distributed.communicator import Communicator


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A copy of the state to be committed, and its ``buffers``. An ``exact`` copy is needed itself; any other may be
    replaced by a newer one. ``weights`` are the names of the tensors that have to be finite.
    """

    snapshot: Snapshot
    buffers: Staging
    exact: bool
    weights: Collection[str] = ()

    @property
    def step(self) -> int:
        return self.snapshot.step


class Writer:
    """Calls ``commit`` in a background thread for every copy that was ``put``.

    A copy whose commit raised is kept until ``take``. On rank 0 ``failures`` has these copies with their errors, oldest
    first, for the owner to remove; the other ranks leave the decision to rank 0, which sees the same error. ``commit``
    of rank 0 has to broadcast the step of its copy over ``comm``, which belongs to this thread.
    """

    def __init__(self, commit: Callable[[PendingSave], None], comm: Communicator) -> None:
        self.failures: deque[tuple[PendingSave, Exception]] = deque()
        self._commit = commit
        self._comm = comm
        self._changed = threading.Condition()
        self._waiting: dict[int, PendingSave] = {}
        self._kept: dict[int, PendingSave] = {}  # failed or withdrawn
        self._busy = False
        self._closed = False
        self._error: Exception | None = None  # of the wait for rank 0
        self._thread: threading.Thread | None = None  # started for the first copy: data workers are forked before

    @property
    def idle(self) -> bool:
        """Whether a copy that is put now would be committed at once."""
        return not (self._busy or self._waiting)

    @property
    def waiting(self) -> PendingSave | None:
        """The copy that is committed next, on rank 0."""
        return next(iter([*self._waiting.values()]), None)

    def put(self, copy: PendingSave) -> None:
        """Commit it after the current copy. On rank 0 no other copy may be waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        with self._changed:
            self._waiting[copy.step] = copy
            self._changed.notify_all()

    def withdraw(self) -> list[int]:
        """Do not commit the copies that wait, and keep them for ``take``; returns their steps."""
        with self._changed:
            steps = [*self._waiting]
            self._kept |= self._waiting
            self._waiting.clear()
            return steps

    @doing("joins")
    def take(self, step: int) -> PendingSave:
        """Remove and return the copy of a step, which waits or has failed; blocks while it is still failing."""
        with self._changed:
            self._wait_for(lambda: step in self._waiting or step in self._kept)
            return (self._waiting if step in self._waiting else self._kept).pop(step)

    @doing("joins")
    def wait(self, seconds: float | None = None, *, begun: bool = False) -> bool:
        """Wait until all copies are committed, failed or (``begun``) begun; whether they are after ``seconds``."""
        with self._changed:
            return self._wait_for(lambda: not self._waiting and (begun or not self._busy), seconds)

    @doing("joins")
    def close(self, seconds: float) -> None:
        """Finish all commits, for so many seconds at most, and end the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self.idle or self._error is not None, seconds)
            self._closed = True
            self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        done = self._changed.wait_for(lambda: condition() or self._error is not None, seconds)
        if self._error is not None:
            raise self._error
        return done

    def _run(self) -> None:
        while (copy := self._next()) is not None:
            error = None
            try:
                with doing("saves"):
                    self._commit(copy)
            except Exception as raised:  # for the owner: this thread has no caller
                error = raised
            with self._changed:
                if error is not None:
                    self._kept[copy.step] = copy
                    if self._comm.rank == 0:
                        self.failures.append((copy, error))
                self._busy = False
                self._changed.notify_all()

    def _next(self) -> PendingSave | None:
        """The next copy to commit, once there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            if self._comm.rank == 0 or self._closed:
                return self._begin(next(iter(self._waiting), None) if self._comm.rank == 0 else None)
        try:
            step = int(self._comm.broadcast(None))
        except Exception as error:  # for the owner
            with self._changed:
                self._error = error
                self._changed.notify_all()
            return None
        with self._changed:  # the training thread of this rank may not have come to that step yet
            self._changed.wait_for(lambda: step in self._waiting or self._closed)
            return self._begin(None if self._closed else step)

    def _begin(self, step: int | None) -> PendingSave | None:
        if step is None:
            return None
        self._busy = True
        copy = self._waiting.pop(step)
        self._changed.notify_all()
        return copy

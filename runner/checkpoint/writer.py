"""The thread that commits copies of the state during training, one at a time.

Every rank has such a thread. Rank 0 takes the copy that waits and announces its step; the threads of the other ranks
wait for the announcement and write their copy of the same step.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from runner.distributed.communicator import Communicator


class Job(Protocol):
    """A copy of the state."""

    @property
    def step(self) -> int: ...


J = TypeVar("J", bound=Job)


class Writer(Generic[J]):
    """Calls ``work`` in a background thread for every job that was ``put``.

    A job whose work raised is kept until ``take``. On rank 0 ``failures`` has these jobs with their errors, oldest
    first, for the owner to remove; the other ranks leave the decision to rank 0, which sees the same error. ``work`` of
    rank 0 has to broadcast the step of its job over ``ranks``, which belong to this thread.
    """

    def __init__(self, work: Callable[[J], None], ranks: Communicator) -> None:
        self.failures: deque[tuple[J, Exception]] = deque()
        self._work = work
        self._ranks = ranks
        self._changed = threading.Condition()
        self._waiting: dict[int, J] = {}
        self._kept: dict[int, J] = {}  # failed or withdrawn
        self._busy = False
        self._closed = False
        self._error: Exception | None = None  # of the wait for rank 0
        self._thread: threading.Thread | None = None  # started for the first job: data workers are forked before

    @property
    def idle(self) -> bool:
        """Whether a job that is put now would begin at once."""
        return not (self._busy or self._waiting)

    @property
    def waiting(self) -> J | None:
        """The job that is done next, on rank 0."""
        return next(iter([*self._waiting.values()]), None)

    def put(self, job: J) -> None:
        """Do it after the current job. On rank 0 no other job may be waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        with self._changed:
            self._waiting[job.step] = job
            self._changed.notify_all()

    def withdraw(self) -> list[int]:
        """Do not begin the jobs that wait, and keep them for ``take``; returns their steps."""
        with self._changed:
            steps = [*self._waiting]
            self._kept |= self._waiting
            self._waiting.clear()
            return steps

    def take(self, step: int) -> J:
        """Remove and return the job of a step, which waits or has failed; blocks while it is still failing."""
        with self._changed:
            self._wait_for(lambda: step in self._waiting or step in self._kept)
            return (self._waiting if step in self._waiting else self._kept).pop(step)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all jobs are done, for so many seconds at most; whether they are done."""
        with self._changed:
            return self._wait_for(lambda: self.idle, seconds)

    def wait_for_room(self, seconds: float) -> bool:
        """Wait until no job waits to begin, for so many seconds at most; whether none does."""
        with self._changed:
            return self._wait_for(lambda: not self._waiting, seconds)

    def close(self, seconds: float) -> None:
        """Finish the jobs, for so many seconds at most, and end the thread."""
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
        while (job := self._next()) is not None:
            error = None
            try:
                self._work(job)
            except Exception as raised:  # for the owner: this thread has no caller
                error = raised
            with self._changed:
                if error is not None:
                    self._kept[job.step] = job
                    if self._ranks.rank == 0:
                        self.failures.append((job, error))
                self._busy = False
                self._changed.notify_all()

    def _next(self) -> J | None:
        """The next job, once there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            if self._ranks.rank == 0 or self._closed:
                return self._begin(next(iter(self._waiting), None) if self._ranks.rank == 0 else None)
        try:
            step = int(self._ranks.broadcast(None))
        except Exception as error:  # for the owner
            with self._changed:
                self._error = error
                self._changed.notify_all()
            return None
        with self._changed:  # the training thread of this rank may not have come to that step yet
            self._changed.wait_for(lambda: step in self._waiting or self._closed)
            return self._begin(None if self._closed else step)

    def _begin(self, step: int | None) -> J | None:
        if step is None:
            return None
        self._busy = True
        job = self._waiting.pop(step)
        self._changed.notify_all()
        return job

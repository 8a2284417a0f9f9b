"""The thread that writes checkpoints during training: one job at a time, and at most one more is waiting.

If several ranks write, rank 0 chooses the next job, and the others follow.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from runner.activity import doing

Job = TypeVar("Job")


class Writer(Generic[Job]):
    """Does jobs in the background.

    ``failures`` are those that raised, oldest first, for the owner to take. ``waiting`` is the job that is done next.
    """

    def __init__(self, work: Callable[[Job], None]) -> None:
        self.failures: deque[tuple[Job, Exception]] = deque()
        self._work = work
        self._changed = threading.Condition()
        self.waiting: Job | None = None
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None  # made for the first job: data workers are forked before

    @property
    def idle(self) -> bool:
        """Whether a job that is put now would begin at once."""
        return not self._busy

    def put(self, job: Job) -> None:
        """Do it as soon as the one in hand is done; takes the place of one that waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        with self._changed:
            self.waiting, self._busy = job, True
            self._changed.notify_all()

    def cancel(self) -> Job | None:
        """The job that waits, which is not going to be done now, if there is one."""
        with self._changed:
            job, self.waiting = self.waiting, None
            return job

    @doing("joins")
    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all jobs are done, or so many seconds; whether they are done."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    @doing("joins")
    def wait_for_room(self, seconds: float) -> bool:
        """Wait until no job waits to begin, or so many seconds; whether none does."""
        with self._changed:
            return self._changed.wait_for(lambda: self.waiting is None, seconds)

    @doing("joins")
    def close(self, seconds: float | None = None) -> None:
        """Finish what is in hand, for so many seconds at most, and end the thread."""
        self.wait(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting is not None or self._closed)
                job, self.waiting = self.waiting, None
                self._changed.notify_all()
            if job is None:
                return
            try:
                with doing("saves"):
                    self._work(job)
            except Exception as error:  # for the owner; a thread has nobody else to tell
                self.failures.append((job, error))
            with self._changed:
                self._busy = self.waiting is not None
                self._changed.notify_all()


class Follower(Generic[Job]):
    """Does jobs in the background when rank 0 begins them; ``begun`` waits for the number of the next one.

    A job that raised is kept until it is taken back, as rank 0 orders. An error of ``begun`` ends the thread, and is
    raised by the methods that wait.
    """

    def __init__(self, work: Callable[[Job], None], begun: Callable[[], int]) -> None:
        self._work = work
        self._begun = begun
        self._changed = threading.Condition()
        self._waiting: dict[int, Job] = {}
        self._failed: dict[int, Job] = {}
        self._busy = False
        self._closed = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def put(self, number: int, job: Job) -> None:
        """Have it done when it is begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        with self._changed:
            self._waiting[number], self._busy = job, True
            self._changed.notify_all()

    @doing("joins")
    def take(self, number: int) -> Job:
        """Take back a job that is not going to be begun, or that failed; waits while it is still failing."""
        with self._changed:
            self._wait_for(lambda: number in self._waiting or number in self._failed)
            return self._waiting.pop(number) if number in self._waiting else self._failed.pop(number)

    @doing("joins")
    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all jobs are done, or so many seconds; whether they are done."""
        with self._changed:
            return self._wait_for(lambda: not self._busy, seconds)

    @doing("joins")
    def close(self, seconds: float | None = None) -> None:
        """Finish what is in hand, for so many seconds at most, and end the thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy or self._error is not None, seconds)
            self._closed = True
            self._changed.notify_all()

    def _wait_for(self, what: Callable[[], bool], seconds: float | None = None) -> bool:
        done = self._changed.wait_for(lambda: what() or self._error is not None, seconds)
        if self._error is not None:
            raise self._error
        return done

    def _run(self) -> None:
        while job := self._next():
            failed = self._raises(job[1])
            with self._changed:
                if failed:
                    self._failed[job[0]] = job[1]
                self._busy = bool(self._waiting)
                self._changed.notify_all()

    def _next(self) -> tuple[int, Job] | None:
        """The job that is begun, which may not be here yet; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            if self._closed:
                return None
        try:
            number = self._begun()
        except Exception as error:  # for the owner; a thread has nobody else to tell
            with self._changed:
                self._error = error
                self._changed.notify_all()
            return None
        with self._changed:
            self._changed.wait_for(lambda: number in self._waiting or self._closed)
            return None if self._closed else (number, self._waiting.pop(number))

    def _raises(self, job: Job) -> bool:
        try:
            with doing("saves"):
                self._work(job)
        except Exception:  # the rank that chooses has it, too, and tells what it means
            return True
        return False

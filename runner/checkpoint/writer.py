"""One thread that writes while training goes on: one job at a time, and at most one waits."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

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

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all jobs are done, or so many seconds; whether they are done."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

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
            if job is None:
                return
            try:
                self._work(job)
            except Exception as error:  # for the owner; a thread has nobody else to tell
                self.failures.append((job, error))
            with self._changed:
                self._busy = self.waiting is not None
                self._changed.notify_all()

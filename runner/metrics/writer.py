"""The base class of metric writers, and the writers of an attempt as a group.

TensorBoard's event files and the JSON lines are the two writers of every run. A service outside, such as MLflow, has a
``ServiceWriter`` (``metrics.service``). To write elsewhere, name a subclass of ``MetricWriter`` in the
configuration: ``metrics.writers.mine: {_target_: my_module.MyWriter}``.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from runner.errors import RunnerError, StorageError
from runner.storage.location import Location

_LINES = "lines"  # the mark of this writer is the fact "metrics" of a commit; early checkpoints have no other marks


class MetricWriter:
    """Receives the metrics of a run: override the methods you need. Only rank 0 has writers. An attempt constructs each
    writer once, after the checkpoint is restored, with a ``WriterContext`` as the first argument and the configured
    values as keywords.

    After a resume, ``add`` is called again for every step after the checkpoint, with equal values (but for those under
    ``time/``). A writer either takes the step as a key, so that the last value of a step counts, or removes what was
    written after its mark. An exception ends the attempt with a message that names the writer.
    """

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        """Take the values of a step: numbers (also NaN and infinity) and texts by tag. Called by the training thread,
        so it should not wait for a disk or a network.
        """

    def log(self, step: int, summaries: Mapping[str, bytes]) -> None:
        """Take what ``Task.log`` was given at a step, by name, as bytes of TensorBoard's ``Summary``."""

    def mark(self, step: int) -> dict[str, Any]:
        """The current position in the output, for the checkpoint of ``step``: JSON values. The next attempt that
        resumes from this checkpoint finds them in ``WriterContext.mark``. Called by the training thread.
        """
        return {}

    def flush(self) -> None:
        """Make durable everything that was added before the last ``mark``. Called by the commit thread, before the
        checkpoint is committed, while the training thread may call ``add``. After a StorageError or an OSError the
        checkpoint is tried again later, as after any failure of storage.
        """

    def committed(self, end: Mapping[str, Any]) -> None:
        """A checkpoint is committed, and so are the lines of ``metrics.lines`` up to this mark. Called by the
        commit thread, and at the start of an attempt that resumed from a checkpoint.
        """

    def close(self, status: str) -> None:
        """The attempt ended: "finished", "interrupted" or "failed". Not called if it is killed."""


@dataclass(frozen=True, slots=True)
class WriterContext:
    """Facts that a writer may need about its run."""

    location: Location  # the run directory; ``location.url`` is its path or URL
    experiment: str
    run: str  # experiment/variant
    hyperparameters: Mapping[str, Any]  # the configuration of what is computed, as nested plain values
    attempt: int  # the number of this attempt at the run
    step: int  # training continues after this step; ``add`` may repeat it if its evaluation was interrupted
    mark: Mapping[str, Any] | None = None  # the result of ``mark`` for the checkpoint; None if it had no such writer
    id: str = ""  # unique to the run
    options: Mapping[str, Any] | None = field(default=None, repr=False)  # for fsspec to open ``location``


@dataclass(frozen=True, slots=True)
class MetricWriters:
    """The writers of an attempt; none on ranks above 0. ``marks`` are from the last checkpoint, also the mark
    of a writer that is no longer configured: if it is put back later, it continues there.
    """

    by_name: dict[str, MetricWriter] = field(default_factory=dict)
    marks: dict[str, Any] = field(default_factory=dict)
    _ends: dict[int, Any] = field(default_factory=dict)  # step of a checkpoint under way -> mark of the lines

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Take over the marks from the facts of the commit that was resumed."""
        self.marks.update(facts.get("writers", {}))
        if "metrics" in facts:
            self.marks[_LINES] = facts["metrics"]

    def mark(self, step: int) -> dict[str, Any]:
        """The positions of all writers at ``step`` that are not empty, as facts for its commit."""
        for name, writer in self.by_name.items():
            with _naming(name, "mark"):
                self.marks[name] = json.loads(json.dumps(dict(writer.mark(step))))
        marks = {name: mark for name, mark in self.marks.items() if mark}
        self._ends[step] = marks.pop(_LINES, {})
        facts = {"metrics": self._ends[step]}
        return facts | {"writers": marks} if marks else facts

    def committed(self, step: int | None = None) -> None:
        """The checkpoint of ``step`` is committed; None: the checkpoint from which the attempt resumed."""
        self._call("committed", self.marks.get(_LINES, {}) if step is None else self._ends.pop(step, {}))
        for earlier in [each for each in self._ends if step is not None and each < step]:  # they were given up
            self._ends.pop(earlier, None)

    def add(self, step: int, values: Mapping[str, float | str]) -> None:
        self._call("add", step, values)

    def log(self, step: int, summaries: Mapping[str, bytes]) -> None:
        self._call("log", step, summaries)

    def flush(self) -> None:
        """Make durable everything that was added before the last mark. Raises StorageError."""
        self._call("flush")

    def close(self, status: str) -> None:
        self._call("close", status)

    def _call(self, method: str, *arguments: Any) -> None:
        for name, writer in self.by_name.items():
            with _naming(name, method):
                getattr(writer, method)(*arguments)


@contextmanager
def _naming(name: str, method: str) -> Iterator[None]:
    """Within the block, an exception of the writer names it. Errors of the runner have their own messages."""
    try:
        yield
    except RunnerError:
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        if method == "flush" and isinstance(error, OSError):
            raise StorageError(f"metrics.writers.{name}: {problem}") from error
        raise RuntimeError(
            f"metrics.writers.{name} failed in {method}(): {problem}. To continue without this writer, run the same "
            f"command again with metrics.writers.{name}=null"
        ) from error

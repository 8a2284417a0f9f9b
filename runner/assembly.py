"""The callbacks of an attempt in their order, and the records that rank 0 keeps."""

from dataclasses import dataclass, replace
from typing import Any

from runner.build import Parts, metric_writer
from runner.callbacks.base import Callback
from runner.callbacks.evaluate import Best, EarlyStopping, Evaluate, LastEvaluation
from runner.callbacks.guards import FiniteLoss
from runner.callbacks.progress import NoteProgress, ShowProgress
from runner.callbacks.reporting import KeepLedger, Report
from runner.callbacks.saving import FollowCheckpoint, Hooks, SaveCheckpoint
from runner.checkpoint.retention import Retention
from runner.checkpoint.store import CheckpointStore
from runner.config.schema import Config, Every, OnDrift, OnNonfinite
from runner.data.ledger import Ledger
from runner.distributed.team import Team
from runner.interval import CostBudget, Interval
from runner.metrics.writer import MetricWriters, WriterContext
from runner.restore import Resumed
from runner.run.attempt_records import AttemptRecord
from runner.run.attempts import Attempt
from runner.run.opening import OpenedRun

_LINES = "lines"  # the mark of this writer is the fact "metrics" of a commit, from before there were other writers


@dataclass(frozen=True, slots=True)
class RunRecords:
    """The records that rank 0 writes, because it owns the attempt: heartbeat, metrics, ledger."""

    attempt: Attempt
    writers: MetricWriters
    ledger: Ledger

    @classmethod
    def of(cls, attempt: Attempt, opening: OpenedRun, config: Config, parts: Parts) -> "RunRecords":
        """The records of an attempt, not opened yet."""
        ledger = Ledger(
            opening.directory.location,
            attempt=attempt.number,
            recipe=parts.recipe,
            grouping=config.data.batch_size,
            accept=config.run.on_drift is OnDrift.accept,
        )
        return cls(attempt, MetricWriters(), ledger)

    def open(self, opening: OpenedRun, config: Config, resumed: Resumed) -> None:
        """Continue after the step that was resumed from. The ledger is opened by its callback. Raises ConfigError for a
        metric writer that cannot be used.
        """
        directory, number = opening.directory, self.attempt.number
        context = WriterContext(
            directory.location, directory.experiment, directory.name, opening.identity, number, resumed.step
        )
        self.writers.marks.update(resumed.facts.get("writers", {}))
        if "metrics" in resumed.facts:
            self.writers.marks[_LINES] = resumed.facts["metrics"]
        for name, node in config.metrics.writers.items():
            if node is not None:
                mark = self.writers.marks.get(name)
                self.writers.writers[name] = metric_writer(node, name, replace(context, mark=mark))
        unusable = [*resumed.unusable]
        self.attempt.beat(step=resumed.step, resumed=str(resumed.commit or ""), unusable=unusable)

    def mark(self, step: int) -> dict[str, Any]:
        """The positions of ledger and metric writers at ``step``, as facts for its commit; see ``flush``."""
        self.ledger.mark(step)
        marks = self.writers.mark(step)
        facts = {"metrics": marks.pop(_LINES, {})}
        return facts | {"writers": marks} if marks else facts

    def flush(self) -> None:
        """Make durable what was written before the last ``mark``. Runs in the checkpoint thread."""
        self.ledger.flush()
        self.writers.flush()


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the callbacks of an attempt are made from. ``books`` is None on ranks above 0."""

    config: Config
    opening: OpenedRun
    parts: Parts
    store: CheckpointStore
    attempt: int
    books: RunRecords | None
    team: Team

    def callbacks(self) -> dict[str, Callback]:
        """All callbacks in the order in which they run, by the names under which a checkpoint holds their state.

        Callbacks with a state are the same in all processes.
        """
        config, books = self.config, self.books
        guard, evaluation = FiniteLoss(), self._evaluation()
        report = Report(
            every_steps=config.metrics.every_steps,
            writers=MetricWriters() if books is None else books.writers,
            best=evaluation.get("best"),
            team=self.team,
        )
        return {
            **({} if books is None else {"ledger": KeepLedger(books.ledger)}),
            **({"finite_loss": guard} if config.trainer.on_nonfinite is OnNonfinite.stop else {}),
            **evaluation,
            **{f"own.{name}": own for name, own in self.parts.callbacks.items()},
            "last": LastEvaluation([*evaluation.values()]),
            "report": report,
            **({} if books is None else {"progress": ShowProgress(), "heartbeat": NoteProgress(books.attempt)}),
            "checkpoint": self._saver(guard),
        }

    def _evaluation(self) -> dict[str, Any]:
        """The callback that evaluates, and those that use its results."""
        trainer, goal = self.config.trainer, self.config.objective
        if self.parts.evaluate is None or self.parts.held_out is None:
            return {}
        interval = Interval(steps=trainer.evaluate_every_steps, epochs=trainer.evaluate_every_epochs)
        found: dict[str, Callback] = {"evaluate": Evaluate(interval, self.parts.evaluate, self.parts.held_out)}
        if goal.metric is None:
            return found
        found["best"] = Best(goal.metric, mode=goal.mode.name, keep=self.config.checkpoint.keep_best)
        stopping = trainer.early_stopping
        if stopping.patience is not None:
            found["early_stopping"] = EarlyStopping(
                goal.metric, mode=goal.mode.name, patience=stopping.patience, min_delta=stopping.min_delta
            )
        return found

    def _saver(self, guard: FiniteLoss) -> Callback:
        checkpoint, retention = self.config.checkpoint, self._retention()
        if self.books is None:
            return FollowCheckpoint(
                self.store,
                attempt=self.attempt,
                background=checkpoint.background,
                comm=self.team.comm,
                weights=self.parts.state.weights,
            )
        return SaveCheckpoint(
            self.store,
            Interval(steps=checkpoint.every_steps, seconds=checkpoint.every_seconds),
            CostBudget() if checkpoint.every is Every.auto else None,
            self._hooks(self.books, guard, retention),
            attempt=self.attempt,
            pins=retention.pins,
            max_unsaved=checkpoint.max_unsaved,
            background=checkpoint.background,
            best=checkpoint.keep_best,
            weights=self.parts.state.weights,
            comm=self.team.comm,
        )

    def _hooks(self, books: RunRecords, guard: FiniteLoss, retention: Retention) -> Hooks:
        attempt = books.attempt

        def mark(step: int) -> dict[str, Any]:
            guard.check()
            facts = {"identity": self.opening.identity, **books.mark(step)}
            changes = self.parts.state.changes()
            return facts | {"structure": changes} if changes else facts

        return Hooks(
            mark=mark,
            flush=books.flush,
            successor=lambda: _name(attempt.successor()),
            committed=lambda commit: attempt.beat(step=commit.step, committed=commit.step),
            retain=lambda: self.store.retain(retention, attempt=attempt.number),
        )

    def _retention(self) -> Retention:
        keep, goal = self.config.checkpoint, self.config.objective
        mode = goal.mode.name if goal.metric else None
        return Retention(keep.keep_last, keep.keep_every_steps, keep.keep_best, mode)


def _name(record: AttemptRecord | None) -> str | None:
    return None if record is None else record.owner()

"""The callbacks of an attempt in their order, and the records that rank 0 keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runner.build import Parts, metric_writer
from runner.callbacks.base import Callback
from runner.callbacks.evaluate import Best, EarlyStopping, Evaluate, LastEvaluation, StepSchedule
from runner.callbacks.guards import FiniteLoss
from runner.callbacks.progress import NoteProgress, ShowProgress
from runner.callbacks.reporting import KeepLedger, Report
from runner.callbacks.saving import SaveCheckpoint
from runner.checkpoint.retention import Retention
from runner.checkpoint.store import CheckpointStore
from runner.config.schema import Config, Every, OnDrift, OnNonfinite
from runner.data.ledger import Ledger
from runner.distributed.team import Team
from runner.interval import CostBudget, Interval
from runner.metrics.writer import MetricWriters, WriterContext
from runner.restore import Resumed
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
            accept=config.run.on_drift is OnDrift.accept or bool(opening.changes),
        )
        return cls(attempt, MetricWriters(), ledger)

    def open(self, opening: OpenedRun, writers: Mapping[str, Any], resumed: Resumed) -> None:
        """Continue after the step that was resumed from, with metric ``writers`` as they are configured. The ledger is
        opened by its callback. Raises ConfigError for a writer that cannot be used.
        """
        directory = opening.directory
        context = WriterContext(
            location=directory.location,
            experiment=directory.experiment,
            run=directory.name,
            hyperparameters=opening.identity,
            attempt=self.attempt.number,
            step=resumed.step,
        )
        self.writers.marks.update(resumed.facts.get("writers", {}))
        if "metrics" in resumed.facts:
            self.writers.marks[_LINES] = resumed.facts["metrics"]
        for name, node in writers.items():
            mark = self.writers.marks.get(name)
            self.writers.by_name[name] = metric_writer(node, name, replace(context, mark=mark))
        self.attempt.beat(step=resumed.step, resumed=str(resumed.commit or ""), unusable=[*resumed.unusable])

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
    """Constructs the callbacks of an attempt. ``records`` is None on ranks above 0."""

    config: Config
    opening: OpenedRun
    parts: Parts
    store: CheckpointStore
    attempt: int
    records: RunRecords | None
    team: Team

    def callbacks(self) -> dict[str, Callback]:
        """All callbacks in the order in which they run, by the names under which a checkpoint holds their state.

        All processes have the same callbacks with state; the others exist where they are needed.
        """
        config, records = self.config, self.records
        guard, evaluation = FiniteLoss(), self._evaluation()
        report = Report(
            every_steps=config.metrics.every_steps,
            writers=MetricWriters() if records is None else records.writers,
            best=evaluation.get("best"),
            team=self.team,
        )
        return {
            **({} if records is None else {"ledger": KeepLedger(records.ledger)}),
            **({"finite_loss": guard} if config.trainer.on_nonfinite is OnNonfinite.stop else {}),
            **evaluation,
            **{f"own.{name}": own for name, own in self.parts.callbacks.items()},
            "last": LastEvaluation([*evaluation.values()]),
            "report": report,
            **({} if records is None else {"progress": ShowProgress(), "heartbeat": NoteProgress(records.attempt)}),
            "checkpoint": self._saver(guard),
        }

    def _evaluation(self) -> dict[str, Any]:
        """The callback that evaluates, and the callbacks that use its results."""
        trainer, goal = self.config.trainer, self.config.objective
        if self.parts.evaluate is None or self.parts.held_out is None:
            return {}
        interval = Interval(steps=trainer.evaluate_every_steps, epochs=trainer.evaluate_every_epochs)
        callbacks: dict[str, Callback] = {"evaluate": Evaluate(interval, self.parts.evaluate, self.parts.held_out)}
        if goal.metric is None:
            return callbacks
        callbacks["best"] = Best(goal.metric, mode=goal.mode.name, keep=self.config.checkpoint.keep_best)
        if self.parts.state.schedule == "evaluation":
            callbacks["schedule"] = StepSchedule(goal.metric)
        stopping = trainer.early_stopping
        if stopping.patience is not None:
            callbacks["early_stopping"] = EarlyStopping(
                goal.metric, mode=goal.mode.name, patience=stopping.patience, min_delta=stopping.min_delta
            )
        return callbacks

    def _saver(self, guard: FiniteLoss) -> SaveCheckpoint:
        checkpoint, goal, records = self.config.checkpoint, self.config.objective, self.records
        mode = goal.mode.name if goal.metric else None
        return SaveCheckpoint(
            self.store,
            Interval(steps=checkpoint.every_steps, seconds=checkpoint.every_seconds),
            CostBudget() if checkpoint.every is Every.auto else None,
            Retention(checkpoint.keep_last, checkpoint.keep_every_steps, checkpoint.keep_best, mode),
            attempt=self.attempt,
            identity=self.opening.identity,
            owner=None if records is None else records.attempt,
            records=[] if records is None else [records],
            guard=guard,
            max_unsaved=checkpoint.max_unsaved,
            background=checkpoint.background,
            comm=self.team.comm,
        )

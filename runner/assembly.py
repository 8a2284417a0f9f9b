"""The callbacks of an attempt in their order, and the records that rank 0 keeps."""

from dataclasses import dataclass
from typing import Any

from runner.build import Parts
from runner.callbacks.base import Callback
from runner.callbacks.evaluation import Best, EarlyStopping, Evaluate, LastEvaluation
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
from runner.metrics.lines import MetricLines
from runner.metrics.tensorboard import Curves
from runner.metrics.writer import NullMetrics
from runner.restore import Resumed
from runner.run.attempts import Attempt
from runner.run.directory import TENSORBOARD
from runner.run.opening import OpenedRun
from runner.storage.location import Location


@dataclass(frozen=True, slots=True)
class RunRecords:
    """The records that rank 0 writes, because it owns the attempt: heartbeat, metric lines, ledger."""

    attempt: Attempt
    lines: MetricLines
    ledger: Ledger

    @classmethod
    def of(cls, attempt: Attempt, location: Location, config: Config, parts: Parts) -> "RunRecords":
        """The records of an attempt, not opened yet."""
        lines, grouping = MetricLines(location, attempt=attempt.number), config.data.batch_size
        accept = config.run.on_drift is OnDrift.accept
        ledger = Ledger(location, attempt=attempt.number, recipe=parts.recipe, grouping=grouping, accept=accept)
        return cls(attempt, lines, ledger)

    def open(self, resumed: Resumed) -> None:
        """Continue after the step that was resumed from. The ledger is opened by its callback."""
        self.lines.open(resumed.step, resumed.facts.get("metrics"))
        unusable = [*resumed.unusable]
        self.attempt.beat(step=resumed.step, resumed=str(resumed.commit or ""), unusable=unusable)


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
            curves=self._curves,
            lines=NullMetrics() if books is None else books.lines,
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
            "checkpoint": self._saver(guard, report),
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

    def _curves(self, step: int) -> Curves | NullMetrics:
        if self.books is None:
            return NullMetrics()
        return Curves(self.opening.directory.location, TENSORBOARD, purge_step=step, attempt=self.attempt)

    def _saver(self, guard: FiniteLoss, report: Report) -> SaveCheckpoint:
        checkpoint, goal, books = self.config.checkpoint, self.config.objective, self.books
        mode = goal.mode.name if goal.metric else None
        return SaveCheckpoint(
            self.store,
            Interval(steps=checkpoint.every_steps, seconds=checkpoint.every_seconds),
            CostBudget() if checkpoint.every is Every.auto else None,
            Retention(checkpoint.keep_last, checkpoint.keep_every_steps, checkpoint.keep_best, mode),
            attempt=self.attempt,
            identity=self.opening.identity,
            owner=None if books is None else books.attempt,
            journals={} if books is None else {"ledger": books.ledger, "metrics": report},
            guard=guard,
            max_unsaved=checkpoint.max_unsaved,
            background=checkpoint.background,
            ranks=self.team.ranks,
        )

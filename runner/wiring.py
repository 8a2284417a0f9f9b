"""Which callbacks an attempt has, in which order, and what the process keeps that owns it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from runner.build import Parts
from runner.callbacks.base import Callback
from runner.callbacks.checkpoint import SaveCheckpoint
from runner.callbacks.evaluate import Best, EarlyStopping, Evaluate
from runner.callbacks.follow import FollowCheckpoint
from runner.callbacks.guard import FiniteLoss
from runner.callbacks.ledger import KeepLedger
from runner.callbacks.progress import Heartbeat, Progress
from runner.callbacks.report import Report
from runner.callbacks.saving import Hooks
from runner.checkpoint.retention import Retention
from runner.checkpoint.store import CheckpointStore
from runner.config.schema import Config, Every, OnNonfinite
from runner.data.ledger import Ledger
from runner.errors import ConfigError
from runner.interval import Affordable, Interval
from runner.metrics.curves import Curves
from runner.metrics.lines import MetricLines
from runner.metrics.silence import Silence
from runner.ranks import Ranks
from runner.restore import Resumed
from runner.run.attempts import Attempt
from runner.run.directory import TENSORBOARD
from runner.run.opening import Opening
from runner.run.records import Record
from runner.storage.location import Location


@dataclass(frozen=True, slots=True)
class Books:
    """What the one process keeps that owns the attempt."""

    attempt: Attempt
    lines: MetricLines
    ledger: Ledger

    @classmethod
    def of(cls, attempt: Attempt, location: Location, config: Config, parts: Parts) -> "Books":
        """Those of an attempt, not opened."""
        lines, grouping = MetricLines(location, attempt=attempt.number), config.data.batch_size
        return cls(attempt, lines, Ledger(location, attempt=attempt.number, recipe=parts.recipe, grouping=grouping))

    def open(self, resumed: Resumed) -> None:
        """Go on where the state does; the ledger is opened by its callback."""
        self.lines.open(resumed.step, resumed.facts.get("metrics"))
        unusable = [*resumed.unusable]
        self.attempt.beat(step=resumed.step, resumed=str(resumed.commit or ""), unusable=unusable)


def callbacks_of(
    config: Config,
    opening: Opening,
    parts: Parts,
    store: CheckpointStore,
    attempt: int,
    books: Books | None,
    ranks: Ranks,
) -> dict[str, Callback]:
    """All callbacks, in the order in which they run, by the name that one with a memory has in the state. Those with
    one are the same in all processes. Raises ConfigError for one of the user's that cannot be used.
    """
    callbacks: dict[str, Callback] = {}
    if books is not None:
        callbacks["ledger"] = KeepLedger(books.ledger)
    guard = FiniteLoss()
    if config.trainer.on_nonfinite is OnNonfinite.stop:
        callbacks["finite_loss"] = guard
    _evaluation(config, parts, callbacks)
    callbacks |= {f"own.{name}": _checked(name, own) for name, own in parts.callbacks.items()}
    best = callbacks.get("best")
    report = Report(
        every_steps=config.metrics.every_steps,
        curves=partial(_curves, opening, attempt, books),
        lines=Silence() if books is None else books.lines,
        best=best if isinstance(best, Best) else None,
    )

    callbacks["report"] = report
    if books is not None:
        callbacks["progress"] = Progress()
        callbacks["heartbeat"] = Heartbeat(books.attempt)
    callbacks["checkpoint"] = _saver(config, opening, store, attempt, books, guard, report, ranks)
    return callbacks


def _curves(opening: Opening, attempt: int, books: Books | None, step: int) -> Curves | Silence:
    if books is None:
        return Silence()
    return Curves(opening.directory.location.folder(TENSORBOARD), purge_step=step, attempt=attempt)


def _hooks(
    opening: Opening, books: Books, guard: FiniteLoss, report: Report, store: CheckpointStore, retention: Retention
) -> Hooks:
    attempt, ledger = books.attempt, books.ledger

    def mark(step: int) -> dict[str, Any]:
        guard.check()
        ledger.mark(step)
        return {"identity": opening.identity, "metrics": report.mark(step)}

    def flush() -> None:
        ledger.flush()
        report.flush()

    return Hooks(
        mark=mark,
        flush=flush,
        successor=lambda: _name(attempt.successor()),
        committed=lambda commit: attempt.beat(step=commit.step, committed=commit.step),
        retain=lambda: store.retain(retention, attempt=attempt.number),
    )


def _evaluation(config: Config, parts: Parts, callbacks: dict[str, Callback]) -> None:
    """Add what evaluates, and what looks at evaluations."""
    if parts.evaluate is None or parts.held_out is None:
        return
    trainer, goal = config.trainer, config.objective
    interval = Interval(steps=trainer.evaluate_every_steps, epochs=trainer.evaluate_every_epochs)
    callbacks["evaluate"] = Evaluate(interval, parts.evaluate, parts.held_out)
    if goal.metric is None:
        return
    callbacks["best"] = Best(goal.metric, mode=goal.mode.name, keep=config.checkpoint.keep_best)
    stopping = trainer.early_stopping
    if stopping.patience is not None:
        callbacks["early_stopping"] = EarlyStopping(
            goal.metric, mode=goal.mode.name, patience=stopping.patience, min_delta=stopping.min_delta
        )


def _checked(name: str, own: Any) -> Callback:
    if not isinstance(own, Callback):
        kind = f"{type(own).__module__}.{type(own).__qualname__}"
        raise ConfigError(f"callbacks.{name} is a {kind}; its class needs runner.callbacks.base.Callback as its base")
    return own


def _saver(
    config: Config,
    opening: Opening,
    store: CheckpointStore,
    attempt: int,
    books: Books | None,
    guard: FiniteLoss,
    report: Report,
    ranks: Ranks,
) -> Callback:
    checkpoint = config.checkpoint
    if books is None:
        return FollowCheckpoint(store, attempt=attempt, background=checkpoint.background, ranks=ranks)
    retention = _retention(config)
    return SaveCheckpoint(
        store,
        Interval(steps=checkpoint.every_steps, seconds=checkpoint.every_seconds),
        Affordable() if checkpoint.every is Every.auto else None,
        _hooks(opening, books, guard, report, store, retention),
        attempt=attempt,
        pins=retention.pins,
        max_unsaved=checkpoint.max_unsaved,
        background=checkpoint.background,
        ranks=ranks,
    )


def _retention(config: Config) -> Retention:
    keep, goal = config.checkpoint, config.objective
    return Retention(keep.keep_last, keep.keep_every_steps, keep.keep_best, goal.mode.name if goal.metric else None)


def _name(record: Record | None) -> str | None:
    return None if record is None else record.owner()

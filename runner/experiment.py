"""One attempt at a run.

claim the attempt -> build -> newest good checkpoint -> load, generators last -> train -> result
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

import runner
from runner import signals, topology
from runner.build import Parts, build, set_up
from runner.callbacks.base import Callback
from runner.callbacks.checkpoint import SaveCheckpoint
from runner.callbacks.evaluate import Best, EarlyStopping, Evaluate
from runner.callbacks.guard import FiniteLoss
from runner.callbacks.ledger import KeepLedger
from runner.callbacks.progress import Heartbeat, Progress
from runner.callbacks.report import Report
from runner.callbacks.saving import Hooks
from runner.checkpoint.manifest import commits
from runner.checkpoint.retention import Retention
from runner.checkpoint.store import CheckpointStore
from runner.config.schema import CheckpointConfig, Config, Every, OnConflict, OnNonfinite
from runner.data.ledger import Ledger
from runner.errors import Interrupted, NonFiniteError, StorageError, Superseded, printable
from runner.finish import finish
from runner.interval import Affordable, Interval
from runner.introduction import introduce
from runner.metrics import hparams
from runner.metrics.lines import MetricLines
from runner.restore import Resumed, resolve, restore_newest
from runner.restore import begin as begin_state
from runner.run import attempts, records
from runner.run.attempts import Attempt
from runner.run.directory import TENSORBOARD
from runner.run.opening import Opening, begin
from runner.run.parent import Origin
from runner.run.records import Record
from runner.state import Stateful
from runner.storage.location import Location
from runner.trainer import Trainer


def run(opening: Opening, config: Config, *, overrides: list[str]) -> dict[str, Any]:
    """Begin the run or go on with it until it is finished; returns its result.

    Raises Interrupted after a stop signal, with everything committed, and RunInUse while another process has the run.
    """
    device = set_up(config)
    location = opening.directory.location
    here = topology.describe(device)
    with _attempt(opening, config, {"overrides": overrides, "topology": here}) as attempt:
        parts = build(config, device)
        store = CheckpointStore(location)
        lines = MetricLines(location, attempt=attempt.number)
        callbacks = _callbacks(config, opening, parts, store, attempt, lines)
        parts.state.memories = {name: call for name, call in callbacks.items() if isinstance(call, Stateful)}

        resumed = _resume(opening, parts, store)
        lines.open(resumed.step, resumed.facts.get("metrics"))
        attempt.beat(step=resumed.step, resumed=str(resumed.commit or ""), unusable=list(resumed.unusable))
        before = records.last(location, before=attempt.number)
        hparams.write(location, TENSORBOARD, opening.directory.experiment, opening.identity, finished=False)
        introduce(opening, parts, resumed, before=before, number=attempt.number, here=here)
        signals.raise_if_received("during start-up, nothing to commit")

        trainer = Trainer(
            parts.task,
            parts.update,
            [*callbacks.values()],
            max_steps=_max_steps(config, parts),
            max_epochs=config.trainer.max_epochs,
            max_seconds=config.trainer.max_seconds,
        )
        saver = callbacks["checkpoint"]
        assert isinstance(saver, SaveCheckpoint)
        with closing(saver):
            loop = trainer.fit(parts.state, elapsed=resumed.facts.get("elapsed", 0.0))
        if loop.stop in signals.NAMES:
            raise Interrupted(
                f"{loop.stop}: stopped after step {loop.step}, which is committed; run the same command again to go on"
            )
        return finish(opening, parts, store, callbacks, loop)


@contextmanager
def _attempt(opening: Opening, config: Config, facts: dict[str, Any]) -> Iterator[Attempt]:
    """Claim the run for this process, and record how its life ended unless it is killed."""
    directory = opening.directory
    signals.raise_if_received("during start-up, nothing to commit")
    facts |= {"version": runner.__version__, "accepted": opening.accepted}
    # Claims may have been cleared away by hand; what was committed under their numbers counts all the same.
    above = max((commit.attempt for commit in commits(directory.location)), default=0)
    attempt = attempts.claim(directory.location, facts, above=above, steal=config.run.on_conflict is OnConflict.steal)
    begin(opening, attempt, parent=_origin(opening))
    outcome, reason = "failed", ""
    try:
        directory.sweep()
        yield attempt
        outcome = "finished"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, Interrupted):
            outcome = "interrupted"
        elif isinstance(error, Superseded):
            outcome = "superseded"
        elif isinstance(error, NonFiniteError):
            outcome = "diverged"
        raise
    finally:
        with suppress(StorageError):  # the reason of the failure matters more than a record of it
            attempt.end(outcome, reason=reason)


def _callbacks(
    config: Config, opening: Opening, parts: Parts, store: CheckpointStore, attempt: Attempt, lines: MetricLines
) -> dict[str, Callback]:
    """All callbacks, in the order in which they run, by the name that one with a memory has in the state."""
    ledger = Ledger(
        opening.directory.location, attempt=attempt.number, recipe=parts.recipe, grouping=config.data.batch_size
    )
    callbacks: dict[str, Callback] = {"ledger": KeepLedger(ledger)}
    guard = FiniteLoss()
    if config.trainer.on_nonfinite is OnNonfinite.stop:
        callbacks["finite_loss"] = guard
    _evaluation(config, parts, callbacks)
    best = callbacks.get("best")
    report = Report(
        every_steps=config.metrics.every_steps,
        folder=opening.directory.location.folder(TENSORBOARD),
        lines=lines,
        attempt=attempt.number,
        best=best if isinstance(best, Best) else None,
    )

    callbacks["report"] = report
    callbacks["progress"] = Progress()
    callbacks["heartbeat"] = Heartbeat(attempt)

    def mark(step: int) -> dict[str, Any]:
        guard.check()
        ledger.mark(step)
        return {"identity": opening.identity, "metrics": report.mark(step)}

    def flush() -> None:
        ledger.flush()
        report.flush()

    retention = _retention(config)
    hooks = Hooks(
        mark=mark,
        flush=flush,
        successor=lambda: _name(attempt.successor()),
        committed=lambda commit: attempt.beat(step=commit.step, committed=commit.step),
        retain=lambda: store.retain(retention, attempt=attempt.number),
    )
    callbacks["checkpoint"] = _saver(config.checkpoint, store, attempt.number, retention, hooks)
    return callbacks


def _evaluation(config: Config, parts: Parts, callbacks: dict[str, Callback]) -> None:
    """Add what evaluates, and what looks at evaluations."""
    if parts.evaluate is None:
        return
    trainer, goal = config.trainer, config.objective
    interval = Interval(steps=trainer.evaluate_every_steps, epochs=trainer.evaluate_every_epochs)
    callbacks["evaluate"] = Evaluate(interval, parts.evaluate)
    if goal.metric is None:
        return
    callbacks["best"] = Best(goal.metric, mode=goal.mode.name, keep=config.checkpoint.keep_best)
    stopping = trainer.early_stopping
    if stopping.patience is not None:
        callbacks["early_stopping"] = EarlyStopping(
            goal.metric, mode=goal.mode.name, patience=stopping.patience, min_delta=stopping.min_delta
        )


def _saver(
    checkpoint: CheckpointConfig, store: CheckpointStore, attempt: int, retention: Retention, hooks: Hooks
) -> SaveCheckpoint:
    return SaveCheckpoint(
        store,
        Interval(steps=checkpoint.every_steps, seconds=checkpoint.every_seconds),
        Affordable() if checkpoint.every is Every.auto else None,
        hooks,
        attempt=attempt,
        pins=retention.pins,
        max_unsaved=checkpoint.max_unsaved,
        background=checkpoint.background,
    )


def _retention(config: Config) -> Retention:
    keep, goal = config.checkpoint, config.objective
    return Retention(keep.keep_last, keep.keep_every_steps, keep.keep_best, goal.mode.name if goal.metric else None)


def _max_steps(config: Config, parts: Parts) -> int | None:
    """The earlier of ``max_steps`` and the end of ``max_epochs``, where that is known."""
    trainer = config.trainer
    epochs = None if trainer.max_epochs is None or parts.plan is None else parts.plan.steps_of(trainer.max_epochs)
    limits = [trainer.max_steps, epochs]
    return min((limit for limit in limits if limit is not None), default=None)


def _resume(opening: Opening, parts: Parts, store: CheckpointStore) -> Resumed:
    evidence = partial(_evidence, opening.directory.location)
    fresh = partial(begin_state, parts.state, opening.identity, Origin.of(opening.directory))
    return restore_newest(parts.state, store, opening.identity, evidence=evidence, fresh=fresh)


def _evidence(location: Location) -> str | None:
    """A trace that some attempt committed, whatever ``commits/`` holds now."""
    for record in records.history(location):
        for source in (record.beat, record.end or {}):
            if source.get("committed"):
                return f"attempt {record.number} noted one at step {printable(source['committed'])}"
    return None


def _origin(opening: Opening) -> dict[str, Any] | None:
    """What a new run begins from, for its record; one that is there has it already."""
    if opening.parent is None or opening.directory.record() is not None:
        return None
    return resolve(opening.parent).record()


def _name(record: Record | None) -> str | None:
    return None if record is None else record.owner()

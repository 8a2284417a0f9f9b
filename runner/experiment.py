"""One attempt at a run.

claim the attempt -> build -> newest good checkpoint -> load, generators last -> train -> result
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Any

import torch

import runner
from runner import signals, startup_log
from runner.assembly import RunRecords, Wiring
from runner.build import Parts, build
from runner.callbacks.base import Callback, Loop
from runner.callbacks.saving import SaveCheckpoint
from runner.checkpoint.manifest import commits
from runner.checkpoint.store import CheckpointStore
from runner.config.schema import Config, OnBadRecord, OnConflict
from runner.data import ledger
from runner.data.stream import BatchStream
from runner.device import set_up
from runner.distributed.communicator import Communicator, on_rank_zero
from runner.distributed.team import Team
from runner.errors import Interrupted, NonFiniteError, StorageError, Superseded, exit_is_an_error, printable
from runner.finish import finish
from runner.metrics import tensorboard
from runner.restore import Resumed, resolve, restore_newest
from runner.restore import begin as begin_state
from runner.run import attempt_records, attempts
from runner.run.attempts import Attempt
from runner.run.directory import TENSORBOARD
from runner.run.opening import OpenedRun, begin
from runner.run.parent import ParentRecord, anew
from runner.startup_log import log_start
from runner.state import Stateful
from runner.storage.location import Location
from runner.trainer import Trainer


def run(opening: OpenedRun, config: Config, team: Team, *, overrides: list[str]) -> dict[str, Any]:
    """Start the run, or resume it, and train until it is finished; returns its result.

    All processes of the team do this together; only rank 0 writes records. Raises Interrupted after a stop signal, with
    everything committed, and RunInUse while another process works on the run.
    """
    device = set_up(config, team.world)
    team.begin(device)
    location = opening.directory.location
    here = _topology(config, device, team)
    claimed = _attempt(opening, config, team, {"overrides": overrides, "topology": here})
    with claimed as (number, attempt), team.explaining(), _closing() as stack, exit_is_an_error():
        with signals.at_once(team.world.size == 1):
            parts = build(config, device, team)
        stack.callback(parts.state.stream.close)
        if parts.held_out is not None:
            stack.callback(parts.held_out.close)
        store = CheckpointStore(location, team.channel("writer"))
        books = None if attempt is None else RunRecords.of(attempt, location, config, parts)
        callbacks = Wiring(config, opening, parts, store, number, books, team).callbacks()
        parts.state.memories = {name: call for name, call in callbacks.items() if isinstance(call, Stateful)}

        if isinstance(parts.state.stream, BatchStream) and config.data.on_bad_record is OnBadRecord.substitute:
            found = on_rank_zero(team.ranks, lambda: [*ledger.swaps(location, parts.recipe).items()])
            parts.state.stream.repeat(dict(found))
        with signals.at_once(team.world.size == 1):
            resumed = _resume(opening, parts, store, team.ranks)
        if books is not None:
            books.open(resumed)
            before = attempt_records.last(location, before=number)
            tensorboard.write(location, TENSORBOARD, opening.directory.experiment, opening.identity, finished=False)
            log_start(opening, parts, resumed, before=before, number=number, here=here)
        signals.raise_if_received("during start-up, nothing to commit")

        trainer = _trainer(config, parts, [*callbacks.values()], team)
        saver = callbacks["checkpoint"]
        assert isinstance(saver, SaveCheckpoint)
        saver.save_at_start = resumed.origin is not None
        with closing(saver), _advising(opening):
            loop = trainer.fit(
                parts.state, elapsed=resumed.facts.get("elapsed", 0.0), stopped=resumed.stopped(opening.identity)
            )
        if loop.evaluation_due or loop.stop in signals.NAMES:  # also in the evaluation after the last step
            raise _interrupted(loop, team.stop)
        if 0 < loop.step <= parts.update.in_a_row:
            raise NonFiniteError("all steps were skipped, because their loss or gradients were NaN or infinite")
        patience = config.checkpoint.max_unsaved
        return finish(opening, parts, store, callbacks, loop, team.ranks, attempt, patience)


def _topology(config: Config, device: torch.device, team: Team) -> dict[str, Any]:
    runtime = config.runtime
    spread = runtime.parallel.name if runtime.shard is None else f"{runtime.parallel.name}, {runtime.shard} slices"
    return startup_log.topology(device, team.world.size, spread, compiled=runtime.compile)


def _trainer(config: Config, parts: Parts, callbacks: list[Callback], team: Team) -> Trainer:
    return Trainer(
        parts.task,
        parts.update,
        callbacks,
        max_steps=_max_steps(config, parts),
        max_epochs=config.trainer.max_epochs,
        max_seconds=config.trainer.max_seconds,
        team=team,
        layout=parts.layout,
    )


@contextmanager
def _closing() -> Iterator[ExitStack]:
    """Within the block, data is opened, which is closed at the end. A signal that breaks off reading it, where no step
    is whole, interrupts the attempt.
    """
    try:
        with ExitStack() as stack:
            yield stack
    except signals.Stopped as stopped:
        raise Interrupted(
            f"{stopped} while data was read; run the same command again to go on from what is committed"
        ) from None


@contextmanager
def _advising(opening: OpenedRun) -> Iterator[None]:
    """Say how to go on from the last checkpoint, where training ends because it did not stay finite."""
    try:
        yield
    except NonFiniteError as error:
        if opening.identity["trainer"]["on_nonfinite"] == "stop":
            how = "trainer.on_nonfinite=skip run.on_drift=accept"
            error.args = (
                f"{error}\nTo go on from the last checkpoint and skip such steps:\n  {opening.command} {how}",
            )
        raise


def _interrupted(loop: Loop, signal: str | None) -> Interrupted:
    error = Interrupted(
        f"{signal}: stopped after step {loop.step}, which is committed; run the same command again to go on"
    )
    error.agreed = True
    return error


@contextmanager
def _attempt(
    opening: OpenedRun, config: Config, team: Team, facts: dict[str, Any]
) -> Iterator[tuple[int, Attempt | None]]:
    """Within the block, the run is claimed. Yields the attempt's number, and the attempt itself on rank 0.

    Records how the attempt ended, unless the process is killed.
    """
    signals.raise_if_received("during start-up, nothing to commit")
    facts |= {"version": runner.__version__, "accepted": opening.accepted}
    claimed: list[Attempt] = []

    def claim() -> int:
        claimed.append(_claim(opening, config, facts))
        return claimed[0].number

    number = on_rank_zero(team.ranks, claim)
    if not claimed:
        yield number, None
        return
    (attempt,) = claimed
    team.at_failure(lambda why: attempt.end("failed", reason=why))
    outcome, reason = "failed", ""
    try:
        opening.directory.sweep()
        yield number, attempt
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


def _claim(opening: OpenedRun, config: Config, facts: dict[str, Any]) -> Attempt:
    # The number must also be above those of commits, because somebody may have removed attempts/ by hand.
    opening.directory.settle()
    location = opening.directory.location
    above = max((commit.attempt for commit in commits(location)), default=0)
    attempt = attempts.claim(location, facts, above=above, steal=config.run.on_conflict is OnConflict.steal)
    begin(opening, attempt, parent=_origin(opening))
    return attempt


def _max_steps(config: Config, parts: Parts) -> int | None:
    """The smaller of ``max_steps`` and the steps in ``max_epochs``; the latter are unknown for some data."""
    trainer = config.trainer
    epochs = None if trainer.max_epochs is None or parts.plan is None else parts.plan.steps_of(trainer.max_epochs)
    limits = [trainer.max_steps, epochs]
    return min((limit for limit in limits if limit is not None), default=None)


def _resume(opening: OpenedRun, parts: Parts, store: CheckpointStore, ranks: Communicator) -> Resumed:
    evidence = partial(_evidence, opening.directory.location)
    origin = ParentRecord.of(opening.directory)
    fresh = partial(begin_state, parts.state, opening.identity, origin, opening.parent, opening.directory, ranks)
    begun = partial(anew, opening.command, opening.directory)
    return restore_newest(parts.state, store, opening.identity, evidence=evidence, fresh=fresh, anew=begun, ranks=ranks)


def _evidence(location: Location) -> str | None:
    """A record of some attempt that says that it committed, whatever ``commits/`` holds now."""
    for record in attempt_records.history(location):
        for source in (record.beat, record.end or {}):
            if source.get("committed"):
                return f"attempt {record.number} noted one at step {printable(source['committed'])}"
    return None


def _origin(opening: OpenedRun) -> dict[str, Any] | None:
    """The parent of a new run, for its record; None for a run that exists, whose record has it already."""
    if opening.parent is None or opening.directory.record() is not None:
        return None
    return resolve(opening.parent).record()

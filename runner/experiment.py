"""One attempt at a run.

claim the attempt -> build -> newest good checkpoint -> load, generators last -> train -> result
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Any

import torch

import runner
from runner import signals, startup_log
from runner.assembly import RunRecords, Wiring
from runner.build import Parts, build
from runner.callbacks.base import Callback, Loop, TrainingSetup, notify, observers, overriding
from runner.callbacks.evaluate import Evaluate
from runner.callbacks.saving import SaveCheckpoint
from runner.checkpoint.manifest import commits
from runner.checkpoint.store import CheckpointStore
from runner.config.schema import Config, OnBadRecord
from runner.data import ledger
from runner.data.stream import MapStyleStream
from runner.device import set_up_device
from runner.distributed.communicator import on_rank_zero
from runner.distributed.team import Team
from runner.errors import (
    Interrupted,
    NonFiniteError,
    RunnerError,
    StorageError,
    Superseded,
    exit_is_an_error,
    printable,
)
from runner.finish import finish
from runner.restore import Resumed, resolve, restore_newest
from runner.restore import begin as begin_state
from runner.run import attempt_records
from runner.run.attempts import Attempt
from runner.run.opening import OpenedRun, claim_run
from runner.run.parent import ParentRecord, new_run_hint
from runner.startup_log import log_start
from runner.state import Stateful
from runner.storage.location import Location
from runner.trainer import Trainer

log = logging.getLogger("runner")


def run(opening: OpenedRun, config: Config, team: Team, *, overrides: list[str]) -> dict[str, Any]:
    """Start the run, or resume it, and train until it is finished; returns its result.

    All processes of the team do this together; only rank 0 writes records. Raises Interrupted after a stop signal
    (see there) and RunInUse while another process works on the run.
    """
    device = set_up_device(config, team.world)
    team.begin(device)
    location = opening.directory.location
    here = _topology(config, device, team)
    claimed = _attempt(opening, team, {"overrides": overrides, "topology": here})
    callbacks: dict[str, Callback] = {}
    reporting = _reporting_errors(callbacks)
    with claimed as (number, attempt), team.blame_peer(), reporting, _closing() as stack, exit_is_an_error():
        with signals.at_once(team.world.size == 1):
            parts = build(config, device, team)
        stack.callback(parts.state.stream.close)
        if parts.held_out is not None:
            stack.callback(parts.held_out.close)
        store = CheckpointStore(location, team.channel("writer"))
        records = None if attempt is None else RunRecords.of(attempt, opening, config, parts)
        callbacks |= Wiring(config, opening, parts, store, number, records, team).callbacks()
        setup = _set_up(config, parts, callbacks, store)
        parts.state.memories = {name: call for name, call in callbacks.items() if isinstance(call, Stateful)}

        resumed = _resume(opening, config, parts, store, team)
        calls = _connect(callbacks, parts)
        notify(calls, "on_resume", parts.state)
        if records is not None:
            records.open(opening, setup.writers, resumed)
            before = attempt_records.newest(location, before=number)
            log_start(opening, parts, resumed, before=before, number=number, here=here)
        signals.raise_if_received("during start-up, nothing to commit")

        loop = _train(opening, parts, setup, calls, resumed, team)
        patience = config.checkpoint.max_unsaved
        result = finish(opening, parts, store, callbacks, loop, team.comm, attempt, patience)
        notify(callbacks.values(), "on_finish", opening.directory, result)
        return result


def _topology(config: Config, device: torch.device, team: Team) -> dict[str, Any]:
    runtime = config.runtime
    spread = runtime.parallel.name if runtime.shard is None else f"{runtime.parallel.name}, {runtime.shard} slices"
    return startup_log.topology(device, team.world.size, spread, compiled=runtime.compile)


def _set_up(config: Config, parts: Parts, callbacks: dict[str, Callback], store: CheckpointStore) -> TrainingSetup:
    """The parts of the attempt and its limits, as ``on_build`` of observers and callbacks leaves them."""
    trainer, steps = config.trainer, _max_steps(config, parts)
    writers = {name: node for name, node in config.metrics.writers.items() if node is not None}
    setup = TrainingSetup(parts.state, callbacks, store, steps, trainer.max_epochs, trainer.max_seconds, writers)
    notify([*observers, *callbacks.values()], "on_build", setup)
    return setup


def _connect(callbacks: Mapping[str, Callback], parts: Parts) -> list[Callback]:
    """Register ``on_save``, ``on_commit``, ``on_evaluation`` and ``on_gradients`` with the objects that call them;
    returns all callbacks and observers in order.
    """
    saver, evaluate = _saver(callbacks), callbacks.get("evaluate")
    calls = [*(each for each in callbacks.values() if each is not saver), *observers, saver]
    saver.save_listeners = overriding(calls, "on_save")
    saver.commit_listeners = overriding(calls, "on_commit")
    if isinstance(evaluate, Evaluate):
        evaluate.listeners = overriding(calls, "on_evaluation")
    parts.update.gradient_listeners = [partial(call, parts.state) for call in overriding(calls, "on_gradients")]
    return calls


def _saver(callbacks: Mapping[str, Callback]) -> SaveCheckpoint:
    saver = callbacks["checkpoint"]
    assert isinstance(saver, SaveCheckpoint)
    return saver


def _train(
    opening: OpenedRun,
    parts: Parts,
    setup: TrainingSetup,
    calls: list[Callback],
    resumed: Resumed,
    team: Team,
) -> Loop:
    """Train to the end. Raises Interrupted after a stop signal, with the last step committed, and NonFiniteError."""
    trainer = Trainer(
        parts.task,
        parts.update,
        calls,
        users=[callback for name, callback in setup.callbacks.items() if name.startswith("own.")],
        max_steps=setup.max_steps,
        max_epochs=setup.max_epochs,
        max_seconds=setup.max_seconds,
        team=team,
        parallelism=parts.parallelism,
    )
    saver = _saver(setup.callbacks)
    saver.save_at_start = resumed.origin is not None
    elapsed = resumed.facts.get("elapsed", 0.0)
    with closing(saver), _advising(opening):
        loop = trainer.fit(parts.state, elapsed=elapsed, stopped=resumed.stopped(opening.identity))
    if loop.evaluation_due or loop.stop in signals.NAMES:  # also in the evaluation after the last step
        error = Interrupted(
            f"{team.stop}: stopped after step {loop.step}, which is committed; run the same command again to go on"
        )
        error.agreed = True
        raise error
    if 0 < loop.step <= parts.update.in_a_row:
        raise NonFiniteError("all steps were skipped, because their loss or gradients were NaN or infinite")
    return loop


@contextmanager
def _reporting_errors(callbacks: Mapping[str, Callback]) -> Iterator[None]:
    """Tell callbacks and observers of an error that ends the attempt; the callbacks may still be built in the block."""
    try:
        yield
    except Exception as error:
        for call in overriding([*callbacks.values(), *observers], "on_error"):
            try:
                call(error)
            except Exception:  # the cause matters more
                log.exception("a callback failed in on_error")
        raise


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


@contextmanager
def _attempt(opening: OpenedRun, team: Team, facts: dict[str, Any]) -> Iterator[tuple[int, Attempt | None]]:
    """Within the block, the run is claimed. Yields the attempt's number, and the attempt itself on rank 0.

    Records how the attempt ended, unless the process is killed.
    """
    signals.raise_if_received("during start-up, nothing to commit")
    claimed: list[Attempt] = []

    def claim() -> int:
        claimed.append(_claim(opening, facts))
        return claimed[0].number

    number = on_rank_zero(team.comm, claim)
    if not claimed:
        yield number, None
        return
    (attempt,) = claimed
    team.on_failure(lambda reason, status: attempt.end(_outcome(status), reason=reason))
    outcome, reason = "failed", ""
    try:
        opening.directory.sweep()
        yield number, attempt
        outcome = "finished"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, Superseded):
            outcome = "superseded"
        elif isinstance(error, NonFiniteError):
            outcome = "diverged"
        elif isinstance(error, RunnerError):  # also of another process, which was interrupted and ended this one
            outcome = _outcome(error.status)
        raise
    finally:
        with suppress(StorageError):  # the reason of the failure matters more than a record of it
            attempt.end(outcome, reason=reason)


def _outcome(status: int) -> str:
    return "interrupted" if status == Interrupted.status else "failed"


def _claim(opening: OpenedRun, facts: dict[str, Any]) -> Attempt:
    # The number must also be above those of commits, because somebody may have removed attempts/ by hand.
    opening.directory.settle()
    above = max((commit.attempt for commit in commits(opening.directory.location)), default=0)
    return claim_run(opening, facts | {"version": runner.__version__}, above=above, parent=_origin(opening))


def _max_steps(config: Config, parts: Parts) -> int | None:
    """The smaller of ``max_steps`` and the steps in ``max_epochs``; the latter are unknown for some data."""
    trainer = config.trainer
    epochs = None if trainer.max_epochs is None or parts.plan is None else parts.plan.steps_of(trainer.max_epochs)
    limits = [trainer.max_steps, epochs]
    return min((limit for limit in limits if limit is not None), default=None)


def _resume(opening: OpenedRun, config: Config, parts: Parts, store: CheckpointStore, team: Team) -> Resumed:
    """Restore the newest good checkpoint, or begin; with the samples that earlier attempts took for bad records."""
    directory, state = opening.directory, parts.state
    if isinstance(state.stream, MapStyleStream) and config.data.on_bad_record is OnBadRecord.substitute:
        substitutions = on_rank_zero(
            team.comm, lambda: [*ledger.substitutions(directory.location, parts.recipe).items()]
        )
        state.stream.repeat_substitutions(dict(substitutions))
    origin = ParentRecord.of(directory)
    with signals.at_once(team.world.size == 1):
        return restore_newest(
            state,
            store,
            opening.identity,
            evidence=partial(_evidence, directory.location),
            fresh=partial(begin_state, state, opening.identity, origin, opening.parent, directory, team.comm),
            anew=partial(new_run_hint, opening.command, directory),
            comm=team.comm,
        )


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

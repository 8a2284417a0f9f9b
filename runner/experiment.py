"""One attempt at a run.

claim the attempt -> build -> newest good checkpoint -> load, generators last -> train -> result
"""

import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from textwrap import indent
from typing import Any

import runner
from runner import signals
from runner.build import Parts, build, make_callbacks, make_observers, open_writers, training_steps
from runner.callbacks.base import Callback, Loop, TrainingSetup, notify, observers, overriding
from runner.callbacks.evaluate import Evaluate
from runner.checkpoint.manifest import commits
from runner.checkpoint.store import CheckpointStore
from runner.config.identity import flatten
from runner.config.schema import Config, OnBadRecord, OnCodeChange
from runner.data import ledger
from runner.data.stream import MapStyleStream
from runner.device import set_up_device, topology, topology_changes
from runner.distributed.communicator import on_rank_zero
from runner.distributed.team import Team
from runner.errors import (
    DriftRefused,
    Interrupted,
    NonFiniteError,
    RunnerError,
    StorageError,
    Superseded,
    printable,
)
from runner.finish import finish
from runner.metrics.writer import MetricWriters, WriterContext
from runner.optimizers import table
from runner.restore import Resumed, load_reference, resolve, restore_newest
from runner.restore import begin as begin_state
from runner.run import attempts, code
from runner.run.attempts import Attempt, AttemptRecord
from runner.run.directory import RunDirectory
from runner.run.opening import OpenedRun, claim_run, trained
from runner.run.parent import ParentRecord, new_run_hint
from runner.state import Stateful
from runner.trainer import Trainer

log = logging.getLogger("runner")


def run(opening: OpenedRun, config: Config, team: Team, *, overrides: list[str]) -> dict[str, Any]:
    """Start the run, or resume it, and train until it is finished; returns its result.

    All processes of the team do this together; only rank 0 writes records. Raises Interrupted after a stop signal
    (see there) and RunInUse while another process works on the run.
    """
    device = set_up_device(config, team.world)
    team.begin(device)
    directory, runtime = opening.directory, config.runtime
    parallel = runtime.parallel.name if runtime.shard is None else f"{runtime.parallel.name}, {runtime.shard} slices"
    here = topology(device, team.world.size, parallel, compiled=runtime.compile)
    claimed = _attempt(opening, team, {"overrides": overrides, "topology": here})
    callbacks: dict[str, Callback] = {}
    reporting = _reporting_errors(callbacks)
    with claimed as (number, attempt), team.blame_peer(), reporting, _closing() as stack:
        observers = make_observers(config)
        callbacks.update(observers)
        notify(observers.values(), "on_command", directory)
        with signals.at_once(team.world.size == 1):
            parts = build(config, device, team)
        stack.callback(parts.state.stream.close)
        stack.callback(parts.evaluator.close)
        store, writers = CheckpointStore(directory.location, team.channel("writer")), MetricWriters()
        callbacks |= make_callbacks(config, parts, opening, store, number, attempt, writers, team)
        last = (*observers, "report", "progress", "heartbeat", "checkpoint")
        callbacks.update({name: callbacks.pop(name) for name in last if name in callbacks})
        setup = _set_up(config, parts, callbacks, store, directory, number)
        with_state = {name: call for name, call in callbacks.items() if isinstance(call, Stateful)}
        parts.state.memories = {name: call for name, call in with_state.items() if name not in observers}

        on_rank_zero(team.comm, partial(_record_code, opening, config.run.on_code_change, attempt))
        resumed = _resume(opening, config, parts, store, team)
        calls = _connect(callbacks, parts)
        notify(calls, "on_resume", parts.state)
        if attempt is not None:
            place = (directory.location, directory.experiment, directory.name, opening.identity, number, resumed.step)
            name = str((directory.record() or {}).get("id"))
            context = WriterContext(*place, id=name, options=directory.options)
            open_writers(writers, setup.writers, context, resumed.facts)
            attempt.beat(step=resumed.step, resumed=str(resumed.commit or ""), unusable=[*resumed.unusable])
            _log_start(opening, parts, resumed, number, here)
        signals.raise_if_received("during start-up, nothing to commit")

        if resumed.commit is None or resumed.origin is not None:
            parts.evaluator.rehearse(parts.state)
        loop = _train(opening, parts, setup, calls, resumed, team)
        patience = config.checkpoint.max_unsaved
        result = finish(opening, parts, store, callbacks, loop, team.comm, attempt, patience)
        notify(callbacks.values(), "on_finish", directory, result)
        return result


def _set_up(
    config: Config,
    parts: Parts,
    callbacks: dict[str, Callback],
    store: CheckpointStore,
    directory: RunDirectory,
    number: int,
) -> TrainingSetup:
    """The parts of the attempt and its limits, as ``on_build`` of observers and callbacks leaves them."""
    trainer, steps = config.trainer, training_steps(config.trainer, parts.plan)
    writers = {name: node for name, node in config.metrics.writers.items() if node is not None}
    limits = (steps, trainer.max_epochs, trainer.max_seconds)
    setup = TrainingSetup(parts.state, callbacks, store, *limits, writers, directory.local, number)
    notify([*observers, *callbacks.values()], "on_build", setup)
    return setup


def _connect(callbacks: Mapping[str, Callback], parts: Parts) -> list[Callback]:
    """Register ``on_save``, ``on_commit``, ``on_evaluation`` and ``on_gradients`` with the objects that call them;
    returns all callbacks and observers in order.
    """
    saver: Any = callbacks["checkpoint"]
    calls = [*(each for each in callbacks.values() if each is not saver), *observers, saver]
    saver.save_listeners = overriding(calls, "on_save")
    saver.commit_listeners = overriding(calls, "on_commit")
    if isinstance(evaluate := callbacks.get("evaluate"), Evaluate):
        evaluate.listeners = overriding(calls, "on_evaluation")
    parts.update.gradient_listeners = [partial(call, parts.state) for call in overriding(calls, "on_gradients")]
    return calls


def _train(
    opening: OpenedRun, parts: Parts, setup: TrainingSetup, calls: list[Callback], resumed: Resumed, team: Team
) -> Loop:
    """Train to the end. Raises Interrupted after a stop signal, with the last step committed, and NonFiniteError."""
    users = [callback for name, callback in setup.callbacks.items() if name.startswith("own.")]
    trainer = Trainer(parts.task, parts.update, parts.parallelism, calls, setup, team, users)
    saver: Any = setup.callbacks["checkpoint"]
    saver.save_at_start = resumed.origin is not None
    elapsed = resumed.facts.get("elapsed", 0.0)
    try:
        with closing(saver):
            loop = trainer.fit(parts.state, elapsed=elapsed, stopped=resumed.stopped(opening.identity))
    except NonFiniteError as error:
        if opening.identity["trainer"]["on_nonfinite"] == "stop":
            command = f"{opening.command} trainer.on_nonfinite=skip run.on_drift=accept"
            error.args = (f"{error}\nTo continue from the last checkpoint and skip such steps:\n  {command}",)
        raise
    if (failure := loop.failure) is not None:
        remedy = "correct the code and run the same command again, which repeats the evaluation and continues"
        failure.args = (f"{failure}\nStep {loop.step} is committed as it was before the evaluation: {remedy}",)
        raise failure
    if loop.evaluation_due or loop.stop in signals.NAMES:  # also in the evaluation after the last step
        interruption = Interrupted(
            f"{team.stop}: stopped after step {loop.step}, which is committed; run the same command again to continue"
        )
        interruption.agreed = True
        raise interruption
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
    is whole, interrupts the attempt. A user's sys.exit becomes an error: it would end a whole sweep, or claim success.
    """
    try:
        with ExitStack() as stack:
            yield stack
    except signals.Stopped as stopped:
        remedy = "run the same command again to continue from the last checkpoint"
        raise Interrupted(f"{stopped} while data was read; {remedy}") from None
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r}) was called in the run") from error


@contextmanager
def _attempt(opening: OpenedRun, team: Team, facts: dict[str, Any]) -> Iterator[tuple[int, Attempt | None]]:
    """Within the block, the run is claimed. Yields the attempt's number, and the attempt itself on rank 0.

    Records how the attempt ended, unless the process is killed.
    """
    signals.raise_if_received("during start-up, nothing to commit")
    claimed: list[Attempt] = []

    def claim() -> int:
        # The number must also be above those of commits, because somebody may have removed attempts/ by hand.
        opening.directory.settle()
        above = max((commit.attempt for commit in commits(opening.directory.location)), default=0)
        parent = None  # an existing run has its parent in its record already
        if opening.parent is not None and opening.directory.record() is None:
            parent = asdict(resolve(opening.parent))
        attempt = claim_run(opening, facts | {"version": runner.__version__}, above=above, parent=parent)
        claimed.append(attempt)
        return attempt.number

    number = on_rank_zero(team.comm, claim)
    if not claimed:
        yield number, None
        return
    (attempt,) = claimed
    team.on_failure(lambda reason, status: attempt.end(_outcome(status), reason=reason))
    outcome, reason = "finished", ""
    try:
        opening.directory.sweep()
        yield number, attempt
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        kinds: dict[type[BaseException], str] = {Superseded: "superseded", NonFiniteError: "diverged"}
        # A status of 75 may be that of another process, which was interrupted and ended this one.
        outcome = kinds.get(type(error)) or _outcome(error.status if isinstance(error, RunnerError) else 1)
        raise
    finally:
        with suppress(StorageError):  # the reason of the failure matters more than a record of it
            attempt.end(outcome, reason=reason)


def _outcome(status: int) -> str:
    return "interrupted" if status == Interrupted.status else "failed"


def _record_code(opening: OpenedRun, on_change: OnCodeChange, attempt: Attempt | None) -> None:
    """Record what code this attempt runs. Reports files that were edited since the attempt before, or raises
    DriftRefused for them. A run that has trained nothing yet takes a correction.
    """
    assert attempt is not None, "rank 0 has it"
    location = opening.directory.location
    before = None
    with suppress(StorageError):  # without the record a run goes on
        before = code.newest(location, below=attempt.number) if attempt.number > 1 else None
    settings = flatten(opening.identity).items()
    now = code.running([str(value) for key, value in settings if key.rpartition(".")[2] == "_target_"])
    edited = printable(", ".join(before.edited(now) if before else []))
    if edited and on_change is not OnCodeChange.accept and trained(opening.directory):
        if on_change is OnCodeChange.refuse:
            another = shlex.quote(f"{opening.directory.variant[:150]}-2")
            raise DriftRefused(
                f"the code is not the one that {location.url} was trained with. Edited since: {edited}.\n"
                "The run was left as it is. Either undo the edit (`runs show RUN --code` has the commit and the diff), "
                f"or\n  continue with the new code: {opening.command} run.on_code_change=accept\n"
                f"  start a new run:        {opening.command} run.name={another}"
            )
        log.warning("code     edited since the last attempt: %s", edited)
    if now != before:
        with suppress(StorageError):
            code.record(location, attempt.name, now)


def _resume(opening: OpenedRun, config: Config, parts: Parts, store: CheckpointStore, team: Team) -> Resumed:
    """Restore the newest good checkpoint, or begin; with the samples that earlier attempts took for bad records."""
    directory, state = opening.directory, parts.state

    def evidence() -> str | None:
        """A record of some attempt that says that it committed, whatever ``commits/`` holds now."""
        for record in attempts.history(directory.location):
            for source in (record.beat, record.end or {}):
                if source.get("committed"):
                    return f"attempt {record.number} noted one at step {printable(source['committed'])}"
        return None

    if isinstance(state.stream, MapStyleStream) and config.data.on_bad_record is OnBadRecord.substitute:
        recorded = on_rank_zero(team.comm, lambda: [*ledger.substitutions(directory.location, parts.recipe).items()])
        state.stream.repeat_substitutions(dict(recorded))
    origin = ParentRecord.of(directory)
    with signals.at_once(team.world.size == 1):
        if parts.reference is not None:
            parts.task.reference = load_reference(parts.reference, state, origin, opening.parent, directory, team.comm)
        return restore_newest(
            state,
            store,
            opening.identity,
            evidence=evidence,
            fresh=partial(begin_state, state, opening.identity, origin, opening.parent, directory, team.comm),
            anew=partial(new_run_hint, opening.command, directory),
            comm=team.comm,
        )


def _log_start(opening: OpenedRun, parts: Parts, resumed: Resumed, number: int, here: dict[str, Any]) -> None:
    """Print the first lines, once per attempt. ``here`` is the topology of this process."""
    before = attempts.newest(opening.directory.location, before=number)
    stream = parts.state.stream
    weights = [*parts.state.model.parameters()]
    count, learning = (sum(each.numel() for each in weights if every or each.requires_grad) for every in (True, False))
    log.info("run      %s", opening.directory.location.url)
    log.info("attempt  %d, %s", number, _from_where(resumed, before))
    for line in resumed.unusable:
        log.warning("unused   %s", line)
    for line in resumed.unmatched:
        log.warning("weights  %s", printable(line))
    if opening.changes:
        log.info("changed  %s", ", ".join(f"{d.key} {d.saved!r} -> {d.now!r}" for d in opening.changes))
    then = before.claim.get("topology") if before is not None else None
    moved = topology_changes(then, here) if isinstance(then, dict) else []
    if moved:
        log.warning("moved    %s: same samples, but floats may differ in the last bits", printable(", ".join(moved)))
    log.info("data     %s", stream.guarantee)
    if parts.parallelism.description:
        plan = parts.plan
        assert plan is not None, "iterable data was refused"
        each = f"{plan.micro_batches} micro-batch" + "es" * (plan.micro_batches > 1)
        share = f"{'up to ' * bool(plan.max_tokens)}{plan.batch_size // plan.slices_per_step} samples"
        log.info("together %s; each takes %s of %s", parts.parallelism.description, each, share)
    log.info("device   %s, threads %d, data workers %d", here["device"], here["threads"], stream.workers)
    log.info("model    %s parameters%s", f"{count:,}", "" if learning == count else f", {learning:,} of them trained")
    if groups := table(parts.update.optimizer):
        log.info("weights  as the optimizer has them:\n%s", indent(groups, " " * 9))


def _from_where(resumed: Resumed, before: AttemptRecord | None) -> str:
    origin = resumed.origin
    if origin is not None:
        if origin.foreign:
            return printable(f"weights of {origin.run}")
        return printable(f"{'forked' if origin.start else 'weights'} from step {origin.step} of {origin.run}")
    if resumed.commit is None:
        if before is None:
            return "from scratch"
        return f"from scratch ({_ended(before)} before its first checkpoint)"
    text = f"resumed from step {resumed.step} of attempt {resumed.commit.attempt}"
    reached = before.beat.get("step") if before is not None else None
    if before is not None and isinstance(reached, int) and reached > resumed.step:
        text += f"; {_ended(before)} at step {reached} or later, "
        text += f"{reached - resumed.step} steps are done again"
    return text


def _ended(before: AttemptRecord) -> str:
    outcome = before.outcome()
    return f"attempt {before.number} {'' if outcome in ('failed', 'diverged') else 'was '}{outcome}"

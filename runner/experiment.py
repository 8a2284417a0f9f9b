"""One attempt at a run.

claim the run -> build its parts -> restore the newest undamaged checkpoint -> train -> export weights -> write result
"""

import copy
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from textwrap import indent
from typing import Any, NoReturn, cast

from torch import Tensor

import runner
from runner import signals
from runner.activity import doing
from runner.build import Parts, build, make_callbacks, make_observers, open_writers, training_steps
from runner.callbacks.base import Callback, Loop, TrainingSetup, methods_for, notify, observers
from runner.callbacks.evaluate import Best, Evaluate
from runner.checkpoint.manifest import commits
from runner.checkpoint.tensor_file import Damaged, SafetensorsFile
from runner.config.identity import flatten
from runner.config.schema import Config, OnBadRecord, OnCodeChange
from runner.data import ledger
from runner.data.stream import MapStyleStream
from runner.device import set_up_device, topology, topology_changes
from runner.distributed.communicator import Communicator, Team, on_rank_zero
from runner.errors import DriftRefused, Interrupted, NonFiniteError, RunnerError, StorageError, Superseded, printable
from runner.hashing import sha256_hasher
from runner.metrics import tensorboard
from runner.optimizers import parameter_counts, saved_name, table
from runner.plain import numbers_text
from runner.restore import Resumed, evaluated_weights, load_reference, read_step, resolve, restore
from runner.run import attempts, code
from runner.run.attempts import Attempt, AttemptRecord
from runner.run.directory import BEST, MODEL
from runner.run.opening import RunSpec, claim_run, has_trained
from runner.state import Stateful
from runner.storage.location import Buffer, Location, protocol
from runner.trainer import Trainer

log = logging.getLogger("runner")

_LONGEST_PAUSE = 30.0  # seconds between two tries to export
_POLL_SECONDS = 0.5  # while waiting for the next try


def run(spec: RunSpec, config: Config, team: Team) -> dict[str, Any]:
    """Start the run, or resume it, and train until it is finished; returns its result.

    All processes of the team do this together; only rank 0 writes records. Raises Interrupted after a stop signal,
    and RunInUse while another process works on the run.
    """
    config = copy.deepcopy(config)  # instantiation resolves nodes in place, and Hydra gives this one to the launcher
    device = set_up_device(config, team.world)
    team.begin(device)
    here = topology(config, device, team.world.size)
    claim = _claim(spec, team, {"overrides": spec.overrides, "topology": here})
    callbacks: dict[str, Callback] = {}  # those that an error is reported to, at any time
    with claim as (number, attempt), team.blame_peer(), _reporting_errors(callbacks) as stack:
        configured = make_observers(config)
        callbacks.update(configured)
        notify(configured.values(), "on_command", spec.directory)
        with signals.stop_reads(at_once=team.world.size == 1):
            parts = build(config, device, team)
        stack.callback(parts.state.stream.close)
        stack.callback(parts.evaluator.close)
        ordered = make_callbacks(config, parts, spec, configured, number, attempt, team)
        callbacks.clear()
        callbacks.update(ordered)
        setup = _training_setup(config, parts, callbacks, spec, number)
        stateful = {name: call for name, call in callbacks.items() if isinstance(call, Stateful)}
        parts.state.stateful_callbacks = {name: call for name, call in stateful.items() if name not in configured}

        on_rank_zero(team.comm, partial(_record_code, spec, config.run.on_code_change, attempt))
        resumed = _resume(spec, config, parts, setup, team)
        calls = _register_listeners(callbacks, parts)
        notify(calls, "on_resume", parts.state)
        if attempt is not None:
            open_writers(spec, setup, resumed.step, resumed.facts)
            attempt.beat(step=resumed.step, resumed=str(resumed.commit or ""), unusable=[*resumed.damage])
            _log_start(spec, parts, resumed, number, here)
        signals.raise_if_received("during start-up, nothing to commit")

        if resumed.commit is None or resumed.origin is not None:
            parts.evaluator.rehearse([parts.state.evaluated_model, parts.state.model])
        loop = _train(spec, parts, setup, calls, resumed, team)
        result = finish(spec, parts, setup, loop, team.comm, attempt, config.checkpoint.max_unsaved)
        notify(callbacks.values(), "on_finish", spec.directory, result)
        return result


def _training_setup(
    config: Config, parts: Parts, callbacks: dict[str, Callback], spec: RunSpec, number: int
) -> TrainingSetup:
    """The parts of the attempt and its limits, as ``on_build`` of observers and callbacks leaves them."""
    trainer, saver = config.trainer, cast("Any", callbacks["checkpoint"])
    limits = (training_steps(trainer, parts.plan), trainer.max_epochs, trainer.max_seconds)
    writers = {name: node for name, node in config.metrics.writers.items() if node is not None}
    setup = TrainingSetup(parts.state, callbacks, saver.store, *limits, writers, spec.directory.local, number)
    notify([*observers, *callbacks.values()], "on_build", setup)
    return setup


def _register_listeners(callbacks: Mapping[str, Callback], parts: Parts) -> list[Callback]:
    """Register ``on_save``, ``on_commit``, ``on_evaluation`` and ``on_gradients`` with the objects that call them;
    returns all callbacks and observers in order.
    """
    saver: Any = callbacks["checkpoint"]  # the last, also after the observers: a committed step was shown to all
    calls = [*(each for each in callbacks.values() if each is not saver), *observers, saver]
    saver.save_listeners = methods_for(calls, "on_save")
    saver.commit_listeners = methods_for(calls, "on_commit")
    if isinstance(evaluate := callbacks.get("evaluate"), Evaluate):
        evaluate.listeners = methods_for(calls, "on_evaluation")
    parts.update.gradient_listeners = [partial(call, parts.state) for call in methods_for(calls, "on_gradients")]
    return calls


def _train(
    spec: RunSpec, parts: Parts, setup: TrainingSetup, calls: list[Callback], resumed: Resumed, team: Team
) -> Loop:
    """Train to the end. Raises Interrupted after a stop signal, with the last step committed, and NonFiniteError."""
    users = [callback for name, callback in setup.callbacks.items() if name.startswith("own.")]
    trainer = Trainer(parts.task, parts.update, parts.parallelism, calls, setup, team, users)
    saver: Any = setup.callbacks["checkpoint"]
    saver.save_at_start = resumed.origin is not None
    elapsed = resumed.facts.get("elapsed", 0.0)
    try:
        with closing(saver):
            loop = trainer.fit(parts.state, elapsed=elapsed, earlier_stop=resumed.final_stop(spec.identity))
    except NonFiniteError as error:
        if spec.identity["trainer"]["on_nonfinite"] == "stop":
            command = f"{spec.command} trainer.on_nonfinite=skip run.on_drift=accept"
            error.extend(f"To continue and skip such steps:\n  {command}")
        raise
    if (failure := loop.failure) is not None:
        remedy = "Correct the code and run the same command again: it repeats the evaluation and continues"
        failure.extend(f"Step {loop.step} is committed without the evaluation. {remedy}")
        raise failure
    if loop.evaluation_due or loop.stop in signals.NAMES:  # also in the evaluation after the last step
        where = f"stopped after step {loop.step}, which is committed"
        raise Interrupted(f"{team.stop}: {where}; run the same command again to continue", agreed=True)
    if 0 < loop.step <= parts.update.consecutive_skips:
        raise NonFiniteError("all steps were skipped, because their loss or gradients were NaN or infinite")
    return loop


@contextmanager
def _reporting_errors(callbacks: Mapping[str, Callback]) -> Iterator[ExitStack]:
    """Tell callbacks and observers of an error that ends the attempt; the callbacks may still be built in the block.

    A signal that breaks off reading data, where no step is whole, interrupts the attempt. A user's sys.exit becomes an
    error: it would end a whole sweep, or claim success. The stack closes what the block opens.
    """
    try:
        try:
            with _guarding_exit(), ExitStack() as stack:
                yield stack
        except signals.Stopped as stopped:
            remedy = "run the same command again to continue from the last checkpoint"
            raise Interrupted(f"{stopped} while data was read; {remedy}") from None
        except SystemExit as error:
            raise RuntimeError(f"sys.exit({error.code!r}) was called in the run") from error
    except Exception as error:
        for call in methods_for([*callbacks.values(), *observers], "on_error"):
            try:
                call(error)
            except StorageError as failure:
                log.warning("%s", printable(failure))
            except (Exception, SystemExit):  # the cause matters more
                log.exception("a callback failed in on_error")
        raise


@contextmanager
def _guarding_exit() -> Iterator[None]:
    """Within the block, ``os._exit`` in this process, but for the runner's own, ends it with 1 and a line: the run is
    not finished, and other statuses have a meaning.
    """
    leave, process = os._exit, os.getpid()

    def guarded(status: int) -> NoReturn:
        caller = sys._getframe(1)
        if os.getpid() == process and not str(caller.f_globals.get("__name__")).startswith("runner."):
            where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            with suppress(OSError):  # stderr may be closed
                os.write(2, f"os._exit({status}) was called in the run, by {where}\n".encode())
            status = 1
        leave(status)

    os._exit = guarded
    try:
        yield
    finally:
        os._exit = leave


@contextmanager
def _claim(spec: RunSpec, team: Team, facts: dict[str, Any]) -> Iterator[tuple[int, Attempt | None]]:
    """Within the block, the run is claimed. Yields the attempt's number, and the attempt itself on rank 0.

    Records how the attempt ended, unless the process is killed.
    """
    signals.raise_if_received("during start-up, nothing to commit")
    claims: list[Attempt] = []  # on rank 0

    def claim() -> int:
        # The number must also be above those of commits, because somebody may have removed attempts/ by hand.
        spec.directory.sync_parents()
        above = max((commit.attempt for commit in commits(spec.directory.location)), default=0)
        parent = None  # an existing run has its parent in its record already
        if spec.parent is not None and spec.directory.record() is None:
            parent = asdict(resolve(spec.parent))
        attempt = claim_run(spec, facts | {"version": runner.__version__}, above=above, parent=parent)
        claims.append(attempt)
        return attempt.number

    number = on_rank_zero(team.comm, claim)
    if not claims:
        yield number, None
        return
    (attempt,) = claims
    team.on_failure(lambda reason, status: attempt.end(_outcome(status), reason=reason))
    outcome, reason = "finished", ""
    try:
        spec.directory.remove_leftovers()
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


def _record_code(spec: RunSpec, on_change: OnCodeChange, attempt: Attempt | None) -> None:
    """Record what code this attempt runs. Reports files that were edited since the attempt before, or raises
    DriftRefused for them. A run that has trained nothing yet takes a correction.
    """
    assert attempt is not None, "rank 0 has it"
    location = spec.directory.location
    before = None
    with suppress(StorageError):  # without the record a run goes on
        before = code.newest(location, below=attempt.number) if attempt.number > 1 else None
    settings = flatten(spec.identity).items()
    now = code.running([str(value) for key, value in settings if key.rpartition(".")[2] == "_target_"])
    edits = printable(", ".join(before.edited(now) if before else []))
    if edits and on_change is not OnCodeChange.accept and has_trained(spec.directory):
        if on_change is OnCodeChange.refuse:
            another = shlex.quote(f"{spec.directory.variant[:150]}-2")
            raise DriftRefused(
                f"the code is not the one that {location.url} was trained with. Edited since: {edits}.\n"
                "The run was left as it is. Either undo the edit (`runs show RUN --code` has the commit and the diff), "
                f"or\n  continue with the new code: {spec.command} run.on_code_change=accept\n"
                f"  start a new run:        {spec.command} run.name={another}"
            )
        log.warning("code     edited since the last attempt: %s", edits)
    if now != before:
        with suppress(StorageError):
            code.record(location, attempt.name, now)


def _resume(spec: RunSpec, config: Config, parts: Parts, setup: TrainingSetup, team: Team) -> Resumed:
    """Restore the newest good checkpoint, or begin; with the substitutes of earlier attempts for bad records."""
    state = parts.state
    if isinstance(state.stream, MapStyleStream) and config.data.on_bad_record is OnBadRecord.substitute:
        location = spec.directory.location
        substitutes = on_rank_zero(team.comm, lambda: [*ledger.substitutions(location, parts.recipe).items()])
        state.stream.repeat_substitutions(dict(substitutes))
    with signals.stop_reads(at_once=team.world.size == 1):
        if parts.reference is not None:
            parts.task.reference = load_reference(parts.reference, state, spec, team.comm)
        return restore(state, setup.store, spec, team.comm)


def _log_start(spec: RunSpec, parts: Parts, resumed: Resumed, number: int, here: dict[str, Any]) -> None:
    """Print the first lines, once per attempt. ``here`` is the topology of this process."""
    before = attempts.newest(spec.directory.location, before=number)
    stream = parts.state.stream
    total, trainable = parameter_counts(parts.state.model)
    log.info("run      %s", spec.directory.location.url)
    log.info("attempt  %d, %s", number, _describe_start(resumed, before))
    if protocol(spec.directory.location.url) == "memory":
        log.warning("store    memory:// ends with this process, and the run with it")
    for line in resumed.damage:
        log.warning("unused   %s", line)
    for line in resumed.differences:
        log.warning("weights  %s", printable(line))
    if spec.changes:
        log.info("changed  %s", ", ".join(f"{d.key} {d.before!r} -> {d.now!r}" for d in spec.changes))
    then = before.claim.get("topology") if before is not None else None
    if moves := topology_changes(then, here) if isinstance(then, dict) else []:
        log.warning("moved    %s: same samples, but floats may differ in the last bits", printable(", ".join(moves)))
    log.info("data     %s", stream.guarantee)
    if parts.parallelism.description:
        plan = parts.plan
        assert plan is not None, "iterable data was refused"
        each = f"{plan.micro_batches} micro-batch" + "es" * (plan.micro_batches > 1)
        share = f"{'up to ' * bool(plan.max_tokens)}{plan.batch_size // plan.slices_per_step} samples"
        log.info("parallel %s; each process takes %s of %s", parts.parallelism.description, each, share)
    workers = "auto" if stream.automatic else stream.workers
    log.info("device   %s, threads %d, data workers %s", here["device"], here["threads"], workers)
    log.info("model    %s parameters%s", f"{total:,}", "" if trainable == total else f", {trainable:,} of them trained")
    if groups := table(parts.update.optimizer):
        log.info("weights  as the optimizer has them:\n%s", indent(groups, " " * 9))


def _describe_start(resumed: Resumed, before: AttemptRecord | None) -> str:
    origin = resumed.origin
    if origin is not None:
        if origin.foreign:
            return printable(f"weights of {origin.run}")
        return printable(f"{'forked' if origin.start else 'weights'} from step {origin.step} of {origin.run}")
    if resumed.commit is None:
        if before is None:
            return "from scratch"
        return f"from scratch ({_outcome_text(before)} before its first checkpoint)"
    text = f"resumed from step {resumed.step} of attempt {resumed.commit.attempt}"
    step = before.beat.get("step") if before is not None else None
    if before is not None and isinstance(step, int) and step > resumed.step:
        text += f"; {_outcome_text(before)} at step {step} or later, {step - resumed.step} steps are repeated"
    return text


def _outcome_text(before: AttemptRecord) -> str:
    outcome = before.outcome()
    return f"attempt {before.number} {'' if outcome in ('failed', 'diverged') else 'was '}{outcome}"


@doing("saves")
def finish(
    spec: RunSpec,
    parts: Parts,
    setup: TrainingSetup,
    loop: Loop,
    comm: Communicator,
    attempt: Attempt | None,
    patience: float,
) -> dict[str, Any]:
    """Export the weights, evaluate the test data, and declare the run finished; returns its result. Safe to
    repeat after a kill. A storage that fails is tried again for ``patience`` seconds.
    """
    live = parts.state.evaluated_model.state_dict()
    weights = {saved_name(name): parts.parallelism.full_tensor(tensor) for name, tensor in live.items()}
    result = retry_export(lambda: _export(spec, parts, setup, loop, weights), attempt, patience, comm)
    result["metrics"] |= _test_report(parts, setup, result, comm)

    def declare() -> dict[str, Any]:
        tensorboard.declare_finished(spec.directory.location, spec.directory.experiment, spec.identity)
        spec.directory.finish(spec.identity, result)
        return result

    return retry_export(declare, attempt, patience, comm)


def _test_report(parts: Parts, setup: TrainingSetup, result: dict[str, Any], comm: Communicator) -> dict[str, Any]:
    """The report on the test data with the best weights by the objective, or the last."""
    if not parts.evaluator.test:
        return {}
    state, step = parts.state, (result["objective"] or result)["step"]
    unused = {*state.parts()} - {"model", "average", "task"}  # by an evaluation
    try:
        if step != result["step"]:
            read_step(setup.store, step, lambda checkpoint: state.restore(checkpoint, without=unused), comm)
    except Damaged as error:
        log.warning("data.test is not evaluated: step %d was the best, but %s", step, error)
        return {}
    report = parts.evaluator.evaluate_test(state.evaluated_model)
    log.info("test     step %d: %s", step, numbers_text(report))
    return {name: _number(value) for name, value in report.items() if not isinstance(value, str)}


def retry_export(
    work: Callable[[], dict[str, Any]], attempt: Attempt | None, patience: float, comm: Communicator
) -> dict[str, Any]:
    """The result of ``work`` on rank 0, which has the ``attempt``. While the storage fails, the work is tried again for
    ``patience`` seconds, with growing pauses. Raises StorageError, Superseded, RunGone and Interrupted.
    """
    began, next_try, pause = 0.0, 0.0, 1.0

    def work_once() -> dict[str, Any] | None:
        nonlocal began, next_try, pause
        assert attempt is not None, "rank 0 has it"
        if time.monotonic() < next_try:
            signals.raise_if_received("while the weights could not be exported; every step is committed")
            time.sleep(_POLL_SECONDS)
            return None
        try:
            attempt.require_newest()
            return work()
        except StorageError as error:
            began = began or time.monotonic()
            left = began + patience - time.monotonic()
            if left <= 0 or error.kind == StorageError.LASTING:
                raise StorageError(
                    f"the weights could not be exported: {error}.\nEvery step is committed; fix the storage and run "
                    f"the same command again (checkpoint.max_unsaved={patience:g})."
                ) from error
            text = "the weights could not be exported: %s. Trying again in %.0f seconds, for another %.0f"
            log.warning(text, printable(error), pause, left)
            next_try, pause = time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE)
            return None

    result: dict[str, Any] | None = None
    while result is None:  # an exchange for each try, so that waiting ranks do not run into a timeout
        result = on_rank_zero(comm, work_once)
    return result


def _export(
    spec: RunSpec, parts: Parts, setup: TrainingSetup, loop: Loop, final: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Write the last weights, and the best by the objective; returns the result without that of the test data."""
    weights, objective = {MODEL: final}, None
    evaluate, best = setup.callbacks.get("evaluate"), setup.callbacks.get("best")
    scalars = evaluate.scalars if isinstance(evaluate, Evaluate) else {}
    if isinstance(best, Best) and best.step:
        objective = {"metric": best.metric, "mode": best.mode, "value": _number(best.value), "step": best.step}
        try:
            is_last = best.step == loop.step
            weights[BEST] = final if is_last else read_step(setup.store, best.step, evaluated_weights)
        except Damaged as error:
            log.warning("%s is not written: step %d was the best, but %s", BEST, best.step, error)
    files = {name: export(spec.directory.location, name, tensors) for name, tensors in weights.items()}
    return {
        "step": loop.step,
        "epochs": loop.epochs,
        "reason": loop.stop,
        "metrics": {name: _number(value) for name, value in scalars.items()},
        "objective": objective,
        "skipped_steps": parts.update.skipped,
        "substituted_samples": parts.state.stream.substituted,
        "seconds": loop.elapsed,
        "sha256": {name: digest for name, (digest, _) in files.items()},
        "bytes": {name: size for name, (_, size) in files.items()},
    }


def export(location: Location, name: str, weights: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write weights as a plain safetensors file; returns its sha256 and its size."""
    hasher, size = sha256_hasher(), 0

    def hashed() -> Iterator[Buffer]:
        nonlocal size
        for chunk in safetensors_file(weights):
            hasher.update(chunk)
            size += memoryview(chunk).nbytes
            yield chunk

    location.replace(name, hashed())
    return hasher.hexdigest(), size


def safetensors_file(weights: Mapping[str, Tensor]) -> Iterator[Buffer]:
    """The bytes of a safetensors file that anyone can load. Shared tensors are written under each name, for strict
    loading. Warns of a module's extra state, which has no place in the file.
    """
    tensors = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    if other := [name for name in weights if name not in tensors]:
        log.warning("exported without %s: only tensors fit into a safetensors file", printable(", ".join(other)))
    return SafetensorsFile(tensors, metadata={"format": "pt"}).chunks()


def _number(value: float) -> float | None:
    """The value for JSON: None in place of NaN and infinity."""
    return value if math.isfinite(value) else None

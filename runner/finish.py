"""The end of a run: weights that anyone can load, and the result."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from runner import signals
from runner.activity import doing
from runner.build import Parts
from runner.callbacks.base import Callback, Loop
from runner.callbacks.evaluate import Best, Evaluate
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.structure import saved_name
from runner.checkpoint.tensor_file import Damaged, SafetensorsFile
from runner.distributed.communicator import Communicator, on_rank_zero
from runner.errors import StorageError, printable
from runner.hashing import sha256_hasher
from runner.metrics import tensorboard
from runner.restore import evaluated_weights, restore_evaluated
from runner.run.attempts import Attempt
from runner.run.directory import BEST, MODEL
from runner.run.opening import OpenedRun
from runner.storage.location import Buffer, Location

log = logging.getLogger("runner")

Weights = Mapping[str, Tensor]

_LONGEST_PAUSE = 30.0  # seconds between two tries to export
_POLL_SECONDS = 0.5  # while waiting for the next try


@doing("saves")
def finish(
    opening: OpenedRun,
    parts: Parts,
    store: CheckpointStore,
    callbacks: Mapping[str, Callback],
    loop: Loop,
    comm: Communicator,
    attempt: Attempt | None,
    patience: float,
) -> dict[str, Any]:
    """Export the weights, evaluate the test data, and declare the run finished; returns its result. Safe to
    repeat after a kill.

    A storage that fails is tried again for ``patience`` seconds. ``attempt`` is that of rank 0, which alone writes.
    """
    live = parts.state.evaluated_model.state_dict()
    weights = {saved_name(name): parts.parallelism.full_tensor(tensor) for name, tensor in live.items()}

    def tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        tries = Retries(attempt, patience, work)  # type: ignore[arg-type]  # rank 0 alone tries, and has an attempt
        result: dict[str, Any] | None = None
        while result is None:  # an exchange for each try, so that waiting ranks do not run into a timeout
            result = on_rank_zero(comm, tries.next)
        return result

    result = tried(partial(_export, opening, parts, store, callbacks, loop, weights))
    result["metrics"] |= _measured(parts, store, result, comm)
    return tried(partial(_declare, opening, result))


def _measured(parts: Parts, store: CheckpointStore, result: dict[str, Any], comm: Communicator) -> dict[str, Any]:
    """The report on the test data with the best weights by the objective, or the last."""
    if not parts.evaluator.test:
        return {}
    step = (result["objective"] or result)["step"]
    if step != result["step"] and (why := restore_evaluated(parts.state, store, step, comm)):
        log.warning("data.test is not evaluated: step %d was the best, but %s", step, why)
        return {}
    report = parts.evaluator.measure(parts.state)
    log.info("test     step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in report.items() if isinstance(v, float)))
    return {name: _number(value) for name, value in report.items() if not isinstance(value, str)}


@dataclass
class Retries:
    """Tries to export, with growing pauses between them."""

    attempt: Attempt
    patience: float
    work: Callable[[], dict[str, Any]]
    _failed_since: float | None = None
    _pause: float = 1.0
    _next_try: float = 0.0

    def next(self) -> dict[str, Any] | None:
        """The result of a try; None if the try failed, or before it is time for the next.

        Raises StorageError, Superseded, RunGone, and Interrupted.
        """
        if time.monotonic() < self._next_try:
            signals.raise_if_received("while the weights could not be exported; every step is committed")
            time.sleep(_POLL_SECONDS)
            return None
        try:
            self.attempt.require_newest()
            return self.work()
        except StorageError as error:
            self._failed_since = self._failed_since or time.monotonic()
            left = self._failed_since + self.patience - time.monotonic()
            if left <= 0:
                raise StorageError(
                    f"the weights could not be exported: {error}.\nEvery step is committed; fix the storage and run "
                    f"the same command again (checkpoint.max_unsaved={self.patience:g})."
                ) from error
            text = "the weights could not be exported: %s. Trying again in %.0f seconds, for another %.0f"
            log.warning(text, printable(error), self._pause, left)
            self._next_try = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return None


def _export(
    opening: OpenedRun,
    parts: Parts,
    store: CheckpointStore,
    callbacks: Mapping[str, Callback],
    loop: Loop,
    final: Weights,
) -> dict[str, Any]:
    location = opening.directory.location
    weights = {MODEL: final}
    evaluate, best = callbacks.get("evaluate"), callbacks.get("best")
    scalars = evaluate.scalars if isinstance(evaluate, Evaluate) else {}
    objective = None
    if isinstance(best, Best) and best.step:
        objective = {"metric": best.metric, "mode": best.mode, "value": _number(best.value), "step": best.step}
        best_weights = final if best.step == loop.step else _weights_at(store, best.step)
        if best_weights is not None:
            weights[BEST] = best_weights
    exported = {name: export(location, name, tensors) for name, tensors in weights.items()}
    return {
        "step": loop.step,
        "epochs": loop.epochs,
        "reason": loop.stop,
        "metrics": {name: _number(value) for name, value in scalars.items()},
        "objective": objective,
        "skipped_steps": parts.update.skipped,
        "substituted_samples": parts.state.stream.substituted,
        "seconds": loop.elapsed,
        "sha256": {name: digest for name, (digest, _) in exported.items()},
        "bytes": {name: size for name, (_, size) in exported.items()},
    }


def _declare(opening: OpenedRun, result: dict[str, Any]) -> dict[str, Any]:
    tensorboard.declare_finished(opening.directory.location, opening.directory.experiment, opening.identity)
    opening.directory.finish(opening.identity, result)
    return result


def export(location: Location, name: str, weights: Weights) -> tuple[str, int]:
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


def safetensors_file(weights: Weights) -> Iterator[Buffer]:
    """The bytes of a safetensors file that anyone can load. Shared tensors are written under each name, for strict
    loading. Warns of a module's extra state, which has no place in the file.
    """
    tensors = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    if left := [name for name in weights if name not in tensors]:
        log.warning("exported without %s: only tensors have a place in a safetensors file", printable(", ".join(left)))
    return SafetensorsFile(tensors, metadata={"format": "pt"}).chunks()


def _number(value: float) -> float | None:
    """The value for JSON: None in place of NaN and infinity."""
    return value if math.isfinite(value) else None


def _weights_at(store: CheckpointStore, step: int) -> dict[str, Tensor] | None:
    """The evaluated weights of the kept commit at ``step``; None, with a warning, if they are damaged."""
    reasons = ["its checkpoint is gone"]
    for commit in (each for each in store.commits() if each.step == step):
        try:
            return evaluated_weights(store.open(commit))
        except Damaged as error:
            reasons.append(str(error))
    log.warning("%s is not written: step %d was the best, but %s", BEST, step, reasons[-1])
    return None

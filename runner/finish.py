"""The end of a run: weights that anyone can load, and the result."""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from runner.agreement import led
from runner.build import Parts
from runner.callbacks.base import Callback, Loop
from runner.callbacks.evaluate import Best, Evaluate
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensors import Damaged, SafetensorsFile
from runner.errors import printable
from runner.metrics import hparams
from runner.ranks import Ranks
from runner.restore import evaluated_weights
from runner.run.directory import BEST, MODEL, TENSORBOARD
from runner.run.opening import Opening
from runner.storage.location import Buffer, Location

log = logging.getLogger("runner")


def finish(
    opening: Opening,
    parts: Parts,
    store: CheckpointStore,
    callbacks: Mapping[str, Callback],
    loop: Loop,
    ranks: Ranks,
) -> dict[str, Any]:
    """Export the weights and declare the run finished; returns its result. Safe to repeat after a kill."""
    state = parts.state
    weights = {name: parts.layout.whole(tensor) for name, tensor in state.evaluated_model.state_dict().items()}
    result: dict[str, Any] = led(ranks, lambda: _finish(opening, parts, store, callbacks, loop, weights))
    return result


def _finish(
    opening: Opening,
    parts: Parts,
    store: CheckpointStore,
    callbacks: Mapping[str, Callback],
    loop: Loop,
    final: Mapping[str, Tensor],
) -> dict[str, Any]:
    location = opening.directory.location
    weights = {MODEL: final}
    evaluate, best = callbacks.get("evaluate"), callbacks.get("best")
    goal = None
    if isinstance(best, Best) and best.step:
        goal = {"metric": best.metric, "mode": best.mode, "value": _number(best.value), "step": best.step}
        found = weights[MODEL] if best.step == loop.step else _weights_at(store, best.step)
        if found is not None:
            weights[BEST] = found
    result = {
        "step": loop.step,
        "epochs": loop.epochs,
        "reason": loop.stop,
        "metrics": {n: _number(v) for n, v in evaluate.scalars.items()} if isinstance(evaluate, Evaluate) else {},
        "objective": goal,
        "skipped_steps": parts.update.skipped,
        "substituted_samples": parts.state.stream.substituted,
        "seconds": loop.elapsed,
        "sha256": {name: export(location, name, tensors) for name, tensors in weights.items()},
    }
    hparams.write(location, TENSORBOARD, opening.directory.experiment, opening.identity, finished=True)
    opening.directory.finish(opening.identity, result)
    return result


def export(location: Location, name: str, weights: Mapping[str, Tensor]) -> str:
    """Write weights as a plain safetensors file; returns its sha256."""
    hasher = hashlib.sha256()

    def hashed() -> Iterator[Buffer]:
        for chunk in plain(weights):
            hasher.update(chunk)
            yield chunk

    location.replace(name, hashed())
    return hasher.hexdigest()


def plain(weights: Mapping[str, Tensor]) -> Iterator[Buffer]:
    """The bytes of a safetensors file that anyone can load. Shared tensors are written under each name, for strict
    loading; a module's extra state has no place in it, which is told.
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
    for commit in store.commits():
        if commit.step == step:
            try:
                return evaluated_weights(store.open(commit))
            except Damaged as error:
                reasons.append(str(error))
    log.warning("%s is not written: step %d was the best, but %s", BEST, step, reasons[-1])
    return None

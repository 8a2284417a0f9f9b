"""Whether a run used every sample exactly once per epoch, from its ledger."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from runner.checkpoint import manifest
from runner.data import ledger
from runner.data.exactly_once import Proof, prove
from runner.data.plan import Plan
from runner.errors import ConfigError
from runner.run.directory import RunDirectory
from runner.run.parent import ParentRecord
from runner.runs import listing
from runner.runs.listing import guarded, integer


def audit(directory: RunDirectory) -> tuple[Proof, dict[str, Any]]:
    """The proof, and the same as plain values. Raises ConfigError for a run without a ledger."""
    location = directory.location
    segments = ledger.segments(location)
    if not segments:
        raise ConfigError(f"{location.url} has no ledger; nothing was trained in it yet, or by an older version")
    plans = [segment.plan for segment in segments if segment.plan]
    recipe = ledger.recipe(location, plans[-1] if plans else "")
    origin = ParentRecord.of(directory)
    with guarded(f"the ledger of {location.url}"):
        proof = prove(
            segments,
            None if recipe.get("kind") == "opaque" else Plan.of(recipe),
            begun=origin.start if origin else 0,
            committed=_committed(directory),
        )
    if len({*plans}) > 1:
        proof.problems.append(f"{len({*plans})} plans of the data are in one ledger; judged by the newest")
    about = {
        "run": directory.name,
        "steps": proof.steps,
        "positions": proof.positions,
        "attempts": len({segment.attempt for segment in segments}),
        "indexed": recipe.get("kind") != "opaque",
        "holds": proof.holds,
        "epochs": proof.epochs,
        "again": proof.again,
        "problems": proof.problems,
        "damaged": [segment.damage for segment in segments if segment.damage],
    }
    return proof, about


def text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    told = [f"{found['run']}: {found['steps']} steps, {found['positions']} samples, {found['attempts']} attempts\n"]
    if found["indexed"]:
        columns = ["source"] * ("source" in found["epochs"][0]) if found["epochs"] else []
        columns += ["epoch", "seen", "repeated", "missed", "substituted", "whole"]
        told.append(listing.table(_folded(found["epochs"]), columns))
    else:
        told.append("The data is an iterable: which samples it yielded, repeated or left out is not known here.")
    steps, samples, differing = found["again"].values()
    told.append(f"\nDone again after kills: {steps} steps, {samples} samples, {differing} differing.")
    told += found["damaged"]  # no problem where those steps were done again
    good = "Every sample exactly once in every whole epoch."
    if not any(row["whole"] for row in found["epochs"]):
        good += " None is whole yet: nothing was repeated, and what will be missed is not known."
    good = good if found["indexed"] else "No step differed when done again."
    return "\n".join([*told, *(found["problems"] or [good])])


def _folded(epochs: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows, with one row for each range of epochs that differ in nothing but their number."""
    for _, alike in groupby(epochs, key=lambda row: {**row, "epoch": None}):
        first, *others = alike
        yield {**first, "epoch": f"{first['epoch']} to {others[-1]['epoch']}"} if others else first


def _committed(directory: RunDirectory) -> int:
    result = directory.result(directory.identity() or {}) or {}
    commits = manifest.commits(directory.location)
    return max(integer(result.get("step")) or 0, commits[0].step if commits else 0)

"""Commands for the checkpoints of a run: prune removes old checkpoints by the same rules as training, and export writes
the weights of a checkpoint as a file that anyone can load.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.checkpoint.manifest import CommitId, parse_data
from runner.checkpoint.store import CheckpointStore, CommitInfo, Retention
from runner.checkpoint.tensor_file import Damaged
from runner.config.schema import LEAST_KEPT
from runner.errors import ConfigError
from runner.experiment import safetensors_file
from runner.hashing import sha256_digest
from runner.restore import evaluated_weights, load_model, load_task, read
from runner.run import attempts
from runner.run.directory import RunDirectory
from runner.run.parent import CheckpointRef
from runner.run_facts import RunFacts
from runner.runs.listing import format_table
from runner.storage import files
from runner.storage.location import is_remote, local_root


def prune(run: RunDirectory, *, last: int, every_steps: int | None, best: int, remove: bool) -> list[dict[str, Any]]:
    """All checkpoints, the newest first, with whether each is kept and why. ``remove`` removes the others, once all
    bytes of two checkpoints to keep are verified. Raises ConfigError, and RunInUse while a process works on the run.
    """
    for name, value, least in (("last", last, LEAST_KEPT), ("every-steps", every_steps, 1), ("best", best, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} is too small: at least {least}")
    facts = RunFacts(run)
    objective, newest = facts.identity.get("objective") or {}, facts.newest
    retention = Retention(last, every_steps, best, objective.get("mode") if objective.get("metric") else None)
    attempts.raise_if_live(run.location)
    store = CheckpointStore(run.location)
    # Two commits to keep have to be verified before others go. A damaged commit changes which commits are kept.
    while remove and len(store.verified) < LEAST_KEPT:
        unproven = {*retention.reasons(_survey(store))} - store.verified - store.damaged
        if not unproven:
            break  # there are fewer than two commits, so everything is kept
        newest_unproven = max(unproven)
        try:
            store.open(newest_unproven).verify()
            store.verified.add(newest_unproven)
        except Damaged:
            store.damaged.add(newest_unproven)
    commits = _survey(store)
    reasons = retention.reasons(commits)
    sizes = Counter[CommitId | None]()
    for entry in store.location.list("data"):
        sizes[parse_data(entry.name)] += entry.size
    if remove:  # files of a process that starts meanwhile belong to a newer attempt and are kept
        store.remove([commit.id for commit in commits], {*reasons}, attempt=newest.number + 1 if newest else 0)
    rows = []
    for commit in commits:
        row = {"commit": str(commit.id), "step": commit.id.step, "objective": commit.objective}
        why = reasons.get(commit.id, "damaged" if commit.damaged else "older")
        rows.append({**row, "size": sizes[commit.id], "keep": commit.id in reasons, "why": why})
    return rows


def format_prune(rows: Sequence[Mapping[str, Any]], *, removed: bool) -> str:
    """The rows as text."""
    sizes = [row["size"] for row in rows if not row["keep"]]
    verb = "Removed" if removed else "Nothing was changed. --yes would remove"
    table = format_table(rows, ["commit", "step", "objective", "size", "keep", "why"])
    return f"{table}\n\n{verb} {len(sizes)} of {len(rows)} checkpoints, {sum(sizes) / 1e6:.1f} MB."


def _survey(store: CheckpointStore) -> list[CommitInfo]:
    """All commits; a commit counts as verified if its manifest and the sizes of its files are right."""
    return [replace(commit, verified=not commit.damaged) for commit in store.survey()]


def export(run: str, target: str, *, force: bool, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the evaluated weights of ``run``, ``run@step`` or ``run@best``, every byte verified, to a path or URL."""
    source = CheckpointRef.parse(run)
    directory = RunDirectory.at(source.run, options)
    if not force and files.exists(target):
        raise ConfigError(f"{target} exists already; overwrite it with --force, or give another target")
    checkpoint, weights = read(directory, source.checkpoint, evaluated_weights)
    data = b"".join(safetensors_file(weights))
    files.write(target, data)
    origin = {"run": directory.location.url, "step": checkpoint.step, "commit": str(checkpoint.id)}
    return {**origin, "target": target, "bytes": len(data), "sha256": sha256_digest(data)}


def export_pretrained(
    run: str, folder: str, *, force: bool, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a model of transformers, diffusers or PEFT to a folder for its ``from_pretrained``, with the tokenizer and
    the like that are attributes of the task. Of a model with adapters, the adapters alone are written. The checkpoint
    is chosen as for ``export``. Raises ConfigError for another model, and for a folder that has files already.
    """
    source, target = CheckpointRef.parse(run), Path(local_root(folder))
    if is_remote(folder):
        raise ConfigError(f"{folder} is not a local folder, which the libraries write to; copy it from there")
    if not force and target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{folder} has files already; overwrite them with --force, or give another folder")
    directory, which = RunDirectory.at(source.run, options), source.checkpoint or "last"
    facts = RunFacts(directory)
    model = load_model(facts, which)
    pretrained = next(filter(_is_pretrained, model.modules()), None)  # the outermost
    if pretrained is None:
        path = f"{type(model).__module__}.{type(model).__qualname__}"
        raise ConfigError(f"{path} has no save_pretrained: --hf is for models of transformers, diffusers and PEFT")
    for part in (pretrained, *filter(_is_pretrained, vars(load_task(facts, which)).values())):
        part.save_pretrained(folder)
    checkpoint, _ = read(directory, source.checkpoint, lambda _: None)
    origin = {"run": directory.location.url, "step": checkpoint.step, "commit": str(checkpoint.id)}
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    return {**origin, "target": folder, "files": len(sizes), "bytes": sum(sizes)}


def _is_pretrained(part: Any) -> bool:
    return callable(getattr(type(part), "save_pretrained", None))

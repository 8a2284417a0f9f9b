"""The weights of one checkpoint, as a file that anyone can load."""

from collections.abc import Mapping
from typing import Any

from runner.errors import ConfigError
from runner.finish import safetensors_file
from runner.hashing import sha256_digest
from runner.restore import evaluated_weights, read
from runner.run.directory import RunDirectory
from runner.run.opening import CheckpointRef
from runner.storage import files


def export(run: str, target: str, *, force: bool) -> dict[str, Any]:
    """Write the evaluated weights of ``run``, ``run@step`` or ``run@best`` to a path or URL; every byte was verified.

    Raises ConfigError for a step that is not there, and for a target that is there unless ``force``;
    NoLoadableCheckpoint; StorageError.
    """
    source = CheckpointRef.parse(run)
    directory = RunDirectory.at(source.run)
    if not force and files.exists(target):
        raise ConfigError(f"{target} exists already; overwrite it with --force, or give another target")
    checkpoint, weights = read(directory, source.checkpoint, evaluated_weights)
    data = b"".join(safetensors_file(weights))
    files.write(target, data)
    return {
        "run": directory.location.url,
        "step": checkpoint.step,
        "commit": str(checkpoint.id),
        "target": target,
        "bytes": len(data),
        "sha256": sha256_digest(data),
    }


def format_export(exported: Mapping[str, Any]) -> str:
    """The values of ``export`` as text."""
    return f"step {exported['step']} of {exported['run']}: {exported['bytes']} bytes, sha256 {exported['sha256']}"

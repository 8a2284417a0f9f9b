"""What a run leaves behind, gathered in the process that has the credentials for its storage; and its removal."""

from typing import Any

from runner.checkpoint.manifest import CommitId
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensors import Damaged
from runner.metrics import lines
from runner.run import records
from runner.run.directory import RunDirectory
from runner.runs.audit import audit
from runner.verify.fingerprint import fingerprint

_FOLDERS = ("tensorboard", "ledger", "metrics", "data", "commits", "attempts", "")


def collect(directory: RunDirectory) -> dict[str, Any]:
    """Checkpoints by step, metric lines, result and audit of a finished run, as plain values."""
    store = CheckpointStore(directory.location)
    proof, audited = audit(directory)
    result = directory.result(directory.identity() or {}) or {}
    return {
        "url": directory.location.url,
        "checkpoints": {str(commit.step): _checkpoint(store, commit) for commit in reversed(store.commits())},
        "lines": [
            {tag: value for tag, value in line.items() if not tag.startswith("time/")}
            for line in lines.read(directory.location)
        ],
        "result": {key: value for key, value in result.items() if key != "seconds"},
        "audit": audited | {"holds": proof.holds},
        "attempts": [record.outcome() for record in records.history(directory.location)],
    }


def remove(directory: RunDirectory) -> None:
    """Remove every object of the run, one by one by its exact name."""
    for folder in _FOLDERS:
        for entry in directory.location.list(folder):
            directory.location.remove(f"{folder}/{entry.name}" if folder else entry.name)


def _checkpoint(store: CheckpointStore, commit: CommitId) -> dict[str, str]:
    """What a checkpoint holds, with every byte verified."""
    try:
        found = store.open(commit)
        return fingerprint({part: found.load(part) for part in found.parts})
    except Damaged as error:
        return {"damaged": str(error)}

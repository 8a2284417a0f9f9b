"""What can be said of a run from its directory alone."""

from dataclasses import asdict, dataclass
from typing import Any

from runner.checkpoint import manifest
from runner.errors import ConfigError
from runner.run import records
from runner.run.directory import RunDirectory
from runner.storage import find_folders

_MARKER = "run.json"


@dataclass(frozen=True, slots=True)
class Overview:
    """One run in a line. ``step`` is the last committed one; ``seen`` is when its process last showed itself."""

    run: str
    status: str
    step: int
    max_steps: int | None
    objective: float | None
    attempts: int
    seen: str | None
    host: str | None


def find(root: str) -> list[RunDirectory]:
    """All runs under a root. Raises ConfigError when there is none."""
    found = [RunDirectory.at(f"{root}/{folder}") for folder in find_folders(root, _MARKER) if folder != "."]
    if not found:
        raise ConfigError(f"no runs under {root}; give the run.root of the runs you mean")
    return found


def overview(directory: RunDirectory) -> Overview:
    """One run in a line."""
    identity = directory.identity() or {}
    result = directory.result(identity) or {}
    newest = records.last(directory.location)
    commits = manifest.commits(directory.location)
    return Overview(
        run=directory.name,
        status="complete" if result else newest.outcome() if newest else "new",
        step=result.get("step", commits[0].step if commits else 0),
        max_steps=(identity.get("trainer") or {}).get("max_steps"),
        objective=(result.get("objective") or {}).get("value"),
        attempts=newest.number if newest else 0,
        seen=newest.seen() if newest else None,
        host=newest.claim.get("host") if newest else None,
    )


def details(directory: RunDirectory) -> dict[str, Any]:
    """Everything about one run, as plain values."""
    identity = directory.identity() or {}
    return {
        **asdict(overview(directory)),
        "url": directory.location.url,
        "record": directory.record(),
        "identity": identity,
        "result": directory.result(identity),
        "attempts": [_attempt(record) for record in records.history(directory.location)],
        "checkpoints": [asdict(commit) for commit in manifest.commits(directory.location)],
    }


def _attempt(record: records.Record) -> dict[str, Any]:
    end = record.end or {}
    return {
        "attempt": record.number,
        "outcome": record.outcome(),
        "reason": end.get("reason"),
        "resumed": record.beat.get("resumed"),
        "step": record.beat.get("step"),
        "committed": record.beat.get("committed"),
        "unusable": record.beat.get("unusable"),
        "seen": record.seen(),
        **{key: record.claim.get(key) for key in ("started", "host", "pid", "overrides", "topology", "version")},
    }

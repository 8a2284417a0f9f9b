"""What two runs must have in common to the bit."""

import json
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from runner.checkpoint.manifest import commits, unseal
from runner.storage.local import LocalLocation


@dataclass(frozen=True)
class Results:
    """Exported weights, metric lines without what depends on the clock, the whole final state, and the result."""

    weights: dict[str, str]
    lines: list[dict[str, Any]]
    parts: dict[str, Any]
    tensors: dict[str, str]
    result: dict[str, Any]

    def differences(self, other: "Results") -> list[str]:
        """What is not equal, by name."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]


def results(folder: Path) -> Results:
    """The results of a finished run."""
    location = LocalLocation(folder)
    manifest = unseal((folder / commits(location)[0].commit).read_bytes())
    assert manifest is not None
    result = json.loads((folder / "result.json").read_text())
    return Results(
        weights={path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))},
        lines=metric_lines(folder),
        parts=manifest["parts"],
        tensors={name: tensor["digest"] for name, tensor in manifest["tensors"].items()},
        result={key: value for key, value in result.items() if key != "seconds"},
    )


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """All metric lines in order of file name, as anyone would read them."""
    text = "".join(path.read_text() for path in sorted((folder / "metrics").glob("*.jsonl")))
    lines = [json.loads(line) for line in text.splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith("time/")} for line in lines]

"""What two runs must have in common to the bit."""

import json
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import commits
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.tensor_file import bytes_of
from runner.rng import Generators
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
    checkpoint = CheckpointStore(location).open(commits(location)[0])
    result = json.loads((folder / "result.json").read_text())
    return Results(
        weights={path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))},
        lines=metric_lines(folder),
        parts=checkpoint.parts,
        tensors={
            name: sha256(bytes_of(tensor.contiguous())).hexdigest()
            for part in checkpoint.parts
            for name, tensor in checkpoint.tensors_of(part).items()
        },
        result={key: value for key, value in result.items() if key != "seconds"},
    )


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """All metric lines in order of file name, as anyone would read them."""
    text = "".join(path.read_text() for path in sorted((folder / "metrics").glob("*.jsonl")))
    lines = [json.loads(line) for line in text.splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith("time/")} for line in lines]


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of metrics that has a loss."""
    return [(line["step"], line["train/loss"]) for line in metric_lines(folder) if "train/loss" in line]


def generator_bits() -> str:
    """Every bit of every global generator."""
    value, tensors = encode(Generators().state_dict(), "")
    return json.dumps([value, {name: tensor.tolist() for name, tensor in tensors.items()}])

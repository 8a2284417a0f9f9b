"""The parent of a run, from whose checkpoint it starts: as a command asks for it, and as the run recorded it. A parent
may also be weights of another program: a safetensors file, or a local folder of Hugging Face.
"""

import json
import mmap
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, DriftRefused, StorageError
from runner.hashing import checksum
from runner.run.directory import RunDirectory
from runner.storage.location import is_remote

_REFERENCE = re.compile(r"(.+)@([0-9]+|best)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A run (path or URL), and which of its checkpoints: a step, ``best`` by the objective, or None for the newest."""

    run: str
    checkpoint: int | str | None = None

    @classmethod
    def parse(cls, text: str) -> "CheckpointRef":
        """``<run>``, ``<run>@<step>`` or ``<run>@best``."""
        match = _REFERENCE.fullmatch(text)
        return cls(match[1], match[2] if match[2] == "best" else int(match[2])) if match else cls(text)

    def under(self, root: str) -> "CheckpointRef":
        """With a path relative to ``root`` if the run is below it, which stays true when the root is moved."""
        return CheckpointRef(self.run.removeprefix(f"{root.rstrip('/')}/"), self.checkpoint)

    def __str__(self) -> str:
        return self.run if self.checkpoint is None else f"{self.run}@{self.checkpoint}"


@dataclass(frozen=True, slots=True)
class Parent:
    """The checkpoint from which a new run is to start. ``asked`` is the command's ``run.parent``, relative to
    ``run.root`` if it is below it; None for a fork after drift. ``options`` are for a remote storage.
    """

    source: CheckpointRef
    inherit: str  # model, all
    asked: str | None = None
    load: str = "strict"  # matching, strict
    options: Mapping[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def forked(cls, directory: RunDirectory) -> "Parent":
        """The parent of a fork of a run."""
        return cls(CheckpointRef(directory.location.url), inherit="all", options=directory.options)


@dataclass(frozen=True, slots=True)
class ParentRecord:
    """The parent as recorded in the ``run.json`` of its child: one particular commit of the run ``run``, or the digest
    of the weights at that path.
    """

    run: str
    step: int
    commit: str
    inherit: str
    asked: str | None
    load: str = "strict"  # runs of earlier versions do not say

    @classmethod
    def of(cls, directory: RunDirectory) -> "ParentRecord | None":
        """The recorded parent; None for a run that started from scratch or does not exist."""
        record: Mapping[str, Any] | None = (directory.record() or {}).get("parent")
        if record is None:
            return None
        try:
            load = str(record.get("load", "strict"))
            return cls(record["run"], int(record["step"]), record["commit"], record["inherit"], record["asked"], load)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise StorageError(f"{directory.location.url}/run.json has an unusable parent: {record}") from error

    @property
    def foreign(self) -> bool:
        """Whether another program wrote the weights."""
        return self.commit.startswith("xxh3:")

    def unchanged_files(self, asked: Parent | None) -> list[Path]:
        """The files of foreign weights, where the command has them now; none if they are gone. Raises DriftRefused."""
        where = self.run if asked is None else asked.source.run
        files = weight_files(where)
        if files and (now := digest_of(files)) != self.commit:
            raise DriftRefused(
                f"{where} is not what the run started from: its digest was {self.commit}, and is {now}.\n"
                "Restore it, or start a new run with run.name=..."
            )
        return files

    @property
    def weights_only(self) -> bool:
        """Whether the run started at step 0 with the parent's weights; else it continued from the parent's state."""
        return self.foreign or self.inherit == "model"

    @property
    def start(self) -> int:
        """The step after which the run started."""
        return 0 if self.weights_only else self.step


def weight_files(path: str) -> list[Path]:
    """The weights at a path of this machine: a safetensors file, or all files of a folder in Hugging Face's layout.
    Empty for anything else, such as a run. Raises ConfigError.
    """
    folder = Path(path)
    if is_remote(path) or (folder / "run.json").exists():
        return []
    if folder.suffix == ".safetensors" and folder.is_file():
        return [folder]
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted({*json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"run.parent: {index} cannot be read: {error!r}") from error
        # A name with a folder in it could lead to any file of this machine.
        if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
            raise ConfigError(f"run.parent: {index} names {missing[0]}, which is not beside it")
        return [folder / name for name in names]
    if (folder / "config.json").is_file() and not whole.is_file():
        remedy = "Save it with save_pretrained, which writes safetensors"
        raise ConfigError(f"run.parent: {folder} has a config.json and no model.safetensors. {remedy}")
    return [whole] if whole.is_file() else []


def digest_of(files: Sequence[Path]) -> str:
    """A digest of the contents of files, in their order."""
    digests = []
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            view = memoryview(content)
            digests.append(checksum(view).encode())
            view.release()
    return checksum(*digests)


def new_run_hint(command: str, directory: RunDirectory, step: int) -> str:
    """The part of a message that offers a step of a run for a new run, with a command to be pasted into a shell."""
    name, run = f"{directory.variant[:140]}-{step}", directory.location.url.replace("\\", r"\\").replace('"', r"\"")
    overrides = [f'run.name="{name}"', f'run.parent="{run}@{step}"', "run.inherit=all"]
    return f"A new run can begin from its step {step}:\n  {command} {shlex.join(overrides)}"

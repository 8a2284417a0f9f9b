"""Parts <-> committed checkpoints under a location. No policy of when, no training.

The invariants, on which every resume rests: a manifest names only objects whose puts returned before it was written; no
object is written twice; bytes are handed out only after their digest matched; removal takes the manifest first.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from runner.checkpoint import manifest as manifests
from runner.checkpoint import tensors as files
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.retention import Kept, Retention
from runner.checkpoint.tensors import Damaged, SafetensorsFile, Stored, StoredFile
from runner.checkpoint.tree import decode, encode, names_in
from runner.errors import StateError, StorageError, Superseded
from runner.storage.location import Location

MAX_TENSORS = 1 << 18  # of a checkpoint; about as many as the bytes of a manifest have room for


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state at a step, as it will be committed: JSON by part, and tensors by name."""

    step: int
    parts: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, step: int, parts: Mapping[str, Any], **facts: Any) -> "Snapshot":
        """Encode the state dicts of ``parts``. Raises StateError for what cannot be restored exactly."""
        encoded = {name: encode(state, name) for name, state in parts.items()}
        tensors = {name: tensor for _, found in encoded.values() for name, tensor in found.items()}
        return cls(step, {name: value for name, (value, _) in encoded.items()}, tensors, encode(facts, "facts")[0])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A commit whose manifest unsealed and whose data files are there in full size; tensors are verified as they are
    read.
    """

    id: CommitId
    files: dict[str, StoredFile]
    parts: dict[str, Any]
    tensors: dict[str, Stored]
    facts: dict[str, Any]
    location: Location

    @property
    def step(self) -> int:
        return self.id.step

    def load(self, part: str) -> Any:
        """The state dict of one part. Raises Damaged; nothing that failed its digest is returned."""
        try:
            return decode(self.parts[part], self.tensors_of(part).__getitem__)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, StateError) as error:
            raise Damaged(f"{self.id.commit} has no state of {part} that can be read: {error!r}") from error

    def tensors_of(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part by their names in the checkpoint."""
        names = names_in(self.parts[part])
        if len({*names}) < len(names):  # a few bytes of references could stand for any amount of memory
            raise ValueError("a tensor is named twice")
        missing = next((name for name in names if name not in self.tensors), None)
        if missing is not None:
            raise Damaged(f"{self.id.commit} has no tensor {missing!r}")
        return files.read(self.location, {name: self.tensors[name] for name in names})

    def verify(self) -> None:
        """Read every byte, one tensor at a time. Raises Damaged."""
        for name, stored in self.tensors.items():
            files.read(self.location, {name: stored})


class CheckpointStore:
    """The checkpoints of one run.

    ``damaged`` are commits that were found unusable, ``verified`` those that this process made or read in full.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.damaged: set[CommitId] = set()
        self.verified: set[CommitId] = set()
        self._objectives: dict[CommitId, float | None] = {}

    def commit(self, snapshot: Snapshot, *, attempt: int, successor: Callable[[], str | None]) -> CommitId:
        """Make the snapshot the newest checkpoint; durable and acknowledged once this returns.

        Raises Superseded if ``successor`` then names a newer attempt, which may have overlooked this commit.
        """
        if len(snapshot.tensors) > MAX_TENSORS:
            raise StateError(f"cannot save {len(snapshot.tensors)} tensors; a checkpoint has at most {MAX_TENSORS}")
        commit = CommitId.new(attempt, snapshot.step)
        written = self._put(commit, snapshot)
        manifest = {
            "format": manifests.FORMAT,
            "attempt": attempt,
            "step": snapshot.step,
            "files": {name: _json(file) for name, (file, _) in written.items()},
            "tensors": {key: _json(entry) for _, stored in written.values() for key, entry in stored.items()},
            "parts": snapshot.parts,
            "facts": snapshot.facts,
        }
        self.damaged.add(commit)  # until its put returns: a torn manifest must not be retained for a good one
        self.location.put(commit.commit, [manifests.seal(manifest)])
        self.damaged.discard(commit)
        # Only after the manifest is visible: a newer attempt either sees this commit or is seen here.
        self.require_newest(successor)
        self.verified.add(commit)
        self._objectives[commit] = _objective(decode(snapshot.facts, _no_tensor))
        return commit

    def require_newest(self, successor: Callable[[], str | None]) -> None:
        """Raise Superseded if ``successor`` names a newer attempt."""
        newer = successor()
        if newer is not None:
            raise Superseded(
                f"{newer} took over {self.location.url}; this process stops. Its last checkpoint is not used."
            )

    def _put(self, commit: CommitId, snapshot: Snapshot) -> dict[str, tuple[StoredFile, dict[str, Stored]]]:
        """Write the tensors; the files by name, with what is in them."""

        def put(number: int, tensors: dict[str, Tensor]) -> tuple[str, tuple[StoredFile, dict[str, Stored]]]:
            file = SafetensorsFile(tensors, metadata={"step": str(snapshot.step)})
            name = commit.data(number)
            size = self.location.put(name, file.chunks())
            return name, (file.stored_file(size), file.stored(name))

        parts = files.split(snapshot.tensors, self.location.part_bytes)
        with ThreadPoolExecutor(self.location.parallel) as pool:
            return dict(pool.map(put, range(len(parts)), parts))

    def commits(self) -> list[CommitId]:
        """All commits, the one to resume from first."""
        return manifests.commits(self.location)

    def open(self, commit: CommitId) -> Checkpoint:
        """Read a commit's manifest and check that its files are there. Raises Damaged."""
        raw = self.location.read(commit.commit, limit=manifests.LIMIT)
        manifest = None if raw is None else manifests.unseal(raw)
        if manifest is None:
            raise Torn(f"{commit.commit} {manifests.why_not(raw or b'')}")
        if manifest.get("format") != manifests.FORMAT:
            raise StorageError(
                f"{self.location.url}/{commit.commit} has format {manifest.get('format')!r:.80}, this version reads "
                f"{manifests.FORMAT}. Use the version of hydra-runner that wrote it."
            )
        sizes = {f"data/{entry.name}": entry.size for entry in self.location.list("data")}
        checkpoint = _checked(commit, manifest, sizes, self.location)
        for name, file in checkpoint.files.items():
            files.check_header(self.location, name, file)
        return checkpoint

    def survey(self) -> list[Kept]:
        """What is known of every commit, the one to resume from first. Computed from a fresh listing."""
        return [self._known(commit) for commit in self.commits()]

    def retain(self, retention: Retention, *, attempt: int) -> None:
        """Remove the commits that do not stay, and what attempts before ``attempt`` left half done."""
        known = self.survey()
        self.remove([commit.id for commit in known], retention.kept(known), attempt=attempt)

    def _known(self, commit: CommitId) -> Kept:
        if commit not in self._objectives and commit not in self.damaged:  # once: manifests never change
            try:
                self._objectives[commit] = _objective(self.open(commit).facts)
            except Damaged:
                self.damaged.add(commit)
        return Kept(commit, commit in self.verified, commit in self.damaged, self._objectives.get(commit))

    def remove(self, listed: Sequence[CommitId], kept: Container[CommitId], *, attempt: int) -> None:
        """Remove the ``listed`` commits that are not ``kept``, and what attempts before ``attempt`` left half done."""
        for commit in sorted(listed):  # oldest first: of what is left the newest is always what a resume wants
            if commit not in kept:
                self.location.remove(commit.commit)  # before its data: a commit never names data that is gone
        for entry in self.location.list("data"):
            owner = manifests.parse_data(entry.name)
            if owner is not None and owner not in kept and (owner in listed or owner.attempt < attempt):
                self.location.remove(f"data/{entry.name}")


class Torn(Damaged):
    """A manifest that does not unseal: torn while it was written, so that it never was a commit, or damaged since."""


def _json(entry: StoredFile | Stored) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__slots__}  # asdict takes ten times as long


def _checked(commit: CommitId, manifest: dict[str, Any], sizes: dict[str, int], location: Location) -> Checkpoint:
    """The checkpoint that a manifest describes, if everything it names can be what it says."""
    try:
        found = {name: StoredFile(**file) for name, file in manifest["files"].items()}
        for name, file in found.items():
            if sizes.get(name) != file.size:
                raise Damaged(f"{name} has {sizes.get(name, 'no')} bytes, expected {file.size}")
        if len(manifest["tensors"]) > MAX_TENSORS:
            raise Damaged(f"{commit.commit} has more than {MAX_TENSORS} tensors")
        tensors = {name: _stored(entry, found) for name, entry in manifest["tensors"].items()}
        _require_disjoint(tensors.values())
        if (manifest["attempt"], manifest["step"]) != (commit.attempt, commit.step):
            raise Damaged(f"{commit.commit} is the manifest of another commit")
        facts = decode(manifest["facts"], _no_tensor)
        return Checkpoint(commit, found, dict(manifest["parts"]), tensors, dict(facts), location)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, StateError) as error:
        raise Damaged(f"{commit.commit} is not a manifest of this format: {error!r}") from error


def _stored(entry: dict[str, Any], found: Mapping[str, StoredFile]) -> Stored:
    shape = tuple(entry["shape"])
    numbers = (*shape, entry["offset"], entry["length"])
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"sizes {numbers}")
    stored = Stored(entry["dtype"], shape, entry["part"], entry["offset"], entry["length"], entry["digest"])
    file = found[stored.part]
    if not file.header <= stored.offset <= file.size - stored.length:
        raise Damaged(f"{stored.part} has no room for {stored.length} bytes of a tensor at {stored.offset}")
    return stored


def _require_disjoint(tensors: Iterable[Stored]) -> None:
    """Raise Damaged for tensors that overlap: a few bytes could stand for any amount of memory. Two names of the same
    tensor are fine.
    """
    part, end = "", 0
    for entry in sorted({*tensors}, key=lambda entry: (entry.part, entry.offset, entry.length)):
        if entry.part == part and entry.offset < end:
            raise Damaged(f"{part}: two tensors in the bytes from {entry.offset} to {end}")
        part, end = entry.part, entry.offset + entry.length


def _objective(facts: Mapping[str, Any]) -> float | None:
    value = facts.get("objective")
    return float(value) if isinstance(value, int | float) else None


def _no_tensor(name: str) -> Tensor:
    raise ValueError(f"a tensor {name!r} among the facts")

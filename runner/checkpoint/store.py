"""Saves and opens the checkpoints of a run. Knows nothing of when to save, or of training.

The invariants on which every resume relies: a manifest names only objects whose puts returned before it was written; no
object is written twice; bytes are used only after their digest matched; removal begins with the manifest.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from runner.checkpoint import manifest as manifests
from runner.checkpoint.checkpoint import Checkpoint, no_tensor, objective, parsed
from runner.checkpoint.encoding import decode
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.retention import CommitInfo, Retention
from runner.checkpoint.sharding import FileGroup, WritePlan, plan, shard
from runner.checkpoint.snapshot import Report, Snapshot, assemble, report, require_few
from runner.checkpoint.tensor_file import Damaged, SafetensorsFile, StoredFile
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, gather, on_all_ranks, on_rank_zero
from runner.errors import StorageError, Superseded
from runner.storage.location import Location

SURVEYED_MANIFESTS = 64  # manifests that one retention reads: commits wait for it
_READERS = 8


class CheckpointStore:
    """The checkpoints of one run.

    All ranks call ``commit``; the ranks that are passed to ``open`` call it and the methods of its result; only rank 0
    calls the other methods. ``damaged``: commits found unusable. ``verified``: commits that this process made or read
    in full.
    """

    def __init__(self, location: Location, comm: Communicator = SINGLE_PROCESS) -> None:
        self.location = location
        self.comm = comm
        self.damaged: set[CommitId] = set()
        self.verified: set[CommitId] = set()
        self._objectives: dict[CommitId, float | None] = {}
        self._failed: set[CommitId] = set()  # begun by this process, and never sent a manifest
        self._sent: dict[CommitId, bytes] = {}  # manifests of which it is not known whether they are there

    def commit(self, snapshot: Snapshot, *, attempt: int, successor: Callable[[], str | None]) -> CommitId:
        """Make the snapshot the newest checkpoint; durable and acknowledged once this returns.

        Raises Superseded if ``successor`` then names a newer attempt, which may have overlooked this commit. What fails
        on one rank fails on all, and nothing is committed.
        """

        def begin() -> str:
            self._clear()
            new = CommitId.new(attempt, snapshot.step)
            self._failed.add(new)
            return new.nonce

        commit = CommitId(attempt, snapshot.step, on_rank_zero(self.comm, begin))
        how = snapshot.plan or plan(shard(snapshot.tensors, SINGLE_PROCESS), {})
        how = how.split(self.location.part_bytes)
        reports = gather(self.comm, lambda: self._put(commit, snapshot, how))

        def conclude() -> None:
            assert reports is not None
            raw = manifests.seal(assemble(commit, snapshot, how, reports))
            self.damaged.add(commit)  # until its put returns: a torn manifest must not be retained for a good one
            self._failed.discard(commit)
            self._sent[commit] = raw
            self.location.put(commit.commit, [raw])
            del self._sent[commit]
            self.damaged.discard(commit)
            # Only after the manifest is visible: a newer attempt either sees this commit or is seen here.
            self._require_newest(successor)

        on_rank_zero(self.comm, conclude)
        self.verified.add(commit)
        self._objectives[commit] = objective(decode(snapshot.facts, no_tensor))
        return commit

    def _clear(self) -> None:
        """Settle what failed, so that an outage leaves one copy of the state and not one for every try: remove the data
        of commits whose manifests were never sent, and send those again that were. Such a one may come true at any
        time, so its data must stay; and while it is refused, another copy would be refused as well.
        """
        listed = {*self.commits()} if self._sent else set()
        for one, raw in [*self._sent.items()]:
            if one not in listed:
                self.location.put(one.commit, [raw])
                self.damaged.discard(one)
            del self._sent[one]
        if self._failed:
            with suppress(StorageError):  # who may write need not be allowed to remove
                for entry in self.location.list("data"):
                    if manifests.parse_data(entry.name) in self._failed:
                        self.location.remove(f"data/{entry.name}")
                self._failed.clear()

    def require_newest(self, successor: Callable[[], str | None]) -> None:
        """Raise Superseded if ``successor`` names a newer attempt."""
        on_rank_zero(self.comm, lambda: self._require_newest(successor))

    def _require_newest(self, successor: Callable[[], str | None]) -> None:
        newer = successor()
        if newer is not None:
            raise Superseded(
                f"{newer} took over {self.location.url}; this process stops. Its last checkpoint is not used."
            )

    def _put(self, commit: CommitId, snapshot: Snapshot, how: WritePlan) -> Report:
        """Write this rank's tensors; what is told of it."""
        require_few(how)
        rank = None if self.comm.size == 1 else self.comm.rank

        def put(number: int, shelf: FileGroup) -> tuple[str, StoredFile]:
            tensors = {name: snapshot.tensors[name] for name in shelf.tensors}
            file = SafetensorsFile(tensors, metadata={"step": str(snapshot.step)})
            name = commit.data(number, rank)
            return name, file.stored(self.location.put(name, file.chunks()))

        shelves = [how.shelves[number] for number in how.mine] + ([how.own] if how.own.tensors else [])
        with ThreadPoolExecutor(self.location.parallel_puts) as pool:
            files = [*pool.map(put, range(len(shelves)), shelves)]
        return report(snapshot, how, files)

    def commits(self) -> list[CommitId]:
        """All commits, the one to resume from first."""
        return manifests.commits(self.location)

    def open(self, commit: CommitId, comm: Communicator = SINGLE_PROCESS) -> Checkpoint:
        """Read a commit's manifest and check that its files are there. Raises Damaged."""
        return on_all_ranks(comm, lambda: self._open(commit, comm), kinds=(Damaged, Torn))

    def _open(self, commit: CommitId, comm: Communicator) -> Checkpoint:
        checkpoint = self._described(commit, comm)
        if comm.rank == 0:  # one listing is enough
            _require_sizes(checkpoint, self._sizes())
        checkpoint.check()
        return checkpoint

    def _described(self, commit: CommitId, comm: Communicator) -> Checkpoint:
        """What its manifest says. Raises Damaged."""
        raw = self.location.read(commit.commit, limit=manifests.LIMIT)
        if raw is None:
            raise Damaged(f"{commit.commit} is gone")
        manifest = manifests.unseal(raw)
        if manifest is None:
            raise Torn(f"{commit.commit} {manifests.why_not(raw)}")
        if manifest.get("format") != manifests.FORMAT:
            raise StorageError(
                f"{self.location.url}/{commit.commit} has format {manifest.get('format')!r:.80}, this version reads "
                f"{manifests.FORMAT}. Use the version of hydra-runner that wrote it."
            )
        return parsed(commit, manifest, self.location, comm)

    def _sizes(self) -> dict[str, int]:
        return {f"data/{entry.name}": entry.size for entry in self.location.list("data")}

    def survey(self) -> list[CommitInfo]:
        """What is known of every commit, the one to resume from first: its manifest unseals, and its files have their
        sizes. Computed from fresh listings.
        """
        return self._known(self.commits())

    def retain(self, retention: Retention, *, attempt: int) -> None:
        """Remove the commits that do not stay, and what attempts before ``attempt`` left half done.

        Those whose manifests nobody has read yet are read a few at a time, the newest first, and stay until then: what
        older ones hold can only be one more reason to remove a newer one.
        """
        listed = self.commits()
        known = self._known(listed, most=SURVEYED_MANIFESTS)
        kept = {*retention.kept(known), *listed[len(known) :]}
        self.remove(listed, kept, attempt=attempt)

    def _known(self, listed: Sequence[CommitId], *, most: int | None = None) -> list[CommitInfo]:
        """What is known of the commits; of the first ones if it takes the reading of more than ``most`` manifests."""
        unread = [one for one in listed if one not in self._objectives and one not in self.damaged]  # they never change
        if unread:
            sizes = self._sizes()
            with ThreadPoolExecutor(_READERS) as pool:
                for one, found in zip(
                    unread, pool.map(lambda one: self._look(one, sizes), unread[:most]), strict=False
                ):
                    if isinstance(found, Damaged):
                        self.damaged.add(one)
                    else:
                        self._objectives[one] = found
            if most is not None and len(unread) > most:
                listed = listed[: listed.index(unread[most])]
        return [CommitInfo(one, one in self.verified, one in self.damaged, self._objectives.get(one)) for one in listed]

    def _look(self, commit: CommitId, sizes: Mapping[str, int]) -> float | Damaged | None:
        """The objective of a commit, or what is wrong with it; without a look into its data files."""
        try:
            checkpoint = self._described(commit, SINGLE_PROCESS)
            _require_sizes(checkpoint, sizes)
            return objective(checkpoint.facts)
        except Damaged as error:
            return error

    def remove(self, listed: Sequence[CommitId], kept: Container[CommitId], *, attempt: int) -> None:
        """Remove the ``listed`` commits that are not ``kept``, and what attempts before ``attempt`` left half done."""
        for commit in sorted(listed):  # oldest first: of what is left the newest is always what a resume wants
            if commit not in kept:
                self.location.remove(commit.commit)  # before its data: a commit never names data that is gone
        for entry in self.location.list("data"):
            owner = manifests.parse_data(entry.name)
            if owner is not None and owner not in kept and (owner in listed or owner.attempt < attempt):
                self.location.remove(f"data/{entry.name}")


def _require_sizes(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    for name, file in checkpoint.files.items():
        if sizes.get(name) != file.size:
            raise Damaged(f"{name} has {sizes.get(name, 'no')} bytes, expected {file.size}")


class Torn(Damaged):
    """A manifest that does not unseal: torn while it was written, so that it never was a commit, or damaged since."""

"""Commits, opens and removes the checkpoints of a run. Knows nothing of when to save, or of training.

The invariants on which every resume relies: a manifest names only objects whose puts returned before it was written; no
object is written twice; bytes are used only after their digest matched; removal begins with the manifest.

What ``Retention`` keeps: the newest checkpoints, until ``keep_last`` of them are verified (at least two, whatever the
configuration says); the ``keep_best`` best by the objective; the newest undamaged one of every step that is a multiple
of ``keep_every_steps``. It remembers nothing between two calls. ``python -m runner.runs prune`` applies the same rules
with the numbers of its own options.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from runner.activity import doing
from runner.checkpoint import manifest as manifests
from runner.checkpoint.checkpoint import Checkpoint, no_tensor, objective_of, parse
from runner.checkpoint.encoding import decode
from runner.checkpoint.manifest import CommitId
from runner.checkpoint.sharding import FileGroup, WritePlan, plan, shard
from runner.checkpoint.snapshot import RankFiles, Snapshot, assemble, rank_files
from runner.checkpoint.tensor_file import Damaged, SafetensorsFile, StoredFile
from runner.config.schema import LEAST_KEPT
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, gather, on_all_ranks, on_rank_zero
from runner.errors import StorageError
from runner.storage.location import Location

SURVEYED_MANIFESTS = 64  # manifests that one ``retain`` reads at most: the next save waits for it
_READERS = 8  # threads


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """A commit as the policy sees it. ``verified``: this process wrote its bytes, or read all of them. After a resume
    older commits are not verified, so more are kept until two new ones are. A commit that is neither verified nor
    ``damaged`` may be good.
    """

    id: CommitId
    verified: bool = False
    damaged: bool = False
    objective: float | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """The policy with its numbers. ``mode`` is min or max; without it no checkpoint is better than another."""

    last: int = LEAST_KEPT
    every_steps: int | None = None
    best: int = 1
    mode: str | None = None

    def is_milestone(self, step: int) -> bool:
        """Whether the newest commit of this step is always kept."""
        return self.every_steps is not None and step % self.every_steps == 0

    def reasons(self, commits: Iterable[CommitInfo]) -> dict[CommitId, str]:
        """The commits to keep, the newest first, each with the reason in a few words. At least two verified ones are
        among them; where there are fewer, all stay.
        """
        newest_first = sorted(commits, key=lambda commit: commit.id, reverse=True)
        best = {commit.id for commit in best_first(newest_first, self.mode)[: self.best]}
        reasons: dict[CommitId, str] = {}
        verified, pinned = 0, set[int]()
        for commit in newest_first:
            step = commit.id.step
            first_of_step = self.is_milestone(step) and not commit.damaged and step not in pinned
            if first_of_step:
                pinned.add(step)
            # Commits that are not verified are kept and not counted: all of them may turn out to be damaged.
            if verified < max(self.last, LEAST_KEPT):
                reasons[commit.id] = "damaged, too few good ones are newer" if commit.damaged else "newest"
                verified += commit.verified and not commit.damaged
            elif commit.id in best:
                reasons[commit.id] = "best"
            elif first_of_step:
                reasons[commit.id] = f"multiple of {self.every_steps}"
        return reasons


def best_first(commits: Sequence[CommitInfo], mode: str | None) -> list[CommitInfo]:
    """The undamaged commits with an objective, the best first, of equal ones the earlier step. Empty without a
    ``mode``.

    Only commits that the newest state descends from, one for each step: where a newer attempt resumed from an earlier
    step, the steps after it were done again, or come from a process that went on after it had been superseded.
    """
    lineage: list[CommitInfo] = []
    attempt, limit, lowest = 0, math.inf, math.inf  # of an older attempt only steps below ``limit`` count
    for commit in sorted(commits, key=lambda commit: commit.id, reverse=True):
        if commit.damaged:
            continue
        if commit.id.attempt != attempt:
            attempt, limit = commit.id.attempt, lowest
        below = min(limit, lineage[-1].id.step) if lineage else limit
        if commit.id.step < below and commit.objective is not None and not math.isnan(commit.objective):
            lineage.append(commit)
        lowest = min(lowest, commit.id.step)
    sign = {"min": 1, "max": -1}.get(mode or "")
    if sign is None:
        return []
    return sorted(lineage, key=lambda commit: (sign * (commit.objective or 0.0), commit.id.step))


class CheckpointStore:
    """The checkpoints of one run.

    All ranks call ``commit``; the ranks that are passed to ``open`` call it and the methods of its result; only rank 0
    calls the other methods. ``damaged``: unusable commits. ``verified``: those that this process made or read in full.
    """

    def __init__(self, location: Location, comm: Communicator = SINGLE_PROCESS) -> None:
        self.location = location
        self.comm = comm
        self.damaged: set[CommitId] = set()
        self.verified: set[CommitId] = set()
        self._objectives: dict[CommitId, float | None] = {}
        self._unsent: set[CommitId] = set()  # begun by this process, and their manifests never sent
        self._uncertain: dict[CommitId, bytes] = {}  # manifests whose put failed, though they may be there

    def commit(self, snapshot: Snapshot, *, attempt: int, require_newest: Callable[[], None]) -> CommitId:
        """Make the snapshot the newest checkpoint; durable and acknowledged once this returns.

        ``require_newest`` raises Superseded if there is a newer attempt, which may have overlooked this commit: it is
        called on rank 0 after the manifest is put. What fails on one rank fails on all, and nothing is committed.
        """

        def begin() -> str:
            self._settle()
            new = CommitId.new(attempt, snapshot.step)
            self._unsent.add(new)
            return new.nonce

        commit = CommitId(attempt, snapshot.step, on_rank_zero(self.comm, begin))
        write = (snapshot.plan or plan(shard(snapshot.tensors, SINGLE_PROCESS), {})).split(self.location.part_bytes)
        records = gather(self.comm, lambda: self._put(commit, snapshot, write))

        def conclude() -> None:
            assert records is not None
            raw = manifests.seal(assemble(commit, snapshot, write, records))
            self.damaged.add(commit)  # until its put returns: retention must not count a torn manifest as a checkpoint
            self._unsent.discard(commit)
            self._uncertain[commit] = raw
            self.location.put(commit.commit, [raw])
            del self._uncertain[commit]
            self.damaged.discard(commit)
            # Only after the manifest is visible: a newer attempt either sees this commit or is seen here.
            require_newest()

        on_rank_zero(self.comm, conclude)
        self.verified.add(commit)
        self._objectives[commit] = objective_of(decode(snapshot.facts, no_tensor))
        return commit

    def _settle(self) -> None:
        """Clean up after commits that failed, so that an outage leaves one copy of the state and not one for each try.

        Data of a commit whose manifest was never sent is removed. A manifest that was sent may appear at any time, so
        its data must stay: it is sent again, before the data of another commit, which the store would refuse as well.
        """
        listed = {*self.commits()} if self._uncertain else set()
        for commit, raw in [*self._uncertain.items()]:
            if commit not in listed:
                self.location.put(commit.commit, [raw])
                self.damaged.discard(commit)
            del self._uncertain[commit]
        if self._unsent:
            with suppress(StorageError):  # a user may have the right to write, and not to remove
                for entry in self.location.list("data"):
                    if manifests.parse_data(entry.name) in self._unsent:
                        self.location.remove(f"data/{entry.name}")
                self._unsent.clear()

    def _put(self, commit: CommitId, snapshot: Snapshot, write: WritePlan) -> RankFiles:
        """Write this rank's data files."""
        rank = None if self.comm.size == 1 else self.comm.rank

        def put(number: int, group: FileGroup) -> tuple[str, StoredFile]:
            tensors = {name: snapshot.tensors[name] for name in group.tensors}
            file = SafetensorsFile(tensors, metadata={"step": str(snapshot.step)})
            name = commit.data(number, rank)
            return name, file.stored(self.location.put(name, file.chunks()))

        groups = [write.groups[number] for number in write.written] + ([write.own] if write.own.tensors else [])
        with ThreadPoolExecutor(self.location.parallel_puts) as pool:
            files = [*pool.map(put, range(len(groups)), groups)]
        return rank_files(snapshot, write, files)

    @doing("saves")
    def commits(self) -> list[CommitId]:
        """All commits, the one to resume from first."""
        return manifests.commits(self.location)

    @doing("saves")
    def open(self, commit: CommitId, comm: Communicator = SINGLE_PROCESS) -> Checkpoint:
        """Read a commit's manifest and check that its files are there. Raises Damaged."""
        return on_all_ranks(comm, lambda: self._open(commit, comm))

    def _open(self, commit: CommitId, comm: Communicator) -> Checkpoint:
        checkpoint = self._parse(commit, comm)
        if comm.rank == 0:  # one listing is enough
            _require_sizes(checkpoint, self._sizes())
        checkpoint.check()
        return checkpoint

    def _parse(self, commit: CommitId, comm: Communicator) -> Checkpoint:
        """Read a commit's manifest, and nothing else. Raises Damaged."""
        raw = self.location.read(commit.commit, limit=manifests.LIMIT)
        if raw is None:
            raise Damaged(f"{commit.commit} is gone")
        manifest = manifests.unseal(raw)
        if manifest is None:
            raise Torn(f"{commit.commit} {manifests.seal_problem(raw)}")
        if manifest.get("format") != manifests.FORMAT:
            raise StorageError(
                f"{self.location.url}/{commit.commit} has format {manifest.get('format')!r:.80}, this version reads "
                f"{manifests.FORMAT}. Use the version of hydra-runner that wrote it."
            )
        return parse(commit, manifest, self.location, comm)

    def _sizes(self) -> dict[str, int]:
        return {f"data/{entry.name}": entry.size for entry in self.location.list("data")}

    def retain(self, retention: Retention, *, attempt: int) -> None:
        """Remove the commits that do not stay, and what attempts before ``attempt`` left half done.

        Manifests that this process has not read yet are read a few at a time, the newest first. Commits older than
        these are kept: reading them can only make a newer commit removable.
        """
        listed = self.commits()
        infos = self.survey(listed, limit=SURVEYED_MANIFESTS)
        self.remove(listed, {*retention.reasons(infos), *listed[len(infos) :]}, attempt=attempt)

    @doing("saves")
    def survey(self, listed: Sequence[CommitId] | None = None, *, limit: int | None = None) -> list[CommitInfo]:
        """All commits or the ``listed``, the one to resume from first; only the first of them where more than ``limit``
        manifests would have to be read. A commit is damaged if its manifest does not unseal, or its files do not have
        their sizes, by fresh listings; the contents of data files are not read.
        """
        listed = self.commits() if listed is None else listed
        # Manifests never change, so each is read once.
        unread = [commit for commit in listed if commit not in self._objectives and commit not in self.damaged]
        if unread:
            sizes = self._sizes()
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(lambda commit: self._survey(commit, sizes), unread[:limit]))  # raises their errors
            if limit is not None and len(unread) > limit:
                listed = listed[: listed.index(unread[limit])]
        return [
            CommitInfo(commit, commit in self.verified, commit in self.damaged, self._objectives.get(commit))
            for commit in listed
        ]

    def _survey(self, commit: CommitId, sizes: Mapping[str, int]) -> None:
        """Note the objective of a commit, or that it is damaged."""
        try:
            checkpoint = self._parse(commit, SINGLE_PROCESS)
            _require_sizes(checkpoint, sizes)
            self._objectives[commit] = objective_of(checkpoint.facts)
        except Damaged:
            self.damaged.add(commit)

    def remove(self, listed: Sequence[CommitId], keep: Container[CommitId], *, attempt: int) -> None:
        """Remove the ``listed`` commits but those to ``keep``, and what attempts before ``attempt`` left half done."""
        for commit in sorted(listed):  # oldest first: a kill in between leaves the newest ones
            if commit not in keep:
                self.location.remove(commit.commit)  # before its data: a commit never names data that is gone
        for entry in self.location.list("data"):
            owner = manifests.parse_data(entry.name)
            if owner is not None and owner not in keep and (owner in listed or owner.attempt < attempt):
                self.location.remove(f"data/{entry.name}")


def _require_sizes(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    for name, file in checkpoint.files.items():
        if sizes.get(name) != file.size:
            raise Damaged(f"{name} has {sizes.get(name, 'no')} bytes, expected {file.size}")


class Torn(Damaged):
    """A manifest that does not unseal: a kill while it was written left a part of it, or it was damaged later."""

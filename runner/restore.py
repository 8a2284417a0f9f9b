"""Restores the state from which training continues: from a run's own checkpoints, from its parent, or from scratch."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from runner import signals
from runner.callbacks.base import FAILED
from runner.checkpoint.checkpoint import Checkpoint
from runner.checkpoint.manifest import CommitId, parse_commit
from runner.checkpoint.sharding import local
from runner.checkpoint.store import CheckpointStore, ranked
from runner.checkpoint.tensor_file import Damaged, is_finite
from runner.distributed.communicator import Communicator, on_all_ranks, on_rank_zero
from runner.errors import ConfigError, NoLoadableCheckpoint, NonFiniteError, StateError, StorageError, printable
from runner.foreign import read_weights
from runner.hashing import derive
from runner.names import saved_name
from runner.optimizers import by_name
from runner.optimizers import parts as parts_of
from runner.rng import seed_all
from runner.run.directory import RunDirectory
from runner.run.drift import compare
from runner.run.parent import Parent, ParentRecord, digest_of, weight_files
from runner.state import TrainState, retype
from runner.storage import open_location
from runner.storage.location import Location, is_remote

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where an attempt continues: after ``commit``, or at step 0.

    ``unusable`` describes newer commits that are damaged. ``origin`` is the parent run, if the state came from there;
    ``unmatched`` describes the weights that it and this run do not share.
    """

    commit: CommitId | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()
    origin: ParentRecord | None = None
    unmatched: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.commit.step if self.commit else 0

    def stopped(self, identity: Mapping[str, Any]) -> str | None:
        """Why training ended at this step, in a word; None if it was a signal or a failed evaluation, or the
        configuration was another.
        """
        word = self.facts.get("stop")
        if not isinstance(word, str) or word in (*signals.NAMES, FAILED):
            return None
        return None if compare(self.facts.get("identity", identity), identity) else printable(word)


def restore_newest(
    state: TrainState,
    store: CheckpointStore,
    identity: dict[str, Any],
    *,
    evidence: Callable[[], str | None],
    fresh: Callable[[], Resumed],
    anew: Callable[[int], str],
    comm: Communicator,
) -> Resumed:
    """Load the newest undamaged checkpoint; begin with ``fresh`` only if nothing was ever committed.

    ``evidence`` returns a description of any trace of an earlier commit, or None. All ranks of ``comm`` load the same
    checkpoint: a checkpoint that is damaged for one rank is damaged for all.

    Raises NoLoadableCheckpoint, and then has changed nothing; StateError or NonFiniteError for a checkpoint from which
    training cannot continue. To their messages it adds ``anew`` of the newest older step that can be trained further.
    """
    unusable: list[str] = []
    commits = _listed(store, comm)
    for number, commit in enumerate(commits):
        try:
            checkpoint = store.open(commit, comm)
            _restore(state, checkpoint, identity)
            on_all_ranks(comm, partial(_require_finite, state, commit))
            store.verified.add(commit)
            return Resumed(commit, checkpoint.facts, tuple(unusable))
        except Damaged as error:
            store.damaged.add(commit)
            unusable.append(_why(commit, error))
        except (StateError, NonFiniteError) as error:
            tried = {other.step for other in commits[: number + 1]}  # only the newest commit of a step counts
            rest = [other for other in commits[number + 1 :] if other.step not in tried]
            older = _older(state, store, rest, identity, comm)
            hint = anew(older) if older else "No older checkpoint is kept that fits and is finite."
            error.args = (f"{error}\n{hint}",)
            raise
    trace = on_rank_zero(comm, evidence)
    if trace is not None:
        raise NoLoadableCheckpoint(_nothing_loadable(store, f"although one was committed ({trace})", unusable))
    return replace(fresh(), unusable=tuple(unusable))


def begin(
    state: TrainState,
    identity: dict[str, Any],
    origin: ParentRecord | None,
    asked: Parent | None,
    directory: RunDirectory,
    comm: Communicator,
) -> Resumed:
    """Begin a run from scratch, or from the checkpoint of its parent. ``asked`` is the parent in this command.

    Raises NoLoadableCheckpoint, StateError, ConfigError for a parent in a store that the command does not name.
    """
    seed = derive("train", identity["seed"], *([comm.rank] if comm.rank else []))  # another one on each rank
    if origin is None:
        state.stream.open()  # draws random numbers: the generators are seeded afterwards
        seed_all(seed)
        return Resumed()
    if origin.foreign:
        unmatched = state.inherit(_foreign_weights(origin, asked, comm), strict=origin.load == "strict")
        state.stream.open()
        seed_all(seed)
        return Resumed(origin=origin, unmatched=tuple(unmatched))
    with _opened(origin, asked, directory, comm) as (url, commit, checkpoint):
        origin = replace(origin, run=url)
        if origin.inherit == "model":
            unmatched = state.inherit(checkpoint, strict=origin.load == "strict")
            state.stream.open()
            seed_all(seed)
            return Resumed(origin=origin, unmatched=tuple(unmatched))
        # The data position only if it means the same samples; the parent's callbacks are not this run's.
        same_data = not state.stream.changes(checkpoint.load("data"))
        if not same_data:
            state.stream.open()
        _restore(state, checkpoint, identity, without=() if same_data else ("data",), memories=False)
        return Resumed(commit, origin=origin)


def load_reference(
    model: nn.Module,
    state: TrainState,
    origin: ParentRecord | None,
    asked: Parent | None,
    directory: RunDirectory,
    comm: Communicator,
) -> nn.Module:
    """``model``, as it was built, with the weights with which the run of ``state`` began: frozen, in evaluation mode.
    A run that began as the continuation of another has the reference of that one.

    Raises NoLoadableCheckpoint, ConfigError, StateError.
    """
    while origin is not None and origin.inherit == "all":
        location = _parent(origin, asked, directory)
        directory, asked = RunDirectory.at(location.url, asked.options if asked else directory.options), None
        origin = ParentRecord.of(directory)
    whole = replace(state, model=model, average=None, built=None)
    if origin is not None and origin.foreign:
        whole.inherit(_foreign_weights(origin, asked, comm), strict=origin.load == "strict")
    elif origin is not None:
        with _opened(origin, asked, directory, comm) as (_, _, checkpoint):
            whole.inherit(checkpoint, strict=origin.load == "strict")
    return model.requires_grad_(False).eval()


def _foreign_weights(origin: ParentRecord, asked: Parent | None, comm: Communicator) -> Checkpoint:
    """The weights of files that no run made, unchanged since the run began. Raises ConfigError if they are gone."""
    files = on_rank_zero(comm, lambda: [*map(str, origin.unchanged_files(asked))])
    if not files:
        raise ConfigError(f"{origin.run} is gone, and this run needs its weights: restore it")
    return read_weights([*map(Path, files)], comm)


@contextmanager
def _opened(
    origin: ParentRecord, asked: Parent | None, directory: RunDirectory, comm: Communicator
) -> Iterator[tuple[str, CommitId, Checkpoint]]:
    """Within the block, the checkpoint of a parent, and its run's URL. Raises NoLoadableCheckpoint if it is damaged."""
    parent, commit = CheckpointStore(_parent(origin, asked, directory)), parse_commit(f"{origin.commit}.json")
    if commit is None:
        raise StorageError(printable(f"run.json names a parent's checkpoint that no run has: {origin.commit!r}"))
    try:
        yield parent.location.url, commit, parent.open(commit, comm)
    except Damaged as error:
        why = f"and this run begins from its step {origin.step}"
        raise NoLoadableCheckpoint(_nothing_loadable(parent, why, [_why(commit, error)])) from error


def resolve(parent: Parent) -> ParentRecord:
    """The checkpoint that a new run begins from, with all its bytes verified.

    Raises ConfigError for a run or a step that does not exist, NoLoadableCheckpoint.
    """
    if files := weight_files(parent.source.run):
        if parent.inherit != "model":
            raise ConfigError(
                f"run.inherit={parent.inherit}: {parent.source.run} has weights only; leave run.inherit out"
            )
        return ParentRecord(parent.source.run, 0, digest_of(files), parent.inherit, parent.asked, parent.load)
    directory = RunDirectory.at(parent.source.run, parent.options)
    checkpoint, _ = read(directory, parent.source.checkpoint, Checkpoint.verify)
    commit, url = str(checkpoint.id), directory.location.url
    return ParentRecord(url, checkpoint.step, commit, parent.inherit, parent.asked, parent.load)


def read(directory: RunDirectory, which: int | str | None, take: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    """The newest undamaged checkpoint (or that of a step, or the ``best``), and the result of ``take`` for it.

    Raises ConfigError, naming the steps there are, and NoLoadableCheckpoint.
    """
    store = CheckpointStore(directory.location)
    unusable: list[str] = []
    for commit in _chosen(store, which, directory):
        try:
            checkpoint = store.open(commit)
            return checkpoint, take(checkpoint)
        except Damaged as error:
            unusable.append(_why(commit, error))
    raise NoLoadableCheckpoint(_nothing_loadable(store, "and one is needed", unusable))


def evaluated_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that were evaluated: the averaged ones if there are any. Raises Damaged."""
    if "average" not in checkpoint.parts:
        return {saved_name(name): tensor for name, tensor in checkpoint.load("model").items()}
    average = checkpoint.load("average").items()
    return {saved_name(name.removeprefix("module.")): tensor for name, tensor in average if name.startswith("module.")}


def restore_evaluated(state: TrainState, store: CheckpointStore, step: int, comm: Communicator) -> str:
    """Load model, average and task of the kept commit at ``step``, in all processes; returns why that is impossible."""
    why = "its checkpoint is gone"
    for commit in _listed(store, comm):
        if commit.step == step:
            try:
                others = {*state.parts()} - {"model", "average", "task"}
                state.restore(store.open(commit, comm), without=others)
                return ""
            except Damaged as error:
                why = str(error)
    return why


def _listed(store: CheckpointStore, comm: Communicator) -> list[CommitId]:
    """The commits, the newest first, as rank 0 lists them."""
    names = on_rank_zero(comm, lambda: [commit.commit for commit in store.commits()])
    return [*filter(None, (parse_commit(name.rpartition("/")[2]) for name in names))]


def _chosen(store: CheckpointStore, which: int | str | None, directory: RunDirectory) -> list[CommitId]:
    """The commits that ``which`` allows, the preferred commit first."""
    commits = store.commits()
    if which is None:
        return commits
    if which == "best":
        goal, infos = (directory.identity() or {}).get("objective") or {}, store.survey()
        if best := ranked(infos, goal.get("mode") if goal.get("metric") else None):
            which = best[0].id.step
        elif all(info.damaged for info in infos):
            return commits  # opening them will say what is wrong with each
        else:
            raise ConfigError(f"{store.location.url} has no checkpoint with an objective; give a step, as in ...@100")
    chosen = [commit for commit in commits if commit.step == which]
    if commits and not chosen:
        steps = ", ".join(map(str, sorted({commit.step for commit in commits})))
        raise ConfigError(f"{store.location.url} has no checkpoint of step {which}; there are those of steps {steps}")
    return chosen


def _parent(origin: ParentRecord, asked: Parent | None, directory: RunDirectory) -> Location:
    """Where the parent is. Only stores that the command names are called: anyone may have written the record of the
    parent, and calls are made with this user's keys.
    """
    if asked is not None:
        return open_location(asked.source.run, asked.options)
    root = open_location(directory.root, directory.options).url.rstrip("/")
    if is_remote(origin.run) and not origin.run.startswith(f"{root}/"):
        raise ConfigError(
            printable(f"{directory.location.url}/run.json says that the run began from {origin.run}, a store that ")
            + "this command does not name, and that was not called. Use the command that began the run "
            "(run.on_drift=fork, for a fork), or start a new one: run.parent=... run.name=..."
        )
    return open_location(origin.run, directory.options if is_remote(origin.run) else None)


def _restore(
    state: TrainState,
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    *,
    without: tuple[str, ...] = (),
    memories: bool = True,
) -> None:
    """Load all parts, but keep the settings of optimizer and scheduler that the user changed since, and accepted."""
    changed = compare(checkpoint.facts.get("identity", identity), identity)
    if not any(difference.key.split(".")[0] in ("optimizer", "scheduler") for difference in changed):
        state.restore(checkpoint, without=without, memories=memories)
        return
    keys = {difference.key.rpartition(".")[2] for difference in changed}
    optimizers, schedulers = by_name(state.optimizer), by_name(state.scheduler)
    built = {name: optimizer.state_dict()["param_groups"] for name, optimizer in optimizers.items()}
    schedules = {name: dict(scheduler.state_dict()) for name, scheduler in schedulers.items()}
    state.restore(checkpoint, without=(*without, *parts_of("scheduler", state.scheduler)), memories=memories)
    for name, interval in by_name(state.schedule).items():
        _keep_settings(optimizers[name], built[name], lr=interval == "evaluation" and "lr" not in keys)
        scheduler = schedulers[name]
        if interval == "evaluation":  # what it has seen cannot be repeated
            settings = {key: value for key, value in schedules[name].items() if key in keys}
            part = f"scheduler.{name}" if name else "scheduler"
            scheduler.load_state_dict({**checkpoint.load(part), **settings})
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(state.progress.step if interval == "step" else state.stream.epochs):
                scheduler.step()


def _keep_settings(optimizer: Any, built: list[dict[str, Any]], *, lr: bool) -> None:
    """Give a restored optimizer the settings that were ``built``, without those of groups that training added, keys
    that it added to a group, and, if ``lr``, the rates: no other scheduler would compute them again.
    """
    saved = optimizer.state_dict()
    old = {"params", "param_names", *(["lr"] * lr)}
    new = [{k: v for k, v in group.items() if k not in old} for group in built]
    new += [{}] * (len(saved["param_groups"]) - len(new))
    groups = [{**group, **settings} for group, settings in zip(saved["param_groups"], new, strict=False)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    retype(optimizer.state_dict().get("state"), saved.get("state"))


def _require_finite(state: TrainState, commit: CommitId) -> None:
    weights = dict(state.model.named_parameters())
    bad = next((name for name in state.trained() if not is_finite(local(weights[name].detach()))), None)
    if bad is not None:
        raise NonFiniteError(f"step {commit.step} was saved with {bad} that is NaN or infinite, as every step after it")


def _older(
    state: TrainState, store: CheckpointStore, commits: list[CommitId], identity: dict[str, Any], comm: Communicator
) -> int | None:
    """The step of the first of these commits from which training can continue, found by restoring them."""
    for commit in commits:
        with suppress(Damaged, StateError, NonFiniteError):
            checkpoint = store.open(commit, comm)
            if state.fits(checkpoint):
                _restore(state, checkpoint, identity)
                on_all_ranks(comm, partial(_require_finite, state, commit))
                return commit.step
    return None


def _why(commit: CommitId, error: Damaged) -> str:
    return printable(f"step {commit.step} of attempt {commit.attempt}: {error}")


def _nothing_loadable(store: CheckpointStore, why: str, unusable: list[str]) -> str:
    commits = "\n".join(f"  {line}" for line in unusable) or "  commits/ is empty"
    return (
        f"{store.location.url} has no checkpoint that can be loaded, {why}:\n{commits}\n"
        "Nothing was deleted and nothing was started from scratch. Restore the files from a copy, "
        "or start a new run with run.name=..."
    )

"""Restores the state from which training continues: from a run's own checkpoints, from its parent, or from scratch.

Also the model and the task of a run outside of training, and weights that another program wrote.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from runner import signals
from runner.build import instance
from runner.callbacks.base import FAILED
from runner.checkpoint.checkpoint import Checkpoint, Reader, TensorBytes
from runner.checkpoint.encoding import encode
from runner.checkpoint.manifest import CommitId, parse_commit
from runner.checkpoint.sharding import FileGroup, local
from runner.checkpoint.store import CheckpointStore, best_first
from runner.checkpoint.structure import Structure
from runner.checkpoint.tensor_file import Damaged, Kind, is_finite
from runner.config.identity import compare
from runner.distributed.communicator import SINGLE_PROCESS, Communicator, on_all_ranks, on_rank_zero
from runner.errors import ConfigError, NoLoadableCheckpoint, NonFiniteError, StateError, StorageError, printable
from runner.hashing import derive
from runner.optimizers import by_name, parts_of, saved_name
from runner.rng import seed_all, temporary_seed
from runner.run import attempts
from runner.run.directory import RunDirectory
from runner.run.opening import RunSpec
from runner.run.parent import Parent, ParentRecord, digest_of, new_run_hint, weight_files
from runner.run_facts import RunFacts
from runner.state import TrainState, retype
from runner.storage import open_location
from runner.storage.location import Location, is_remote
from runner.task import Task

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where an attempt continues: after ``commit``, or at step 0.

    ``damage`` describes newer commits that cannot be used. ``origin`` is the parent run, if the state came from there;
    ``differences`` describes the weights that only one of the two has.
    """

    commit: CommitId | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    damage: Sequence[str] = ()
    origin: ParentRecord | None = None
    differences: Sequence[str] = ()

    @property
    def step(self) -> int:
        return self.commit.step if self.commit else 0

    def final_stop(self, identity: Mapping[str, Any]) -> str | None:
        """Why training ended after this step, in a word; None if training continues: after a signal or a failed
        evaluation, and with another configuration.
        """
        word = self.facts.get("stop")
        if not isinstance(word, str) or word in (*signals.NAMES, FAILED):
            return None
        return None if compare(self.facts.get("identity", identity), identity) else printable(word)


def restore(state: TrainState, store: CheckpointStore, spec: RunSpec, comm: Communicator) -> Resumed:
    """Load the newest undamaged checkpoint; begin from the parent or from scratch only if nothing was ever committed.

    All ranks of ``comm`` load the same checkpoint: a checkpoint that is damaged for one rank is damaged for all.

    Raises NoLoadableCheckpoint, and then has changed nothing; StateError or NonFiniteError for a checkpoint from which
    training cannot continue, with the newest older step that can be trained further; ConfigError for a parent in a
    store that the command does not name.
    """
    damage: list[str] = []
    commits = _listed(store, comm)
    for number, commit in enumerate(commits):
        try:
            facts = _continue_from(commit, state, store, spec, comm)
            store.verified.add(commit)
            return Resumed(commit, facts, damage)
        except Damaged as error:
            store.damaged.add(commit)
            damage.append(_describe_damage(commit, error))
        except (StateError, NonFiniteError) as error:
            hint = "No older checkpoint is kept that fits and is finite."
            steps = {other.step for other in commits[: number + 1]}  # only the newest commit of a step counts
            for older in (other for other in commits[number + 1 :] if other.step not in steps):
                with suppress(Damaged, StateError, NonFiniteError):
                    _continue_from(older, state, store, spec, comm)
                    hint = new_run_hint(spec.command, spec.directory, older.step)
                    break
            error.extend(hint)
            raise
    if trace := on_rank_zero(comm, lambda: _trace_of_a_commit(store.location)):
        raise NoLoadableCheckpoint(_nothing_loadable(store, f"although one was committed ({trace})", damage))
    return replace(_begin(state, spec, comm), damage=damage)


def _continue_from(
    commit: CommitId, state: TrainState, store: CheckpointStore, spec: RunSpec, comm: Communicator
) -> Mapping[str, Any]:
    """Load a commit from which training can continue; returns its facts. Raises Damaged, StateError, NonFiniteError."""
    checkpoint = store.open(commit, comm)
    _load(state, checkpoint, spec.identity)
    on_all_ranks(comm, lambda: _require_finite(state, commit))
    return checkpoint.facts


def _trace_of_a_commit(location: Location) -> str:
    """The first record of an attempt that mentions a commit, whatever ``commits/`` holds now; empty if none does."""
    for record in attempts.history(location):
        for source in (record.beat, record.end or {}):
            if source.get("committed"):
                return f"attempt {record.number} noted one at step {printable(source['committed'])}"
    return ""


def _begin(state: TrainState, spec: RunSpec, comm: Communicator) -> Resumed:
    """Begin a run from scratch, or from the checkpoint of its parent."""
    origin, resumed = ParentRecord.of(spec.directory), Resumed()
    if origin is not None:
        with _parent_checkpoint(origin, spec.parent, spec.directory, comm) as (url, checkpoint):
            origin = replace(origin, run=url)
            if not origin.weights_only:
                # The data position only if it means the same samples; the parent's callbacks are not this run's.
                same_data = not state.stream.changes(checkpoint.load("data"))
                if not same_data:
                    state.stream.open()
                _load(state, checkpoint, spec.identity, without=() if same_data else ("data",), callbacks=False)
                return Resumed(checkpoint.id, origin=origin)
            resumed = Resumed(origin=origin, differences=state.inherit(checkpoint, strict=origin.load == "strict"))
    state.stream.open()  # draws random numbers: the generators are seeded afterwards, each rank's with another seed
    seed_all(derive("train", spec.identity["seed"], *([comm.rank] if comm.rank else [])))
    return resumed


def load_reference(model: nn.Module, state: TrainState, spec: RunSpec, comm: Communicator) -> nn.Module:
    """``model``, as it was built, with the weights with which the run of ``state`` began: frozen, in evaluation mode.
    A run that began as the continuation of another has the reference of that one.

    Raises NoLoadableCheckpoint, ConfigError, StateError.
    """
    directory, asked = spec.directory, spec.parent
    origin = ParentRecord.of(directory)
    while origin is not None and not origin.weights_only:
        location = _parent_location(origin, asked, directory)
        directory, asked = RunDirectory.at(location.url, asked.options if asked else directory.options), None
        origin = ParentRecord.of(directory)
    if origin is not None:
        whole = replace(state, model=model, average=None, structure=None)
        with _parent_checkpoint(origin, asked, directory, comm) as (_, checkpoint):
            whole.inherit(checkpoint, strict=origin.load == "strict")
    return model.requires_grad_(False).eval()


@contextmanager
def _parent_checkpoint(
    origin: ParentRecord, asked: Parent | None, directory: RunDirectory, comm: Communicator
) -> Iterator[tuple[str, Checkpoint]]:
    """Within the block, the checkpoint of a parent, and its run's URL; or weights that no run made, and their path.

    Raises NoLoadableCheckpoint if the checkpoint is damaged, and ConfigError if the weights are gone.
    """
    if origin.foreign:
        paths = on_rank_zero(comm, lambda: [*map(str, origin.unchanged_files(asked))])
        if not paths:
            raise ConfigError(f"{origin.run} is gone, and this run needs its weights: restore it")
        yield origin.run, read_weights([*map(Path, paths)], comm)
        return
    parent, commit = CheckpointStore(_parent_location(origin, asked, directory)), parse_commit(f"{origin.commit}.json")
    if commit is None:
        raise StorageError(printable(f"run.json names a parent's checkpoint that no run has: {origin.commit!r}"))
    try:
        yield parent.location.url, parent.open(commit, comm)
    except Damaged as error:
        why = f"and this run begins from its step {origin.step}"
        raise NoLoadableCheckpoint(_nothing_loadable(parent, why, [_describe_damage(commit, error)])) from error


def _parent_location(origin: ParentRecord, asked: Parent | None, directory: RunDirectory) -> Location:
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
            "(a fork: with run.on_drift=fork), or start a new run with run.parent=... run.name=..."
        )
    return open_location(origin.run, directory.options if is_remote(origin.run) else None)


def resolve(parent: Parent) -> ParentRecord:
    """The checkpoint that a new run begins from, with all its bytes verified.

    Raises ConfigError for a run or a step that does not exist, NoLoadableCheckpoint.
    """
    run = parent.source.run
    if files := weight_files(run):
        if parent.inherit != "model":
            raise ConfigError(f"run.inherit={parent.inherit}: {run} has weights only; leave run.inherit out")
        return ParentRecord(run, 0, digest_of(files), parent.inherit, parent.asked, parent.load)
    directory = RunDirectory.at(run, parent.options)
    checkpoint, _ = read(directory, parent.source.checkpoint, Checkpoint.verify)
    commit, url = str(checkpoint.id), directory.location.url
    return ParentRecord(url, checkpoint.step, commit, parent.inherit, parent.asked, parent.load)


def read(directory: RunDirectory, which: int | str | None, take: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    """The newest undamaged checkpoint (or that of a step, or the ``best``), and the result of ``take`` for it.

    Raises ConfigError, naming the steps there are, and NoLoadableCheckpoint.
    """
    store = CheckpointStore(directory.location)
    damage: list[str] = []
    for commit in _select_commits(store, which, directory):
        try:
            checkpoint = store.open(commit)
            return checkpoint, take(checkpoint)
        except Damaged as error:
            damage.append(_describe_damage(commit, error))
    raise NoLoadableCheckpoint(_nothing_loadable(store, "and one is needed", damage))


def evaluated_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that were evaluated: the averaged ones if there are any. Raises Damaged."""
    if "average" not in checkpoint.parts:
        return {saved_name(name): tensor for name, tensor in checkpoint.load("model").items()}
    average = checkpoint.load("average").items()
    return {saved_name(name.removeprefix("module.")): tensor for name, tensor in average if name.startswith("module.")}


def read_step(
    store: CheckpointStore, step: int, take: Callable[[Checkpoint], T], comm: Communicator = SINGLE_PROCESS
) -> T:
    """The result of ``take`` for an undamaged checkpoint of ``step``. Raises Damaged where none is kept."""
    failure = Damaged("its checkpoint is gone")
    for commit in _listed(store, comm):
        if commit.step == step:
            try:
                return take(store.open(commit, comm))
            except Damaged as error:
                failure = error
    raise failure


def load_model(facts: RunFacts, which: int | str | None) -> nn.Module:
    """The model on the CPU in evaluation mode with its evaluated weights, which are the averaged ones if there are any.
    The random generators stay as they are.

    ``which``: a step, ``"best"`` by the objective, or ``"last"``; None: the best, or the last without an objective.
    Raises ConfigError for a step that is not kept, NoLoadableCheckpoint, and StateError for a model that the code
    builds differently now.
    """
    checkpoint, weights = _read_best_or_last(facts, which, evaluated_weights)
    model: nn.Module = rebuild(facts, "model").cpu()
    resized = checkpoint.facts.get("structure", {}).get("buffers", {})
    buffers = {name.removeprefix("module.") for names in resized.values() for name in names}
    Structure({"model": model}, None, partial(rebuild, facts, "model")).resize("model", buffers, weights)
    live = {saved_name(name): name for name in model.state_dict()}
    try:
        model.load_state_dict({live.get(name, name): value for name, value in weights.items()})
    except Exception as error:  # a user's code may load it
        url = facts.directory.location.url
        raise StateError(
            f"the weights of step {checkpoint.step} of {url} do not fit the model as it is built now: {error}\n"
            f"python -m runner.runs show --code says what code the run was made with"
        ) from error
    return model.eval()


def load_task(facts: RunFacts, which: int | str | None) -> Task:
    """The task with the state that it had at a checkpoint; ``which`` as for ``load_model``."""
    task: Task = rebuild(facts, "task")
    if hasattr(task, "load_state_dict"):
        _, state = _read_best_or_last(facts, which, lambda each: each.load("task") if "task" in each.parts else None)
        if state is not None:
            task.load_state_dict(state)
    return task


def rebuild(facts: RunFacts, key: str) -> Any:
    """The object under a key of the configuration, newly built. Raises ConfigError if that is not possible."""
    with temporary_seed(0):
        return instance(OmegaConf.select(OmegaConf.create(facts.identity), key), key)


def _read_best_or_last(
    facts: RunFacts, which: int | str | None, take: Callable[[Checkpoint], T]
) -> tuple[Checkpoint, T]:
    if which is None and (facts.identity.get("objective") or {}).get("metric"):
        with suppress(ConfigError):  # nothing was evaluated yet
            return read(facts.directory, "best", take)
    return read(facts.directory, None if which == "last" else which, take)


def read_weights(files: Sequence[Path], comm: Communicator) -> Checkpoint:
    """The tensors of safetensors files, as a checkpoint that has nothing but a model: without the prefixes of
    torch.compile, and of DistributedDataParallel where all names have it. Raises ConfigError.
    """
    keys: dict[str, tuple[Path, str]] = {}
    kinds: dict[str, Kind] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in sorted(file.keys()):
                    stored = file.get_slice(key)
                    name = saved_name(f"model/{key}")
                    keys[name], kinds[name] = (path, key), Kind(stored.get_dtype(), tuple(stored.get_shape()))
        except (SafetensorError, Damaged, OSError) as error:
            raise ConfigError(f"run.parent: {path} cannot be read as safetensors: {error}") from error
    if all(name.startswith("model/module.") for name in keys):
        keys = {name.replace("/module.", "/", 1): key for name, key in keys.items()}
        kinds = {name.replace("/module.", "/", 1): kind for name, kind in kinds.items()}
    group = FileGroup(1, kinds)
    like = {name.removeprefix("model/"): torch.empty(0) for name in kinds}  # only their names are encoded
    places = {name: TensorBytes(group, name, 0) for name in kinds}
    value, _ = encode(like, "model")
    return Checkpoint(CommitId(0, 0, ""), 1, {}, {"model": value}, places, {}, _SafetensorsReader(keys), comm)


class _SafetensorsReader(Reader):
    def __init__(self, keys: Mapping[str, tuple[Path, str]]) -> None:
        self._keys = keys

    def read(self, wanted: Mapping[str, tuple[TensorBytes, range]]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            paths = {self._keys[place.name][0] for place, _ in wanted.values()}
            files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            for name, (place, rows) in wanted.items():
                path, key = self._keys[place.name]
                tensor = files[path].get_tensor(key)
                tensors[name] = (tensor[rows.start : rows.stop] if tensor.dim() else tensor).clone()
        return tensors


def _listed(store: CheckpointStore, comm: Communicator) -> list[CommitId]:
    """The commits, the newest first, as rank 0 lists them."""
    names = on_rank_zero(comm, lambda: [commit.commit for commit in store.commits()])
    return [*filter(None, (parse_commit(name.rpartition("/")[2]) for name in names))]


def _select_commits(store: CheckpointStore, which: int | str | None, directory: RunDirectory) -> list[CommitId]:
    """The commits that ``which`` allows, the preferred commit first."""
    commits = store.commits()
    if which is None:
        return commits
    if which == "best":
        goal, infos = (directory.identity() or {}).get("objective") or {}, store.survey()
        if best := best_first(infos, goal.get("mode") if goal.get("metric") else None):
            which = best[0].id.step
        elif all(info.damaged for info in infos):
            return commits  # opening them reports the damage of each
        else:
            raise ConfigError(f"{store.location.url} has no checkpoint with an objective; give a step, as in ...@100")
    of_step = [commit for commit in commits if commit.step == which]
    if commits and not of_step:
        steps = ", ".join(map(str, sorted({commit.step for commit in commits})))
        raise ConfigError(
            f"{store.location.url} has no checkpoint of step {which}; it has checkpoints of steps {steps}"
        )
    return of_step


def _load(
    state: TrainState,
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    *,
    without: tuple[str, ...] = (),
    callbacks: bool = True,
) -> None:
    """Load all parts, but keep the settings of optimizer and scheduler that the user changed since, and accepted."""
    changed = compare(checkpoint.facts.get("identity", identity), identity)
    if not any(difference.key.split(".")[0] in ("optimizer", "scheduler") for difference in changed):
        state.restore(checkpoint, without=without, callbacks=callbacks)
        return
    keys = {difference.key.rpartition(".")[2] for difference in changed}
    optimizers, schedulers = by_name(state.optimizer), by_name(state.scheduler)
    groups = {name: optimizer.state_dict()["param_groups"] for name, optimizer in optimizers.items()}
    schedules = {name: dict(scheduler.state_dict()) for name, scheduler in schedulers.items()}
    state.restore(checkpoint, without=(*without, *parts_of("scheduler", state.scheduler)), callbacks=callbacks)
    for name, interval in by_name(state.scheduler_interval).items():
        _keep_settings(optimizers[name], groups[name], lr=interval == "evaluation" and "lr" not in keys)
        scheduler = schedulers[name]
        if interval == "evaluation":  # the objectives that it has seen cannot be repeated
            settings = {key: value for key, value in schedules[name].items() if key in keys}
            part = f"scheduler.{name}" if name else "scheduler"
            scheduler.load_state_dict({**checkpoint.load(part), **settings})
            continue
        for _ in range(state.progress.step if interval == "step" else state.stream.epochs):
            scheduler.step()


def _keep_settings(optimizer: Any, groups: list[dict[str, Any]], *, lr: bool) -> None:
    """Give the ``groups`` of a restored optimizer the settings that they were built with. Groups and keys that training
    added stay as they are, and so do the rates if ``lr``, which no other scheduler would compute again.
    """
    state_dict = optimizer.state_dict()
    excluded_keys = {"params", "param_names", *(["lr"] * lr)}
    new_settings = [{k: v for k, v in group.items() if k not in excluded_keys} for group in groups]
    new_settings += [{}] * (len(state_dict["param_groups"]) - len(new_settings))
    now = [{**group, **settings} for group, settings in zip(state_dict["param_groups"], new_settings, strict=False)]
    optimizer.load_state_dict({**state_dict, "param_groups": now})
    retype(optimizer.state_dict().get("state"), state_dict.get("state"))


def _require_finite(state: TrainState, commit: CommitId) -> None:
    weights = dict(state.model.named_parameters())
    bad = next((name for name in state.trained() if not is_finite(local(weights[name].detach()))), None)
    if bad is not None:
        raise NonFiniteError(f"step {commit.step} was saved with NaN or infinity in {bad}, like every step after it")


def _describe_damage(commit: CommitId, error: Damaged) -> str:
    return printable(f"step {commit.step} of attempt {commit.attempt}: {error}")


def _nothing_loadable(store: CheckpointStore, why: str, damage: list[str]) -> str:
    commits = "\n".join(f"  {line}" for line in damage) or "  commits/ is empty"
    return (
        f"{store.location.url} has no checkpoint that can be loaded, {why}:\n{commits}\n"
        "Nothing was deleted and nothing was started from scratch. Restore the files from a copy, "
        "or start a new run with run.name=..."
    )

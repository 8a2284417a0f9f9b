"""The way up: from whatever a run directory holds to a state to go on from."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.checkpoint.manifest import CommitId
from runner.checkpoint.store import Checkpoint, CheckpointStore
from runner.checkpoint.tensors import Damaged
from runner.errors import NoLoadableCheckpoint, printable
from runner.rng import seed_all
from runner.run.drift import compare
from runner.seeds import derive
from runner.state import TrainState


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where an attempt goes on: at ``commit``, or from scratch. ``unusable`` tells of newer commits that are bad."""

    commit: CommitId | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.commit.step if self.commit else 0


def restore_newest(
    state: TrainState, store: CheckpointStore, identity: dict[str, Any], *, evidence: Callable[[], str | None]
) -> Resumed:
    """Load the newest good checkpoint, or begin from scratch on positive evidence that nothing was ever committed.

    ``evidence`` names a trace of a commit, if there is one. Raises NoLoadableCheckpoint; then nothing was changed.
    """
    unusable: list[str] = []
    for commit in store.commits():
        try:
            checkpoint = store.open(commit)
            _restore(state, checkpoint, identity)
            store.verified.add(commit)
            return Resumed(commit, checkpoint.facts, tuple(unusable))
        except Damaged as error:
            store.damaged.add(commit)
            unusable.append(_why(commit, error))
    trace = evidence()
    if trace is not None:
        raise NoLoadableCheckpoint(_nothing_loadable(store, trace, unusable))
    begin(state, identity["seed"])
    return Resumed(unusable=tuple(unusable))


def fork(state: TrainState, parent: CheckpointStore, identity: dict[str, Any]) -> Resumed:
    """Take over the newest good state of another run, without what its callbacks remember.

    The data position is taken over where it means the same samples. Raises NoLoadableCheckpoint.
    """
    unusable: list[str] = []
    for commit in parent.commits():
        try:
            checkpoint = parent.open(commit)
            same_data = not state.stream.changes(checkpoint.load("data"))
            if not same_data:
                state.stream.open()
            _restore(state, checkpoint, identity, without=() if same_data else ("data",), memories=False)
            return Resumed(commit, unusable=tuple(unusable))
        except Damaged as error:
            unusable.append(_why(commit, error))
    raise NoLoadableCheckpoint(_nothing_loadable(parent, "a fork needs a checkpoint of its parent", unusable))


def begin(state: TrainState, seed: int) -> None:
    """Start from scratch: open what draws random numbers, then seed what training draws."""
    state.stream.open()
    seed_all(derive("train", seed))


def _restore(
    state: TrainState,
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    *,
    without: tuple[str, ...] = (),
    memories: bool = True,
) -> None:
    """Load all parts. Settings of optimizer and scheduler changed since (and accepted) win over the saved ones."""
    changed = compare(checkpoint.facts.get("identity", identity), identity)
    if not any(difference.key.split(".")[0] in ("optimizer", "scheduler") for difference in changed):
        state.restore(checkpoint, without=without, memories=memories)
        return
    groups = state.optimizer.state_dict()["param_groups"]
    state.restore(checkpoint, without=(*without, "scheduler"), memories=memories)
    saved = state.optimizer.state_dict()
    state.optimizer.load_state_dict({**saved, "param_groups": groups})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(state.progress.step):
            state.scheduler.step()


def _why(commit: CommitId, error: Damaged) -> str:
    return printable(f"step {commit.step} of attempt {commit.attempt}: {error}")


def _nothing_loadable(store: CheckpointStore, trace: str, unusable: list[str]) -> str:
    found = "\n".join(f"  {line}" for line in unusable) or "  commits/ is empty"
    return (
        f"{store.location.url} has no checkpoint that can be loaded, although one was committed ({trace}):\n{found}\n"
        "Nothing was deleted and nothing was started from scratch. Restore the files from a copy, "
        "or begin a new run with run.name=..."
    )

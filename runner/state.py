"""The state of a run: an ordered, named list of parts, all of which a resume restores."""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from runner.checkpoint.checkpoint import Checkpoint
from runner.checkpoint.sharding import local
from runner.checkpoint.structure import Structure, groups_key
from runner.checkpoint.tensor_file import memory_key
from runner.data.stream import TrainingStream
from runner.distributed.communicator import PerRank, on_all_ranks
from runner.errors import RunnerError, StateError
from runner.hashing import derive
from runner.optimizers import Named, by_name, parts_of, saved_name
from runner.rng import Generators, seed_all

_CALLBACK_PREFIX = "callback."


@runtime_checkable
class Stateful(Protocol):
    """The protocol of torch.distributed.checkpoint.stateful, which takes a second to import."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(slots=True)
class Progress:
    """How many optimizer steps are done."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


@dataclass(slots=True)
class TrainState:
    """The live objects of a run; ``parts`` has them in the order in which they are restored. The task and callbacks may
    have weights that the optimizer trains, and come before it; the random generators come last, because opening the
    data draws random numbers.

    ``update`` holds the loss scale and the count of skipped steps. ``average`` is the moving average of the weights.
    ``task`` and ``stateful_callbacks`` are part of the state only if they have a ``state_dict``. ``structure`` is what
    the configuration builds, into which a resume loads. The scheduler steps after each ``scheduler_interval``:
    ``step``, ``epoch`` or ``evaluation``. With several optimizers, ``optimizer``, ``scheduler`` and
    ``scheduler_interval`` are ``Named``: ``state.optimizer["generator"]``.
    """

    model: nn.Module
    optimizer: Any
    scheduler: Any
    update: Stateful
    average: nn.Module | None
    task: Stateful | None
    stream: TrainingStream
    progress: Progress
    stateful_callbacks: dict[str, Stateful] = field(default_factory=dict)
    generators: Generators = field(default_factory=Generators)
    structure: Structure | None = None
    scheduler_interval: Any = "step"

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and exported: the averaged one if there is one."""
        if self.average is None:
            return self.model
        averaged: nn.Module = self.average.module  # type: ignore[assignment]
        return averaged

    def parts(self) -> dict[str, Stateful]:
        """Every part by name, in the order of restoring."""
        parts: dict[str, Stateful | None] = {
            "model": self.model,
            "task": self.task,
            **{_CALLBACK_PREFIX + name: memory for name, memory in self.stateful_callbacks.items()},
            **parts_of("optimizer", self.optimizer),
            **parts_of("scheduler", self.scheduler),
            "update": self.update,
            "average": self.average,
            "data": self.stream,
            "progress": self.progress,
            "generators": self.generators,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def schedulers(self, interval: str) -> list[Any]:
        """The schedulers that step after each ``step``, ``epoch`` or ``evaluation``."""
        if not isinstance(self.scheduler, Named):
            return [self.scheduler] if self.scheduler_interval == interval else []
        intervals = by_name(self.scheduler_interval)
        return [each for name, each in by_name(self.scheduler).items() if intervals[name] == interval]

    def state_dict(self) -> dict[str, Any]:
        """The state dict of every part; tensors are the live ones."""
        return {name: _state_of(part) for name, part in self.parts().items()}

    def changes(self) -> dict[str, Any]:
        """How the structure differs from the built one, for the facts of a commit: a restore makes these changes first.

        Raises StateError for a state that could not be restored.
        """
        if self.structure is None:
            return {}
        optimizer = getattr(self.update, "optimizer", self.optimizer)
        return self.structure.changes(self.progress.step, self.parts(), optimizer)

    def weights(self) -> list[str]:
        """The names, in a checkpoint, of the tensors that have to be finite."""
        return [f"{part}{saved_name(name)}" for part in ("model/", "average/module.") for name in self.trained()]

    def trained(self) -> list[str]:
        """The names of the weights that have to be finite: those that are trained, and were finite when built."""
        nonfinite = self.structure.nonfinite if self.structure else ()
        return [name for name, p in self.model.named_parameters() if p.requires_grad and name not in nonfinite]

    def restore(self, checkpoint: Checkpoint, *, without: Container[str] = (), callbacks: bool = True) -> None:
        """Load every part that is not in ``without``; the callbacks only with ``callbacks``.

        Raises StateError for parts that do not fit, Damaged for bad bytes.
        """
        parts = {n: part for n, part in self.parts().items() if callbacks or not n.startswith(_CALLBACK_PREFIX)}
        saved = [name for name in checkpoint.parts if callbacks or not name.startswith(_CALLBACK_PREFIX)]
        _require_same(parts, saved, checkpoint)
        same_types = True
        for name, part in parts.items():
            if name in without:
                continue
            state = self._load(name, part, checkpoint)
            if part is self.model:
                same_types = _types(part.state_dict()) == _types(state)
            elif name in parts_of("optimizer", self.optimizer) and same_types:
                retype(part.state_dict().get("state"), state.get("state"))
        if checkpoint.comm.rank >= checkpoint.world_size:  # a new rank, which has loaded rank 0's generators
            seed_all(derive("rank", torch.initial_seed(), checkpoint.step, checkpoint.comm.rank))

    def inherit(self, checkpoint: Checkpoint, *, strict: bool) -> list[str]:
        """Load the weights only, and the averaged weights if both the checkpoint and this run have them. Unless
        ``strict``, tensors without a counterpart of their name and shape stay as they are, and are described in the
        lines that are returned. Integers, as of a quantized model, fit integers only.

        Raises StateError for weights that do not fit, Damaged for bad bytes.
        """
        places = {n.removeprefix("model/"): at for n, at in checkpoint.places.items() if n.startswith("model/")}
        theirs = {saved_name(n): _layout(place.kind.shape, place.kind.empty((0,))) for n, place in places.items()}
        live = {saved_name(name): value for name, value in self.model.state_dict().items()}
        shapes = {n: _layout(value.shape, value) for n, value in live.items() if isinstance(value, Tensor)}
        matches = {name for name, shape in shapes.items() if theirs.get(name) == shape}
        memory = {memory_key(local(live[name])) for name in matches}  # a weight that is used twice may be saved once
        only_there = [f"{name} {shape}" for name, shape in theirs.items() if name not in matches]
        others = {name: shape for name, shape in shapes.items() if name not in matches}
        only_here = [f"{name} {shape}" for name, shape in others.items() if memory_key(local(live[name])) not in memory]
        if not matches:
            first = f"the first are {next(iter(theirs), None)} there and {next(iter(shapes), None)} here"
            mismatch = f"no weight of step {checkpoint.step} of the parent has a name and shape of this model"
            raise StateError(f"{mismatch}: {first}")
        for name, place in places.items() if strict else ():
            key = saved_name(name)
            value = live.get(key)
            if isinstance(value, Tensor) and _kind(value) != _kind(place.kind.empty((0,))):  # torch would convert it
                raise StateError(f"{key} is {theirs[key]} in the parent and {shapes[key]} in this model")
        differs = bool(only_there or only_here)
        whole = strict if differs else len(matches) == len(shapes)  # if strict, torch says what does not fit
        self._load("model", self.model, checkpoint, only=None if whole else matches)
        if self.average is not None and "average" in checkpoint.parts and not differs:
            self._load("average", self.average, checkpoint)
        elif self.average is not None:
            self.evaluated_model.load_state_dict(self.model.state_dict())
        lines = {"not used, of the parent": only_there, "not in the parent, as they were built": only_here}
        return [f"{title}: {', '.join(names)}" for title, names in lines.items() if names]

    def _load(self, name: str, part: Stateful, checkpoint: Checkpoint, *, only: Collection[str] | None = None) -> Any:
        """Load a part, and return its state. A sharded part is loaded in the layout of its live state, or of the state
        that its method ``like`` returns. Of a module, ``only`` the tensors of these saved names, if they are given.
        """

        def load() -> None:
            if only is not None:
                part.load_state_dict(
                    {**part.state_dict(), **{key: state[key] for key in state if saved_name(key) in only}}
                )
                return
            if self.structure is not None and name in self.structure.modules:
                buffers = checkpoint.facts.get("structure", {}).get("buffers", {})
                self.structure.resize(name, buffers.get(name, ()), state)
            part.load_state_dict(state)

        try:
            if self.structure is not None and name in self.structure.groups:
                self.structure.regroup(name, _groups(checkpoint, self.structure, name), self.parts())
            live = getattr(part, "like", part.state_dict)() if checkpoint.comm.size > 1 else None
            if live is not None and isinstance(part, nn.Module):
                names = {
                    key: saved_name(key) if f"{name}/{saved_name(key)}" in checkpoint.places else key for key in live
                }
                live = {names[key]: value for key, value in live.items() if only is None or saved_name(key) in only}
            state = checkpoint.load(name, like=live)
            if isinstance(part, nn.Module):
                state = _live_names(part, state)
            on_all_ranks(checkpoint.comm, load)
        except RunnerError:
            raise
        except Exception as error:
            message = f"the {name} of this run does not fit what step {checkpoint.step} saved: {error}"
            raise StateError(message, kind="restore") from error
        return state


def _live_names(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved state under the names that the module's tensors have now."""
    live = {saved_name(name): name for name in module.state_dict()}
    if all(saved == name for saved, name in live.items()) and all(name == saved_name(name) for name in state):
        return state
    return {live.get(saved_name(name), name): value for name, value in state.items()}


def _state_of(part: Stateful) -> dict[str, Any]:
    state = part.state_dict()
    if isinstance(part, nn.Module) and any(name != saved_name(name) for name in state):
        return {saved_name(name): value for name, value in state.items()}
    return PerRank(state) if isinstance(part, Generators) else state  # each rank draws for itself


def _groups(checkpoint: Checkpoint, structure: Structure, part: str) -> list[list[str]] | None:
    """The names of the weights in each group of an optimizer, or None where the groups are as they were built.
    Checkpoints of earlier versions have names only if the optimizer was given named weights.
    """
    groups: list[list[str]] | None = checkpoint.facts.get("structure", {}).get(groups_key(part))
    saved = checkpoint.parts[part].get("param_groups", [])
    if groups or [len(group["params"]) for group in saved] == [*map(len, structure.groups[part])]:
        return groups
    named = [[f"model/{name}" for name in group["param_names"]] for group in saved if "param_names" in group]
    return named if len(named) == len(saved) else None


def _layout(shape: Collection[int], tensor: Tensor) -> str:
    """The shape, and the kind of numbers if they are not floats."""
    kind = _kind(tensor)
    return f"{[*shape]}" if kind == "floats" else f"{[*shape]} ({kind})"


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floats" if tensor.is_floating_point() else "integers"


def _types(state: Mapping[str, Any]) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in state.items() if isinstance(value, Tensor)}


def retype(now: Any, saved: Any) -> Any:
    """The state ``now`` of an optimizer after loading, with the dtypes of ``saved``. torch casts it to those of the
    weights: moments in fp32 beside weights in bf16, or the product of NAdam, would continue with other bits.
    """
    if isinstance(now, Tensor) and isinstance(saved, Tensor):
        return now if now.dtype == saved.dtype else saved.to(now.device)
    if isinstance(now, dict) and isinstance(saved, dict):
        now.update({key: retype(now[key], value) for key, value in saved.items() if key in now})
    elif isinstance(now, list) and isinstance(saved, list):
        now[:] = map(retype, now, saved)
    return now


def _require_same(now: Collection[str], saved: Collection[str], checkpoint: Checkpoint) -> None:
    missing, unknown = sorted({*now} - {*saved}), sorted({*saved} - {*now})
    if missing or unknown:
        raise StateError(
            f"{checkpoint.id.commit} does not hold the parts of this run: missing {', '.join(missing) or 'none'}, left "
            f"over {', '.join(unknown) or 'none'}. Code or settings changed since. Restore them, or start a new run "
            "from this state with run.on_drift=fork.",
            kind="structure",
        )

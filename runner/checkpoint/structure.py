"""The structure of a state: how the configuration builds it, and what training has changed since.

A resume loads into the objects that the configuration builds. Where training changed their structure (buffers of
another size, other groups of the optimizer), the commit says what a restore has to change first. A state that no
restore could bring back is not saved.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from runner.checkpoint.sharding import is_distributed, local
from runner.checkpoint.tensor_file import is_finite
from runner.errors import StateError
from runner.optimizers import parts_of, saved_name
from runner.rng import temporary_seed

log = logging.getLogger("runner")

TensorType = tuple[tuple[int, ...], torch.dtype] | None  # of a tensor; None for any other value


class Structure:
    """The ``parts`` of a state as they are built: names, shapes and types of the model and of its average, and the
    groups of the ``optimizer`` that updates the weights.

    ``build`` builds another model, to test whether the model's own code for loading accepts the present structure.
    ``nonfinite`` are weights that were built with NaN or infinite elements.
    """

    def __init__(self, parts: Mapping[str, Any], optimizer: Any, build: Callable[[], nn.Module]) -> None:
        self.parts = {**parts, **parts_of("optimizer of the update", optimizer)}
        self.modules: dict[str, nn.Module] = {part: parts[part] for part in ("model", "average") if part in parts}
        self.tensor_types = {part: _tensor_types(module) for part, module in self.modules.items()}
        self.groups = {name: _groups(each) for name, each in parts_of("optimizer", optimizer).items()}
        self._declared = {part: _declared(module) for part, module in self.modules.items()}
        self._weights: dict[str, Tensor] = dict(self.modules["model"].named_parameters(remove_duplicate=False))
        self.nonfinite = {name for name, weight in self._weights.items() if not is_finite(local(weight.detach()))}
        self._build = build
        self._loadable: set[str] = set()  # tensors that the model's own code loads
        self._inner: set[str] = set()  # optimizers inside of others whose state was looked for

    def changes(self, step: int, parts: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
        """What a restore of this step has to change first, as JSON: names of ``buffers`` in other sizes by part, and of
        the weights in each of the ``groups``. Raises StateError for a state that could not be restored.
        """
        for name, part in {**parts, **parts_of("optimizer of the update", optimizer)}.items():
            if self.parts.get(name, part) is not part:
                raise _state_error(step, f"the {name} was replaced by another {type(part).__qualname__}")
        buffers = {part: self._buffers(part, module, step) for part, module in self.modules.items()}
        changes: dict[str, Any] = {"buffers": buffers} if any(buffers.values()) else {}
        for name, each in parts_of("optimizer", optimizer).items():
            groups = self._regrouped(step, parts, name, _groups(each))
            changes |= {} if groups is None else {groups_key(name): groups}
            self._warn_of_inner_state(name, each)
        return changes

    def _warn_of_inner_state(self, name: str, optimizer: Any) -> None:
        """SAM and its like wrap another optimizer, whose state their state_dict may lack."""
        for attribute, inner in getattr(optimizer, "__dict__", {}).items():
            path = f"{name}.{attribute}"
            if not isinstance(inner, Optimizer) or not inner.state or path in self._inner:
                continue
            self._inner.add(path)
            kept, saved = _tensors([*inner.state.values()]), _tensors(optimizer.state_dict())
            largest = max(kept, key=Tensor.numel, default=None)
            if largest is not None and not any(torch.equal(largest, each) for each in saved):
                outer, text = type(optimizer).__qualname__, "state    %s (%s) has state that the state_dict of %s lacks"
                log.warning(f"{text}: a resume will not be exact. Save it there", path, type(inner).__qualname__, outer)

    def resize(self, part: str, buffers: Iterable[str], state: Mapping[str, Any]) -> None:
        """Make the ``buffers``, and those that an earlier call changed, in the sizes and types of ``state``."""
        now = _tensor_types(self.modules[part])
        changes = {name for name, kind in self.tensor_types[part].items() if now.get(name) != kind}
        _resize(self.modules[part], {*buffers, *changes}, state)

    def regroup(self, part: str, names: Sequence[Sequence[str]] | None, parts: Mapping[str, Any]) -> None:
        """Put the weights of these names into the groups of an optimizer, the ``part`` of this name; without ``names``,
        the weights that were built. Added groups have the settings of the first group until they are loaded. Raises
        KeyError for an unknown name.
        """
        weights, groups = _weights(parts) if names else {}, getattr(parts[part], "param_groups", [])
        tensors = [[weights[saved_name(name)] for name in group] for group in names] if names else self.groups[part]
        settings = {key: value for group in groups[:1] for key, value in group.items() if key != "param_names"}
        del groups[len(tensors) :]
        groups += [dict(settings) for _ in tensors[len(groups) :]]
        for group, weights_of_group in zip(groups, tensors, strict=True):
            group["params"] = [*weights_of_group]

    def _buffers(self, part: str, module: nn.Module, step: int) -> list[str]:
        """The buffers that a restore has to make again. Raises StateError if anything else is not as it was built."""
        before, now = self.tensor_types[part], _tensor_types(module)
        changes = [name for name in {**before, **now} if before.get(name, ()) != now.get(name, ())]
        shared = _declared(module)  # loaded into one tensor, buffers that were one when built would all be the last
        changes += [name for name in shared if name in now and self._declared[part].get(name, name) != shared[name]]
        buffers = self._declared[part].keys() & shared if changes else set()
        others = [name for name in changes if name not in buffers and name not in self._loadable]
        if others and not (part == "model" and self._can_load(module, buffers, now)):
            name = others[0]
            raise _state_error(
                step, f"{part}/{name} is {_words(now, name)}, and was {_words(before, name)} at the start"
            )
        self._loadable.update(others)
        return [name for name in dict.fromkeys(changes) if name in buffers]

    def _can_load(self, module: nn.Module, buffers: set[str], now: Mapping[str, TensorType]) -> bool:
        """Whether the model's own code for loading gives a new model the structure of this one."""
        if not any(map(_has_own_loading, module.modules())):
            return False
        with temporary_seed(0):
            model, state = self._build(), module.state_dict()
            _resize(model, buffers, state)
            try:
                model.load_state_dict(state)
            except Exception:  # a user's code may raise anything
                return False
        return _tensor_types(model) == now

    def _regrouped(
        self, step: int, parts: Mapping[str, Any], part: str, groups: list[list[Tensor]]
    ) -> list[list[str]] | None:
        """The names of the weights in each group; None where they are in the groups that were built."""
        names = {id(weight): name for name, weight in _weights(parts).items()}
        if sharded := any(map(is_distributed, self._weights.values())):  # gathered, they are other tensors
            names |= {id(weight): f"model/{saved_name(name)}" for name, weight in self._weights.items()}
        trained = {id(weight) for group in groups for weight in group}
        now = dict(self.modules["model"].named_parameters(remove_duplicate=False))
        for name, weight in self._weights.items():
            if now.get(name) is not weight and id(weight) in trained and not sharded:
                raise _state_error(step, f"model/{name} was replaced, and the optimizer still trains the tensor before")
        if [[*map(id, group)] for group in groups] == [[*map(id, group)] for group in self.groups[part]]:
            return None
        for number, group in enumerate(groups):
            for weight in group:
                if id(weight) not in names:
                    problem = f"group {number} of the {part} has a tensor of shape {[*weight.shape]} that is no weight"
                    raise _state_error(step, f"{problem} of the model, nor of a task or callback with a state_dict")
        return [[names[id(weight)] for weight in group] for group in groups]


def groups_key(part: str) -> str:
    """Where the facts of a commit have the changed groups of an optimizer, by the name of its part."""
    return f"groups{part.removeprefix('optimizer')}"


def _tensor_types(module: nn.Module) -> dict[str, TensorType]:
    """Shape and type of every tensor of a module's state."""
    state = module.state_dict().items()
    return {name: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None for name, value in state}


def _resize(module: nn.Module, buffers: Collection[str], state: Mapping[str, Any]) -> None:
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    for name in _declared(module).keys() & buffers:
        path, _, own = name.rpartition(".")
        value = state.get(name)
        module.get_submodule(path)._buffers[own] = None if value is None else torch.empty_like(value, device=device)


def _weights(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the parts that are restored before the optimizer, by name: those of modules, and of other parts
    the modules and tensors among their attributes. A shared weight has the name in the first part.
    """
    named_by_id: dict[int, tuple[str, Tensor]] = {}
    for part, owner in takewhile(lambda item: not item[0].startswith("optimizer"), parts.items()):
        attributes = getattr(owner, "__dict__", {}).items()
        inner = [("", owner)] if isinstance(owner, nn.Module) else [(f"{name}.", value) for name, value in attributes]
        for path, value in inner:
            pairs = value.named_parameters() if isinstance(value, nn.Module) else [("", value)]
            for name, weight in pairs:
                if isinstance(weight, Tensor):
                    named_by_id.setdefault(id(weight), (saved_name(f"{part}/{path}{name}").rstrip("."), weight))
    return dict(named_by_id.values())


def _groups(optimizer: Any) -> list[list[Tensor]]:
    return [[*group["params"]] for group in getattr(optimizer, "param_groups", ())]


def _tensors(state: Any) -> list[Tensor]:
    return [local(leaf.detach()).cpu() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def _declared(module: nn.Module) -> dict[str, str]:
    """The names of all buffers, also of those that are None, and the first name of the same tensor."""
    first: dict[int, str] = {id(None): ""}
    modules = module.named_modules(remove_duplicate=False)
    named = ((f"{path}.{own}".lstrip("."), b) for path, inner in modules for own, b in inner._buffers.items())
    return {name: first.setdefault(id(buffer), name) for name, buffer in named}


def _has_own_loading(module: nn.Module) -> bool:
    """Whether the module has loading code of its own."""
    methods = (getattr(type(module), name) for name in ("load_state_dict", "_load_from_state_dict"))
    return bool(module._load_state_dict_pre_hooks) or any(not m.__module__.startswith("torch.") for m in methods)


def _words(types: Mapping[str, TensorType], name: str) -> str:
    kind = types.get(name)
    return f"a {kind[1]} tensor of shape {[*kind[0]]}" if kind else "no tensor" if name in types else "absent"


def _state_error(step: int, what: str) -> StateError:
    return StateError(
        f"the state of step {step} is not saved, because no resume could load it: {what}. A resume begins with what "
        "the configuration builds. Make it in the constructor, in its last size, or give the model a "
        "_load_from_state_dict that makes it; groups of the optimizer may get the weights that the model, the task or "
        "a callback have. Checkpoints from before are kept.",
        kind="structure",
    )

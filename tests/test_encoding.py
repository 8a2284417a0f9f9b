"""State as strict JSON and tensors, and back."""

import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from runner.checkpoint.encoding import decode, encode
from runner.errors import StateError


def there_and_back(state: Any) -> Any:
    value, tensors = encode(state, "part")
    return decode(json.loads(json.dumps(value, allow_nan=False)), lambda name: tensors[name].clone())


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, to the bit, all the way down; and dicts in the same order."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and same([*a], [*b]) and same([*a.values()], [*b.values()])
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.mark.parametrize(
    "state",
    [
        None,
        True,
        0,
        -(1 << 80),
        "text with \0, \ud800 and ü",
        [],
        (),
        {},
        ((), [()], {"a": ()}),
        [1, True, 1.0, "1", None],
        {"a": {"b": [1, (2, [3, (4,)])]}},
        {1: "int", -2: "negative"},
        {True: 1, None: 2, 1.5: 3, (1, "a"): 4, math.inf: 5},
        {1: "int", "1": "text"},
        {"$": "tuple", "items": [1]},
        {"a": {"$": None}},
        {"z": 1, "a": 2},
        [0.1, -0.0, 5e-324, 1.7976931348623157e308],
        [math.inf, -math.inf, {"nan": math.nan}],
    ],
    ids=repr,
)
def test_plain_values_come_back_as_they_were(state: Any) -> None:
    assert same(there_and_back(state), state)


def test_tensors_leave_the_tree_named_by_their_path() -> None:
    a, b, c, d = (torch.tensor(float(i)) for i in range(4))
    state = {"model": OrderedDict(weight=a), "slots": [(b,)], "state": {0: {"step": c}}, "$": d}
    value, tensors = encode(state, "part")
    assert {name: int(tensor) for name, tensor in tensors.items()} == {
        "part/model/weight": 0,
        "part/slots/0/0": 1,
        "part/state/0/step": 2,
        "part/$": 3,
    }
    assert same(decode(json.loads(json.dumps(value)), tensors.__getitem__), {**state, "model": {"weight": a}})


def test_tensors_are_those_of_the_state_and_need_no_gradient() -> None:
    weight = nn.Parameter(torch.ones(3))
    _, tensors = encode([weight], "part")
    assert tensors["part/0"].data_ptr() == weight.data_ptr()
    assert not tensors["part/0"].requires_grad


def test_a_trained_tensor_stays_trained_when_restored() -> None:
    weight = torch.ones(3, requires_grad=True)
    value, tensors = encode([weight, weight * 1, weight.detach()], "part")
    one = tensors["part/0"]
    trained, result, detached = decode(json.loads(json.dumps(value)), lambda name: one)
    assert (trained.requires_grad, result.requires_grad, detached.requires_grad) == (True, False, False)
    with pytest.raises(ValueError, match=r"a torch\.int64 tensor that requires gradients"):
        decode(value, lambda name: torch.ones(3, dtype=torch.int64))


def test_counters_and_ordered_dicts_keep_their_type() -> None:
    state = {"seen": Counter({3: 2, "a": 1}), "recent": OrderedDict([("z", 1), ("a", Counter())])}
    found = there_and_back(state)
    assert found == state
    assert [type(found["seen"]), type(found["recent"]), type(found["recent"]["a"])] == [Counter, OrderedDict, Counter]
    assert [*found["recent"]] == ["z", "a"]


def test_a_module_gets_the_version_of_its_saved_state() -> None:
    state = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    found = there_and_back(state)
    assert found._metadata == state._metadata == {"": {"version": 1}, "0": {"version": 2}}


def test_a_float_of_numpy_is_kept_to_the_bit() -> None:
    assert there_and_back(np.float64(0.1)) == 0.1
    assert math.isnan(there_and_back(np.float64("nan")))


class Halved(torch.Tensor):
    """Stands for twice what it has: the kind of tensor in which optimizers of few bits keep their state."""

    def __new__(cls, inner: torch.Tensor) -> "Halved":
        made: Halved = cls._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    inner: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        whole = [2 * one.inner if isinstance(one, Halved) else one for one in arguments]
        return function(*whole, **(keywords or {}))


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


class Pair(NamedTuple):
    first: int
    second: int


class Phase(str, Enum):
    WARM = "warm"


class Level(IntEnum):
    LOW = 0


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"a": [0, {1, 2}]}, "cannot save part/a/1: it is a builtins.set"),
        ({"a": {"b": object()}}, "cannot save part/a/b: it is a builtins.object"),
        ([np.int64(1)], "cannot save part/0: it is a numpy.int64"),
        ({3: np.zeros(2)}, r"cannot save part/3: it is a numpy.ndarray. .* torch.from_numpy\(array\)"),
        (CYCLE, "cannot save part: it holds itself, or is nested too deeply"),
        ([Pair(1, 2)], "cannot save part/0: it is a test_encoding.Pair"),
        ([b"bytes"], "cannot save part/0: it is a builtins.bytes"),
        ([Phase.WARM], "cannot save part/0: it is a test_encoding.Phase"),
        ({Phase.WARM: 1}, "cannot save part: it is a test_encoding.Phase"),
        ([Level.LOW], "cannot save part/0: it is a test_encoding.Level"),
        ([defaultdict(int)], "cannot save part/0: it is a collections.defaultdict"),
        ([torch.ones(2).to_sparse()], "cannot save part/0: Tensor, torch.sparse_coo, on cpu"),
        ([torch.ones(2, device="meta")], "cannot save part/0: Tensor, torch.strided, on meta"),
        ([torch.ones(1).expand(2)], "cannot save part/0: .* with bytes of their own for each element"),
        ([Halved(torch.ones(2))], "cannot save part/0: Halved"),
        ([nn.Linear(1, 1)], "cannot save part/0: it is a torch.nn.modules.linear.Linear"),
        ({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "cannot save part/a/b: two tensors"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "cannot save part/1: two tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unrestorable_values_are_refused_by_path(state: Any, told: str) -> None:
    with pytest.raises(StateError, match=told):
        encode(state, "part")


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(StateError, match="unknown tag 'set'"):
        decode({"a": [{"$": "set", "items": []}]}, {}.__getitem__)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.95), amsgrad=True)


def adamw_named(model: nn.Module) -> Optimizer:
    return AdamW([*model.named_parameters()], lr=1e-2)


def sgd(model: nn.Module) -> Optimizer:
    return SGD([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters(), 1)], momentum=0.9)


def plain_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def halving(optimizer: Optimizer) -> Any:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def one_cycle(optimizer: Optimizer) -> Any:
    return OneCycleLR(optimizer, max_lr=0.5, total_steps=20)


def plateau(optimizer: Optimizer) -> Any:
    return ReduceLROnPlateau(optimizer, patience=0)


@pytest.mark.parametrize("make_scheduler", [halving, one_cycle, plateau])
@pytest.mark.parametrize("make_optimizer", [adamw, adamw_named, sgd, plain_sgd])
def test_optimizers_and_schedulers_resume_from_decoded_state(
    make_optimizer: Callable[[nn.Module], Optimizer], make_scheduler: Callable[[Optimizer], Any]
) -> None:
    """Three steps, restored into new objects, and three more: the weights of six steps, to the bit."""

    def build() -> tuple[nn.Module, Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(model)
        return model, optimizer, make_scheduler(optimizer)

    def train(model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.arange(6.0).view(2, 3)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))

    kept = build()
    for part in kept:
        assert same(there_and_back(part.state_dict()), part.state_dict())  # also before the first step
    train(*kept)
    saved = [there_and_back(part.state_dict()) for part in kept]
    train(*kept)

    resumed = build()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(*resumed)
    assert same([part.state_dict() for part in resumed], [part.state_dict() for part in kept])

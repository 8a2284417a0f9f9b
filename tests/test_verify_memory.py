"""``runner.verify`` looks at objects without a call of what they override, and sees what they hold."""

import copy
import ctypes
import decimal
import enum
import io
import itertools
import random
import sqlite3
import sys
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from runner.verify import fingerprint, memory, source, suspects
from runner.verify.fingerprint import UNSEEN


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the modules of other tests, whose memory takes seconds to look at."""
    for name in [name for name in sys.modules if name.startswith("test_") and name != __name__]:
        monkeypatch.delitem(sys.modules, name)


class Untouchable:
    """Raises wherever it is looked at."""

    def _refuse(self, *arguments: Any) -> Any:
        raise SystemError("was looked at")

    __getattr__ = __len__ = __eq__ = __hash__ = __iter__ = __bool__ = __repr__ = __str__ = _refuse  # type: ignore[assignment]
    __class__ = attribute = property(_refuse)  # type: ignore[assignment]


class UntouchableDict(dict):  # type: ignore[type-arg]
    items = values = keys = __iter__ = __len__ = __getitem__ = __eq__ = Untouchable._refuse  # type: ignore[assignment]


class UntouchableList(list):  # type: ignore[type-arg]
    __iter__ = __len__ = __getitem__ = __eq__ = __repr__ = Untouchable._refuse  # type: ignore[assignment]


class UntouchableText(str):
    __repr__ = __str__ = __len__ = __eq__ = __hash__ = Untouchable._refuse  # type: ignore[assignment]


class Meta(type):
    __name__ = __module__ = property(Untouchable._refuse)  # type: ignore[assignment]
    __eq__ = __hash__ = mro = __repr__ = Untouchable._refuse  # type: ignore[assignment]


Meta.mro = type.mro  # type: ignore[method-assign]  # classes are made with it


class UntouchableKind(metaclass=Meta):
    value = 3


class UntouchableModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen = 0

    named_parameters = named_modules = modules = state_dict = Untouchable._refuse  # type: ignore[assignment]


def test_nothing_overridden_is_called() -> None:
    thing, table, rows = Untouchable(), UntouchableDict(), UntouchableList([1, [2]])
    thing.seen = 5  # type: ignore[attr-defined]
    dict.__setitem__(table, "a", {"b": 1})
    task = SimpleNamespace(thing=thing, table=table, rows=rows, text=UntouchableText("abc"), kind=UntouchableKind())
    words = memory.memory({"task": task, "model": UntouchableModel()})
    assert words["task.thing.seen"] == "5"
    assert words["task.table['a']['b']"] == "1"
    assert (words["task.rows[0]"], words["task.rows[1][0]"]) == ("1", "2")
    assert words["task.text"] == "'abc'"
    assert words["model.seen"] == "0"
    assert [path for path, text in words.items() if UNSEEN in text and path.startswith(("task.", "model."))] == []


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Kept:
    count = 0


class Slotted:
    __slots__ = ("__weakref__", "inside")


class Sealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


def _middle(task: Any) -> None:
    task.large[500_001] = 1


def _deep(task: Any) -> None:
    node = task.deep
    while node["next"]:
        node = node["next"]
    node["value"] = 1


def deep(levels: int) -> dict[str, Any]:
    node: dict[str, Any] = {"next": None, "value": 0}
    for _ in range(levels):
        node = {"next": node, "value": 0}
    return node


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "an element in a large tensor": (_middle, "task.large"),
    "an element of a large array": (lambda task: task.array.__setitem__(777_777, 1), "task.array"),
    "an item of a large dict": (lambda task: task.table.__setitem__(5000, 1), "task.table"),
    "an object in a long list": (lambda task: task.list[30].__dict__.update(x=1), "task.list"),
    "a deep tree": (_deep, "task.deep"),
    "the order of an OrderedDict": (lambda task: task.order.move_to_end(0), "task.order"),
    "a count": (lambda task: next(task.count), "task.count"),
    "a cycle": (lambda task: next(task.cycle), "task.cycle"),
    "a chain": (lambda task: next(task.chain), "task.chain"),
    "an enumeration": (lambda task: next(task.pairs), "task.pairs"),
    "an enum": (lambda task: setattr(task, "color", Color.BLUE), "task.color"),
    "a value of C": (lambda task: setattr(task.number, "value", 2), "task.number"),
    "a hook of a tensor": (lambda task: task.weight.register_hook(torch.abs), "task.weight._backward_hooks[0]"),
    "an attribute of a parameter": (lambda task: setattr(task.weight, "scale", 2), "task.weight.scale"),
    "a ring": (lambda task: task.ring.append(1), "task.ring"),
    "a cell": (lambda task: task.closure(), "task.closure (its total)"),
    "a frozen set": (lambda task: setattr(task, "names", frozenset("abd")), "task.names"),
    "a set": (lambda task: task.set.add(3), "task.set"),
    "a text": (lambda task: setattr(task, "text", "b"), "task.text"),
    "a packed array": (lambda task: task.packed.append(1.0), "task.packed"),
    "a position in a stream": (lambda task: task.stream.read(1), "task.stream"),
    "python's generator": (lambda task: task.dice.random(), "task.dice"),
    "numpy's generator": (lambda task: task.noise.random(), "task.noise"),
    "torch's generator": (lambda task: torch.rand((), generator=task.source), "task.source"),
    "a slot": (lambda task: setattr(task.slots, "inside", 1), "task.slots.inside"),
    "a context variable": (lambda task: task.context.set(1), "task.context (its value)"),
    "a value of an object": (lambda task: next(iter(task.keyed.values())).append(1), "task.keyed[Slotted 0][0]"),
    "an attribute of a function": (lambda task: setattr(task.call, "calls", 1), "task.call (its calls)"),
    "a byte": (lambda task: task.bytes.__setitem__(0, 1), "task.bytes"),
    "an iterator": (lambda task: next(task.rows), "task.rows"),
    "dropout": (lambda task: setattr(task.net, "p", 0.1), "task.net.p"),
    "a rate": (lambda task: task.optimizer.param_groups[0].update(lr=0.5), "task.optimizer.param_groups[0]['lr']"),
}


def counting() -> Callable[[], int]:
    total = 0

    def add() -> int:
        nonlocal total
        total += 1
        return total

    return add


def everything() -> Any:
    """A task that remembers in every way."""
    return SimpleNamespace(
        large=torch.zeros(1_000_000),
        array=np.zeros(1_000_000),
        table=dict.fromkeys(range(6000), 0),
        list=[SimpleNamespace(x=0) for _ in range(40)],
        deep=deep(2000),
        order=OrderedDict.fromkeys(range(30)),
        count=itertools.count(),
        cycle=itertools.cycle([1, 2, 3]),
        chain=itertools.chain([1], [2]),
        pairs=enumerate("abc"),
        color=Color.RED,
        number=ctypes.c_int(1),
        weight=nn.Parameter(torch.zeros(2)),
        ring=deque(range(20), maxlen=20),
        closure=counting(),
        names=frozenset("abc"),
        set={1, 2},
        text="a",
        packed=array("d", [0.0]),
        stream=io.BytesIO(b"abc"),
        dice=random.Random(1),
        noise=np.random.default_rng(1),
        source=torch.Generator().manual_seed(1),
        slots=(slotted := Slotted()),
        weak=weakref.ref(slotted),
        context=ContextVar("value", default=0),
        keyed={Slotted(): []},
        call=lambda: None,
        bytes=bytearray(b"0"),
        rows=iter([1, 2]),
        net=nn.Dropout(),
        optimizer=torch.optim.SGD([torch.zeros(2, requires_grad=True)], momentum=0.9),
    )


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_and_can_be_put_into_another_task(name: str, tmp_path: Path) -> None:
    task, other = everything(), everything()
    change, path = CHANGES[name]
    before = memory.memory({"task": task})
    assert memory.memory({"task": task}) == before
    change(task)
    after = memory.memory({"task": task})
    moved = [each for each in after if after[each] != before.get(each)]
    assert len(moved) == 1
    assert moved[0].startswith(path)
    if name in ("a deep tree", "a hook of a tensor"):  # which cannot be copied
        return
    holder = moved[0].partition("[")[0]
    suspects.take([holder], {"task": task}, None, tmp_path / "taken")
    put = suspects.put([holder], {"task": other}, None, tmp_path / "taken")
    assert (put, memory.memory({"task": other}) == after) == ([holder], True)


def test_the_memory_of_a_model_is_marked() -> None:
    model = Sealed()
    before = memory.memory({"model": model}, model.state_dict())
    assert not any("weight" in path for path in before if path.startswith("model"))
    model.mean += 1
    model.a.weight.requires_grad_(False)
    model.b.eval()
    model.a.bias.grad = torch.ones(2)
    model.b.bias = model.a.bias
    model.forward = abs  # type: ignore[method-assign,assignment]
    after = memory.memory({"model": model}, model.state_dict())
    assert {path for path in after if path.startswith("model") and after[path] != before.get(path)} == {
        f"model.mean{memory.NOT_PERSISTENT}",
        f"model{memory.FROZEN}",
        f"model{memory.EVALUATING}",
        f"model{memory.GRADIENTS}",
        f"model{memory.TIED}",
    } | {path for path in after if path.startswith("model.forward")}


def test_classes_and_functions_of_the_user_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Kept()
    before = memory.memory({"task": task})
    monkeypatch.setattr(Kept, "count", 1)
    monkeypatch.setattr(torch.nn.functional, "relu", lambda x: x)
    after = memory.memory({"task": task})
    moved = {path for path in after if after[path] != before.get(path)}
    assert moved == {f"task ({__name__}.Kept.count)", f"{memory.PROCESS}torch.nn.functional.relu"}


def test_what_no_attribute_shows_is_listed() -> None:
    with sqlite3.connect(":memory:") as db:
        words = memory.memory({"task": SimpleNamespace(db=db)})
    db.close()
    assert words["task.db"] == f"{UNSEEN} (sqlite3.Connection)"


def test_names_of_runs_are_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("undisturbed", "again-7"):
        monkeypatch.setattr(fingerprint, "names_of_runs", [f"/{name}"])
        seen.append(memory.memory({"task": SimpleNamespace(text=f"/a/{name}/b", path=Path(f"/a/{name}/b"))}))
    assert seen[0] == seen[1]


class Task:
    """Holds a bit of everything that can be put on trial."""

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.rows = [seen, {"a": seen}]
        self.order = OrderedDict.fromkeys(range(seen))
        self.alias = self.rows
        self.random = torch.Generator().manual_seed(seen)
        self.net = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.turns = itertools.cycle(range(4))
        for _ in range(seen):
            next(self.turns)
            self.net(torch.ones(2)).sum().backward()
            self.optimizer.step()
        if seen > 1:
            self.late = {"b": seen}


def test_memory_of_one_task_is_put_into_another(tmp_path: Path) -> None:
    first, second = Task(3), Task(1)
    alias, file = second.rows, tmp_path / "taken"
    paths = [
        "task.seen",
        "task.rows",
        "task.order",
        "task.random",
        "task.net",
        "task.net.weight.grad",
        "task.net.bias.grad",
        "task.optimizer.state",
        "task.turns",
        "task.late",
    ]
    suspects.take([*paths, "task.lacking"], {"task": first}, None, file)
    assert suspects.put([*paths, "task.lacking"], {"task": second}, None, file) == paths
    assert memory.memory({"task": second}) == memory.memory({"task": first})
    assert second.rows is alias
    assert [*second.order] == [*first.order]
    assert [*second.optimizer.state] == [*second.net.parameters()][: len(second.optimizer.state)]


def test_marks_and_settings_are_put_into_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "taken"
    monkeypatch.setenv("LOUD", "1")
    model, other = Sealed(), Sealed()
    model.a.weight.requires_grad_(False)
    model.b.eval()
    model.a.bias.grad = torch.ones(2)
    model.b.bias = model.a.bias
    paths = [f"model{mark}" for mark in (memory.FROZEN, memory.EVALUATING, memory.GRADIENTS, memory.TIED)]
    paths += [f"{memory.PROCESS}{name}" for name in ("os.environ['LOUD']", "torch.get_default_dtype()")]
    monkeypatch.setattr(torch, "get_default_dtype", torch.get_default_dtype)
    torch.set_default_dtype(torch.float64)
    try:
        suspects.take(paths, {"model": model}, None, file)
        torch.set_default_dtype(torch.float32)
        monkeypatch.delenv("LOUD")
        assert suspects.put(paths, {"model": other}, None, file) == paths
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert suspects.settings()[f"{memory.PROCESS}os.environ['LOUD']"]
    assert memory.memory({"model": other}) == memory.memory({"model": model})


def test_every_setting_can_be_put_into_a_process(tmp_path: Path) -> None:
    before = suspects.settings()
    suspects.take(before, {}, None, tmp_path / "taken")
    precision, limit = decimal.getcontext().prec, sys.getrecursionlimit()
    decimal.getcontext().prec = 3
    sys.setrecursionlimit(limit + 1000)
    try:
        assert suspects.settings() != before
        assert suspects.put(before, {}, None, tmp_path / "taken") == [*before]
        assert suspects.settings() == before
    finally:
        decimal.getcontext().prec = precision
        sys.setrecursionlimit(limit)


def test_what_libraries_keep_for_themselves_is_known() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    task = SimpleNamespace(schedule=scheduler, kept=Kept())
    vars(task.kept)["_seen"] = 1
    private = memory.private({"task": task})
    assert "task.schedule._last_lr" in private
    own = [path for path in private if path.startswith("task.")]  # not those of other tests, which are modules, too
    assert [path for path in own if "kept" in path or path.endswith(".base_lrs")] == []


def transformers() -> Any:
    library = pytest.importorskip("transformers")
    config = library.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    return library.AutoModelForCausalLM.from_config(config)


def peft() -> Any:
    library = pytest.importorskip("peft")
    return library.get_peft_model(transformers(), library.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))


def timm() -> Any:
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=2)


def diffusers() -> Any:
    return pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=4)


def torchmetrics() -> Any:
    return pytest.importorskip("torchmetrics").MeanMetric()


def lightning() -> Any:
    library = pytest.importorskip("lightning")
    return library.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [transformers, peft, timm, diffusers, torchmetrics, lightning])
@pytest.mark.parametrize("role", ["model", "task", "data.train", "callbacks.mine"])
def test_objects_of_libraries_are_looked_at(make: Callable[[], Any], role: str) -> None:
    thing = make()
    loaded = {*sys.modules}
    thing = SimpleNamespace(inner=thing) if role != "model" else thing
    words = memory.memory({role: thing})
    assert memory.memory({role: thing}) == words
    assert source.sources(thing) == []
    assert {*sys.modules} - loaded == set()
    assert [path for path in words if "transformers." in path or "(lightning" in path] == []
    assert copy.copy(words)


@pytest.mark.parametrize("module", [None, object(), SimpleNamespace(__file__="/mine.py")])
def test_what_is_no_module_among_the_modules_is_no_users(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cryptography has an object without attributes there."""
    monkeypatch.setitem(sys.modules, "strange.lib", module)
    assert not memory.is_users("strange.lib")
    assert memory.memory({"task": SimpleNamespace(steps=1)})["task.steps"] == "1"


def test_of_large_lists_the_last_items_are_seen() -> None:
    task = SimpleNamespace()
    task.many = [SimpleNamespace(steps=number) for number in range(30_000)]
    before = memory.memory({"task": task})["task.many"]
    task.many[-1].steps = -1
    assert "a list of 30000" in before
    assert "most of which cannot be looked into" in before
    assert memory.memory({"task": task})["task.many"] != before


def test_arrays_in_read_only_files_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    with file.open("wb") as stream:
        stream.truncate(1 << 36)
    array = np.memmap(file, np.uint16, "r")
    assert fingerprint.describe(array) == f"uint16[{1 << 35}] of a file"
    changing = np.memmap(file, np.uint16, "r+", shape=(4,))
    before = fingerprint.describe(changing)
    changing[0] = 1
    assert fingerprint.describe(changing) != before

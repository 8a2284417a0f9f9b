"""Weights that are frozen, thawed, added or replaced after the start, and models built in evaluation mode."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from runner.errors import ConfigError, TaskError
from runner.evaluation import evaluation_mode
from runner.update import WeightUpdate, moving_average, train_mode, update_average

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return outputs


def moved(model: nn.Module, update: WeightUpdate, optimizer: Any) -> float:
    """How far one step of rate 1 moves all weights of model and optimizer together."""
    weights = [*dict.fromkeys([*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])])]
    before = [weight.detach().clone() for weight in weights]
    loss = 100 * model(torch.ones(4, 2)).square().mean()
    update.backward(loss)
    update.step(loss.detach())
    assert all(weight.grad is None for weight in weights)
    return torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before, strict=True)]).norm().item()


def thaw(model: Any, optimizer: Any) -> None:
    model.first.requires_grad_(True)


def freeze(model: Any, optimizer: Any) -> None:
    model.second.requires_grad_(False)
    model.first.requires_grad_(True)


def replace(model: Any, optimizer: Any) -> None:
    model.second = nn.Linear(3, 1)
    optimizer.add_param_group({"params": [*model.second.parameters()]})


def add(model: Any, optimizer: Any) -> None:
    model.second = nn.Sequential(model.second, nn.Linear(1, 1))
    optimizer.add_param_group({"params": [*model.second[1].parameters()]})


def own(model: Any, optimizer: Any) -> None:
    """A weight of the task's own, which only the optimizer has."""
    scale = nn.Parameter(torch.tensor(5.0))
    optimizer.add_param_group({"params": [scale]})
    model.second.register_forward_hook(lambda module, inputs, output: output * scale)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("change", [thaw, freeze, replace, add, own])
def test_weights_that_change_after_the_start_are_clipped(change: Any, fp16: bool) -> None:
    model = Net()
    model.first.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if fp16 else None
    update = WeightUpdate(model, optimizer, device=CPU, clip_norm=0.01, scaler=scaler)
    assert moved(model, update, optimizer) == pytest.approx(0.01, rel=1e-3)
    change(model, optimizer)
    for _ in range(2):
        assert moved(model, update, optimizer) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_frozen_before_the_step_counts() -> None:
    """The optimizer moves it all the same."""
    model = Net()
    update = WeightUpdate(model, torch.optim.SGD(model.parameters(), lr=1.0), device=CPU, clip_norm=0.01)
    update.backward(model(torch.ones(4, 2)).square().mean())
    before = model.first.weight.detach().clone()
    model.requires_grad_(False)
    update.step(torch.tensor(0.0))
    assert 0 < (model.first.weight - before).norm() <= 0.01
    assert model.first.weight.grad is None


def test_gradients_of_weights_without_an_optimizer_are_unscaled() -> None:
    model = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.second.parameters(), lr=1.0)
    update = WeightUpdate(model, optimizer, device=CPU, clip_norm=1e9, scaler=scaler)
    loss = model(torch.ones(4, 2)).square().mean()
    expected = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    update.backward(loss)
    norm = update.step(loss.detach())["grad_norm"].item()
    assert norm == pytest.approx(nn.utils.get_total_norm(expected).item())


def test_a_thawed_weight_without_a_finite_gradient_is_skipped() -> None:
    model = Net()
    model.first.requires_grad_(False)
    update = WeightUpdate(model, torch.optim.SGD(model.parameters(), lr=1.0), device=CPU, skip_nonfinite=True)
    model.requires_grad_(True)
    update.backward(model(torch.ones(4, 2)).sum())
    assert model.first.weight.grad is not None
    model.first.weight.grad[0, 0] = torch.nan
    update.step(torch.tensor(0.0))
    assert update.skipped == 1
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.5}, {"skip_nonfinite": True}, {"clip_norm": 0.5, "skip_nonfinite": True}]
)
def test_sparse_gradients_are_clipped_as_dense_ones(options: dict[str, Any]) -> None:
    outcomes = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=sparse)
        update = WeightUpdate(model, torch.optim.SGD(model.parameters(), lr=1.0), device=CPU, **options)
        loss = model(torch.tensor([1, 3, 1])).square().sum()
        update.backward(loss)
        measured = update.step(loss.detach())
        outcomes.append((model.weight.tolist(), {name: value.item() for name, value in measured.items()}))
    assert outcomes[0][0] == [pytest.approx(row) for row in outcomes[1][0]]
    assert outcomes[0][1] == pytest.approx(outcomes[1][1])


def test_a_step_that_overflowed_does_not_move_the_average() -> None:
    """Although the run is to stop where the loss is not finite: it is, only its scale was too large."""
    model = Net()
    average = moving_average(model, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update = WeightUpdate(model, optimizer, device=CPU, scaler=scaler, average=average)
    update.backward(model(torch.ones(4, 2)).square().mean() * 1e20)
    update.step(torch.tensor(1.0))
    assert average.n_averaged == 0
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})
    update.backward(model(torch.ones(4, 2)).square().mean())
    update.step(torch.tensor(1.0))
    assert average.n_averaged == 1


class Caches(Net):
    """Has a buffer from its first pass on, which grows, and another in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.register_buffer("seen", torch.ones(len(x)), persistent=False)
        self.mean = torch.full((len(x), 2), 3.0)
        return super().forward(x)


def test_the_average_has_the_current_buffers_of_the_model() -> None:
    model = Caches()
    average = moving_average(model, 0.5)
    for size in (2, 4, 3):
        model(torch.ones(size, 2))
        update_average(average, model)
        copies: Any = average.module
        assert torch.equal(copies.mean, model.mean)
        assert copies.seen.shape == (size,)
        assert copies.mean is not model.mean
        assert [*copies.state_dict()] == [*model.state_dict()]


@pytest.mark.parametrize("shared", [True, False])
def test_buffers_are_shared_in_the_average_as_in_the_model(shared: bool) -> None:
    """Two modules begin with one tensor; a buffer before them changes its size, or each gets a tensor of its own."""
    model: Any = nn.ModuleList([Caches(), nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)])
    tables = [torch.zeros(3), torch.zeros(2)]
    for layer, table in zip(model[1:], (tables[0], tables[0], tables[1]), strict=True):
        layer.register_buffer("table", table)
    average = moving_average(model, 0.5)
    copies: Any = average.module
    if shared:
        model[0](torch.ones(4, 2))
    for number in (1, 2):
        for layer in model[1:]:
            layer.table = layer.table if shared else torch.full_like(layer.table, number)
            layer.table += 1
        update_average(average, model)
        assert all(torch.equal(copy.table, layer.table) for copy, layer in zip(copies[1:], model[1:], strict=True))
        assert (copies[1].table is copies[2].table) == shared


def grow(model: Any) -> None:
    model.third = nn.Linear(1, 1)


def drop(model: Any) -> None:
    del model.second


def resize(model: Any) -> None:
    model.second = nn.Linear(5, 1)


def reorder(model: Any) -> None:
    first = model.first
    del model.first
    model.first = first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, r"third, third\.weight, third\.bias came"),
        (drop, "second"),
        (resize, r"second\.weight came"),
        (reorder, "first"),
    ],
)
def test_an_average_of_other_weights_is_refused(change: Any, message: str) -> None:
    model = Net()
    average = moving_average(model, 0.5)
    update_average(average, model)
    change(model)
    with pytest.raises(TaskError, match=rf"trainer\.ema_decay averages the weights.*{message}.*in its constructor"):
        update_average(average, model)


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rows = (row for row in ())


def derived() -> nn.Module:
    """With a weight that is computed from others, as by the old ``weight_norm``."""
    model = Net()
    model.first.scaled = 2 * model.first.weight
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (derived, r"first\.scaled is computed from other weights; use torch\.nn\.utils\.parametrizations"),
        (Locked, "TypeError: cannot pickle"),
    ],
)
def test_a_model_that_cannot_be_copied_has_no_average(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.ema_decay needs a copy.*{message}.*trainer\.ema_decay=null"):
        moving_average(make(), 0.5)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        self.head = nn.Linear(2, 1)


class Keeps(Parts):
    """Holds its norm in evaluation mode, as torch's documentation advises."""

    def train(self, mode: bool = True) -> "Keeps":
        super().train(mode)
        self.backbone[1].eval()
        return self


def in_evaluation(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if not part.training}


def arrived(kind: str) -> nn.Module:
    model = Keeps() if kind == "overridden" else Parts()
    if kind in ("whole", "overridden", "frozen whole"):
        model.eval()
    if kind in ("part", "teacher"):
        model.backbone.eval()
    if kind in ("teacher", "frozen whole"):
        model.backbone.requires_grad_(False)
    if kind == "layer":
        model.backbone[1].eval()
    return model


@pytest.mark.parametrize(
    ("kind", "stays"),
    [
        ("whole", set()),
        ("overridden", {"backbone.1"}),
        ("part", set()),
        ("layer", {"backbone.1"}),
        ("teacher", {"backbone", "backbone.0", "backbone.1", "backbone.2"}),
        ("frozen whole", set()),
        ("train", set()),
    ],
)
def test_models_in_evaluation_mode_are_trained(kind: str, stays: set[str], caplog: pytest.LogCaptureFixture) -> None:
    model = arrived(kind)
    with caplog.at_level(logging.INFO, "runner"):
        train_mode(model)
    assert in_evaluation(model) == stays
    messages = {"whole": "it came", "overridden": "it came", "frozen whole": "it came", "part": "backbone came"}
    assert messages.get(kind, "") in caplog.text
    assert bool(caplog.text) == (kind in messages)
    with evaluation_mode(model):
        assert len(in_evaluation(model)) == len([*model.modules()])
        model.train()
    assert in_evaluation(model) == stays


def test_a_wrapper_trains_a_model_in_evaluation_mode() -> None:
    """Dropout tells, as it would after ``from_pretrained``."""
    model = nn.Sequential(Parts().eval())
    train_mode(model)
    assert model[0].backbone[2].training
    assert (F.dropout(torch.ones(1000), training=model[0].backbone[2].training) == 0).any()

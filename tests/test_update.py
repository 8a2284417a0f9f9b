"""One optimizer step and its state."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.checkpoint.encoding import decode, encode
from runner.update import WeightUpdate

CPU = torch.device("cpu")


def there_and_back(state: Any) -> Any:
    """What a checkpoint makes of a state."""
    value, tensors = encode(state, "part")
    return decode(json.loads(json.dumps(value, allow_nan=False)), lambda name: tensors[name].clone())


def bits(parts: list[Any]) -> str:
    """Every bit of the state of some parts."""
    value, tensors = encode([part.state_dict() for part in parts], "")
    return json.dumps([value, {name: tensor.tolist() for name, tensor in tensors.items()}])


class Run:
    """A small model with everything that moves it."""

    def __init__(self, *, fp16: bool = False, decay: float | None = None, lr: float = 0.5, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if fp16 else None
        self.update = WeightUpdate(
            self.model, self.optimizer, device=CPU, scaler=self.scaler, average=self.average, **options
        )

    def step(self, number: int, factor: float = 1.0) -> dict[str, Tensor]:
        inputs = torch.randn(4, 2, generator=torch.Generator().manual_seed(number))
        with self.update.autocast():
            loss = self.model(inputs).square().mean() * factor
        self.update.backward(loss)
        return self.update.step(loss.detach())

    def parts(self) -> list[Any]:
        """What is saved; first what a step moves, last what it remembers."""
        parts = [self.model, self.optimizer, self.average, self.update]
        return [part for part in parts if part is not None]

    def weights(self) -> list[Any]:
        return [parameter.tolist() for parameter in self.model.parameters()]


def linear(gradient: list[float], **options: Any) -> tuple[nn.Parameter, dict[str, Tensor]]:
    """A weight of zeros after one step of rate 1 down that gradient, and what the step measured."""
    model = nn.Linear(len(gradient), 1, bias=False)
    nn.init.zeros_(model.weight)
    update = WeightUpdate(model, torch.optim.SGD(model.parameters(), lr=1.0), device=CPU, **options)
    loss = model(torch.tensor([gradient])).sum()
    update.backward(loss)
    measured = update.step(loss.detach())
    return model.weight, measured


def test_a_step_moves_the_weights_and_clears_the_gradients() -> None:
    weight, measured = linear([3.0, 4.0])
    assert weight.tolist() == [[-3.0, -4.0]]
    assert weight.grad is None
    assert measured == {}


def test_gradients_add_up_until_the_step() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    update = WeightUpdate(model, torch.optim.SGD(model.parameters(), lr=1.0), device=CPU)
    for value in (1.0, 2.0):
        update.backward(model(torch.tensor([[value]])).sum())
    update.step(torch.tensor(0.0))
    assert model.weight.item() == -3.0


def test_clipping_scales_gradients_and_returns_the_old_norm() -> None:
    weight, measured = linear([3.0, 4.0], clip_norm=1.0)
    expected = nn.Parameter(torch.zeros(1, 2))
    expected.grad = torch.tensor([[3.0, 4.0]])
    nn.utils.clip_grad_norm_([expected], 1.0)
    assert weight.tolist() == (-expected.grad).tolist()
    assert abs(weight.norm().item() - 1) < 1e-5
    assert measured["grad_norm"].item() == 5.0


def test_clipping_leaves_smaller_gradients_as_they_are() -> None:
    weight, measured = linear([3.0, 4.0], clip_norm=6.0)
    assert weight.tolist() == [[-3.0, -4.0]]
    assert measured["grad_norm"].item() == 5.0


def test_frozen_weights_are_not_in_the_norm() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    update = WeightUpdate(model, torch.optim.SGD([model.weight], lr=1.0), device=CPU, clip_norm=100.0)
    update.backward(model(torch.tensor([[3.0, 4.0]])).sum())
    assert update.step(torch.tensor(0.0))["grad_norm"].item() == 5.0


def test_gradients_outside_the_optimizer_are_cleared_too() -> None:
    model = nn.Linear(2, 1)
    update = WeightUpdate(model, torch.optim.SGD([model.weight], lr=0.0), device=CPU, clip_norm=100.0)
    for _ in range(2):
        update.backward(model(torch.tensor([[3.0, 4.0]])).sum())
        assert update.step(torch.tensor(0.0))["grad_norm"].item() == pytest.approx(26**0.5)
    assert model.bias.grad is None


def test_gradients_that_a_listener_gives_are_cleared() -> None:
    """Also those of the optimizer's weights that had none."""
    run = Run()
    frozen = run.model[2].bias
    frozen.requires_grad_(False)
    run.update.gradient_listeners = [lambda: setattr(frozen, "grad", torch.ones(1))]
    run.step(1)
    assert [parameter.grad for parameter in run.model.parameters()] == [None] * 4


def test_an_optimizer_that_clears_in_its_own_way_is_asked_to() -> None:
    run = Run()
    asked: list[bool] = []
    run.optimizer.zero_grad = lambda set_to_none=True: asked.append(set_to_none)  # type: ignore[method-assign]
    run.step(1)
    assert asked == [True]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_without_a_finite_loss_is_skipped(factor: float, fp16: bool) -> None:
    """It moves neither weights, momentum nor average, and the next step finds no trace of its gradients."""
    run, undisturbed = (Run(fp16=fp16, decay=0.5, clip_norm=1.0, skip_nonfinite=True) for _ in range(2))
    for either in (run, undisturbed):
        either.step(1)
    run.step(2, factor)
    assert run.update.skipped == 1
    assert bits(run.parts()[:-1]) == bits(undisturbed.parts()[:-1])
    for either in (run, undisturbed):
        either.step(3)
    assert bits(run.parts()[:-1]) == bits(undisturbed.parts()[:-1])


def test_a_finite_loss_with_infinite_gradients_is_skipped() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update = WeightUpdate(model, optimizer, device=CPU, skip_nonfinite=True)
    loss = model(torch.ones(1, 1)).sqrt().sum()
    assert loss.item() == 0
    update.backward(loss)
    update.step(loss.detach())
    assert model.weight.item() == 0
    assert update.skipped == 1


def test_finite_steps_are_not_skipped() -> None:
    run = Run(skip_nonfinite=True)
    before = run.weights()
    run.step(1)
    assert run.update.skipped == 0
    assert run.weights() != before


def test_without_skipping_a_bad_step_is_taken_as_it_is() -> None:
    """The guard stops the run, at a look at the device every so many steps instead of one per step."""
    weight, _ = linear([float("nan"), 1.0])
    assert repr(weight.tolist()) == "[[nan, -1.0]]"


def test_half_precision_skips_overflows_and_lowers_its_scale() -> None:
    run = Run(fp16=True, precision="fp16")
    before = run.weights()
    run.step(1, factor=float("inf"))
    assert run.weights() == before
    assert run.update.state_dict()["scaler"]["scale"] == 2.0**9
    run.step(2)
    assert run.weights() != before


def test_scaled_gradients_are_unscaled_before_they_are_clipped() -> None:
    runs = [Run(fp16=fp16, clip_norm=0.125) for fp16 in (False, True)]
    assert runs[0].step(1)["grad_norm"].item() == runs[1].step(1)["grad_norm"].item()
    assert runs[0].weights() == runs[1].weights()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_nonfinite": True},
        {"clip_norm": 0.1, "decay": 0.9},
        {"precision": "bf16"},
        {"precision": "fp16", "fp16": True},
        {"precision": "fp16", "fp16": True, "skip_nonfinite": True, "decay": 0.5, "clip_norm": 1.0},
    ],
    ids=str,
)
def test_a_restored_update_goes_on_as_the_kept_one(options: dict[str, Any]) -> None:
    """Three steps, of which one has no finite loss where that is survived, and three more in new objects."""
    kept = Run(**options)
    survives = options.get("skip_nonfinite") or options.get("fp16")
    for number in range(3):
        kept.step(number, factor=float("inf") if number == 1 and survives else 1.0)
    saved = [there_and_back(part.state_dict()) for part in kept.parts()]
    resumed = Run(**options)
    for part, state in zip(resumed.parts(), saved, strict=True):
        part.load_state_dict(state)
    assert bits(resumed.parts()) == bits(kept.parts())
    for number in range(3, 6):
        kept.step(number)
        resumed.step(number)
    assert bits(resumed.parts()) == bits(kept.parts())
    assert resumed.update.skipped == bool(options.get("skip_nonfinite"))


def test_the_scale_and_its_counters_are_state() -> None:
    """A growth is due after two good steps in a row: one before the restart, one after."""
    run = Run(fp16=True)
    run.step(1)
    resumed = Run(fp16=True)
    resumed.update.load_state_dict(there_and_back(run.update.state_dict()))
    resumed.step(2)
    assert resumed.update.state_dict()["scaler"]["scale"] == 2.0**11


def test_the_average_follows_the_weights() -> None:
    run = Run(decay=0.5)
    run.step(1)
    first = [parameter.clone() for parameter in run.model.parameters()]
    run.step(2)
    assert run.average is not None
    for averaged, old, new in zip(run.average.parameters(), first, run.model.parameters(), strict=True):
        assert torch.equal(averaged, torch.lerp(old, new, 0.5))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_forward_pass_runs_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    run = Run(precision=precision)
    with run.update.autocast():
        assert run.model[0](torch.ones(1, 2)).dtype == dtype
    assert run.model[0](torch.ones(1, 2)).dtype == torch.float32

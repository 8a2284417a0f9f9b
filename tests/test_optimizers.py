"""Several optimizers and groups of weights: how the configuration divides a model, and that it resumes exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from crews import Crews
from lives import Lives
from marks import quick_first, slow
from omegaconf import OmegaConf
from results import metric_lines, results
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.build import _optimizers
from runner.checkpoint.store import CheckpointStore
from runner.checkpoint.structure import Structure
from runner.errors import ConfigError, TaskError
from runner.models.gpt import GPT
from runner.optimizers import Named, divide, grouped, matching, table
from runner.runs.__main__ import main
from runner.storage import LocalLocation
from runner.task import Task
from runner.update import WeightUpdate

CPU = torch.device("cpu")
GAN = ("experiment=gan", "model.width=16", "model.noise=4", "trainer.max_steps=24", "trainer.evaluate_every_steps=8")
COMMAND = (*GAN, "checkpoint.every_steps=4", "metrics.every_steps=1", "trainer.ema_decay=0.9")
PLATEAU = "{_target_:torch.optim.lr_scheduler.ReduceLROnPlateau,patience:0,factor:0.5}"
KINDS = {
    "as it is": (),
    "everything": (
        "trainer.clip_norm=0.1",
        "trainer.accumulate=2",
        "trainer.precision=bf16",
        "trainer.on_nonfinite=skip",
    ),
    "scaled": ("trainer.precision=fp16", "trainer.clip_norm=0.1"),
    "one schedule": ("scheduler=warmup_cosine", "scheduler.warmup_steps=4"),
    "two schedules": (
        "~scheduler",
        "+scheduler.generator={_target_:torch.optim.lr_scheduler.StepLR,step_size:1,interval:epoch}",
        f"+scheduler.discriminator={PLATEAU}",
    ),
}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return outputs


def pair(**options: Any) -> tuple[Pair, WeightUpdate]:
    model = Pair()
    optimizers = {name: torch.optim.SGD(getattr(model, name).parameters(), lr=1.0) for name in ("first", "second")}
    return model, WeightUpdate(model, Named(optimizers), device=CPU, **options)


def losses(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(4, 2)
    return model(x).square().mean(), model(-2 * x).mean()


@pytest.mark.parametrize("together", [True, False], ids=["both backward passes first", "in turn"])
def test_each_loss_moves_the_weights_of_its_optimizer(together: bool) -> None:
    """As plain torch does with the gradients of one loss for each part."""
    model, update = pair()
    expected, parts = Pair(), ("first", "second")
    for turn in [parts] if together else [parts[:1], parts[1:]]:
        before, values = dict(zip(parts, losses(model), strict=True)), dict(zip(parts, losses(expected), strict=True))
        gradients = {n: torch.autograd.grad(values[n], [*getattr(expected, n).parameters()]) for n in turn}
        for name in turn:
            update[name].backward(before[name])
        for name in turn:
            assert update[name].step(torch.tensor(0.0)) == {}
            for weight, gradient in zip(getattr(expected, name).parameters(), gradients[name], strict=True):
                weight.data -= gradient
    update.end()
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_one_step_of_all_is_that_of_one_optimizer() -> None:
    """With the norm of all gradients together."""
    one, (model, update) = Pair(), pair(clip_norm=0.01)
    single = WeightUpdate(one, torch.optim.SGD(one.parameters(), lr=1.0), device=CPU, clip_norm=0.01)
    norms = []
    for each, net in ((single, one), (update, model)):
        loss = losses(net)[0]
        each.backward(loss)
        norms.append(each.step(loss.detach())["grad_norm"])
        each.end()
    assert norms[0] == norms[1]
    assert all(map(torch.equal, one.parameters(), model.parameters()))


def test_a_named_step_clips_its_own_weights() -> None:
    model, update = pair(clip_norm=0.01)
    before = [weight.detach().clone() for weight in model.parameters()]
    loss = losses(model)[0]
    update.backward(loss)
    assert set(update["first"].step(loss.detach())) == {"grad_norm/first"}
    moved = [(now.detach() - old).norm().item() for now, old in zip(model.parameters(), before, strict=True)]
    assert sum(x * x for x in moved[:2]) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    assert moved[2:] == [0, 0]
    with pytest.raises(TaskError, match=r"second.weight still has a gradient after the step"):
        update.end()
    update["second"].step(loss.detach())
    update.end()


def test_average_and_loss_scale_move_once_in_a_step() -> None:
    model = Pair()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizers = Named({n: torch.optim.SGD(getattr(model, n).parameters(), lr=1.0) for n in ("first", "second")})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    options: dict[str, Any] = {"average": average, "scaler": scaler, "not_averaged": ["second.weight", "second.bias"]}
    update = WeightUpdate(model, optimizers, device=CPU, **options)
    for number in (1, 2):
        old = model.first.weight.detach().clone()
        for name, loss in zip(("first", "second"), losses(model), strict=True):
            update[name].backward(loss)
            update[name].step(loss.detach())
        update.end()
        assert (average.n_averaged, scaler.get_scale()) == (number, 4.0 * 2**number)
    averaged: Any = average.module
    torch.testing.assert_close(averaged.first.weight, torch.lerp(old, model.first.weight, 0.5))
    assert torch.equal(averaged.second.weight, model.second.weight)


def test_a_step_that_one_optimizer_skips_counts_once() -> None:
    model, update = pair(skip_nonfinite=True)
    for name in ("first", "second"):
        update[name].backward(losses(model)[0] * torch.nan)
        update[name].step(torch.tensor(torch.nan))
    update.end()
    assert (update.skipped, update.consecutive_skips) == (1, 1)
    with pytest.raises(TaskError, match="there is no optimizer 'third' for update"):
        update["third"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": "first", "b": "fist*"}, r"optimizer.b.params: no weight of the model matches 'fist\*'"),
        ({"a": "first", "b": ["second", "*.bias"]}, "first.bias is among the params of a and b"),
        ({"a": "first", "b": "first"}, "first.weight is among the params of a and b"),
        ({"a": "first", "b": "second.weight"}, "second.bias would be trained by no optimizer"),
        ({"a": None, "b": None}, "a and b have no params; one at most"),
        ({"a": "*", "b": None}, "optimizer.b has no weights to train"),
    ],
)
def test_weights_belong_to_one_optimizer(params: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divide(Pair(), params, {})


def test_weights_are_divided_by_names_or_by_the_task() -> None:
    model = Pair()
    names = {"first": ["first.weight", "first.bias"], "others": ["second.weight", "second.bias"]}
    by_params = divide(model, {"first": "first", "others": None}, {})
    by_task = divide(model, {"first": None, "others": None}, {"first": model.first.parameters()})
    assert {n: [name for name, _ in share] for n, share in by_params.items()} == names
    assert by_task.keys() == by_params.keys()
    assert [name for name, _ in by_task["first"]] == names["first"]
    with pytest.raises(ConfigError, match="the task divides the weights"):
        divide(model, {"first": "first", "others": None}, {"first": model.first.parameters()})
    assert matching(["a._orig_mod.b", "ab"], "a", "key") == ["a._orig_mod.b"]


def groups_of(**settings: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = GPT(block_size=4, layers=3, heads=1, width=4)
    groups = grouped(model, [*model.named_parameters()], "optimizer", lr=1.0, **settings)
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=0.5).param_groups


def test_biases_and_norms_are_not_decayed() -> None:
    decayed, bare = groups_of(no_decay=True)
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.5, 0.0)
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed["param_names"])
    assert all(name.endswith(".bias") or "norm" in name for name in bare["param_names"])
    (_, some) = groups_of(no_decay=["*.bias"])
    assert {name.rpartition(".")[2] for name in some["param_names"]} == {"bias"}


def test_rates_fall_with_the_distance_from_the_output() -> None:
    """0: embeddings (the head is tied to them), 1 to 3: blocks, 4: the last norm."""
    groups = groups_of(layer_decay=0.5)
    rates = {name.rpartition(".")[0]: group["lr"] for group in groups for name in group["param_names"]}
    assert (rates["tokens"], rates["positions"], rates["norm"]) == (0.0625, 0.0625, 1.0)
    assert [rates[f"blocks.{number}.attention.project"] for number in range(3)] == [0.125, 0.25, 0.5]
    model = Pair()
    with pytest.raises(ConfigError, match="layer_decay needs repeated layers"):
        grouped(model, [*model.named_parameters()], "optimizer", lr=1.0, layer_decay=0.5)


def test_groups_have_their_own_settings() -> None:
    """The first that matches a weight has it; the table shows what is not alike."""
    settings = {"tokens": {"lr": 0.1}, "slow": {"params": ["*.bias", "tok*"], "lr": 0.2, "weight_decay": 0.25}}
    groups = {group["name"]: group for group in groups_of(groups=settings, no_decay=True)}
    assert groups["tokens"]["param_names"] == ["tokens.weight"]
    assert (groups["tokens"]["lr"], groups["slow"]["lr"]) == (0.1, 0.2)
    assert groups["slow"]["weight_decay"] == 0.25, "as its group says"
    model = Pair()
    named = grouped(model, [*model.named_parameters()], "optimizer", groups={"second": {"lr": 0.5}})
    text = table(torch.optim.SGD(named, lr=1.0))
    assert [line.split() for line in text.splitlines()] == [
        ["group", "parameters", "lr"],
        ["others", "9", "1"],
        ["second", "4", "0.5"],
    ]
    assert table(torch.optim.SGD(model.parameters(), lr=1.0)) == ""


@pytest.mark.parametrize("kind", quick_first(KINDS, "everything"))
def test_killed_optimizers_are_the_undisturbed_ones(kind: str, life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, *KINDS[kind], f"run.root={tmp_path}")
    ended = life(*command, "run.name=whole")
    assert ended.status == 0, ended.output
    for step in (7, 18):
        assert life(*command, "run.name=cut", step=step).status is None
    ended = life(*command, "run.name=cut")
    assert (ended.status, "resumed from step 16" in ended.output) == (0, True), ended.output
    assert not results(tmp_path / "gan/cut").differences(results(tmp_path / "gan/whole"))
    assert main(["audit", str(tmp_path / "gan/cut")]) == 0


@pytest.mark.parametrize("layout", [slow("ddp"), "fsdp"])
def test_several_processes_train_with_several_optimizers(layout: str, crew: Crews, tmp_path: Path) -> None:
    command = (*COMMAND, f"runtime.parallel={layout}", "trainer.accumulate=4", "trainer.clip_norm=0.5")
    command = (*command, f"run.root={tmp_path}", "trainer.max_steps=10")
    ended = crew(2, *command, "run.name=whole")
    assert not any(ended.statuses), ended.output
    assert None in crew(2, *command, "run.name=cut", to=[1], step=7).statuses
    ended = crew(2, *command, "run.name=cut")
    assert not any(ended.statuses), ended.output
    assert "resumed from step 4" in ended.output
    assert not results(tmp_path / "gan/cut").differences(results(tmp_path / "gan/whole"))


def test_parts_of_the_state_have_the_names_of_optimizers(life: Lives, tmp_path: Path) -> None:
    """And a rate that is changed, and accepted, is that of its optimizer from then on."""
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command, "trainer.max_steps=6").status == 0
    store = CheckpointStore(LocalLocation(tmp_path / "gan/r"))
    parts = {*store.open(store.commits()[0]).parts}
    assert {"optimizer.generator", "optimizer.discriminator", "scheduler.generator"} < parts
    assert "optimizer" not in parts
    ended = life(*command, "optimizer.discriminator.lr=0", "run.on_drift=accept", "trainer.max_steps=9")
    assert ended.status == 0, ended.output
    losses = [line["train/loss_discriminator"] for line in metric_lines(tmp_path / "gan/r") if "train/lr" in line]
    assert len(losses) == 9
    weights = [store.open(commit).load("model") for commit in store.commits()]
    newest, oldest = weights[0], weights[-1]
    names = [name for name in newest if name.startswith("discriminator")]
    assert all(torch.equal(newest[name], weights[1][name]) for name in names)
    assert not all(torch.equal(newest[name], oldest[name]) for name in newest if name.startswith("generator"))


class Lookahead(torch.optim.Optimizer):
    """Has another optimizer inside, does not call the constructor of its base, and takes no names of weights."""

    def __init__(self, weights: Any, lr: float = 0.1, keeps: bool = True) -> None:
        assert all(isinstance(weight, nn.Parameter) for weight in weights)
        self.base, self.keeps = torch.optim.SGD(weights, lr, momentum=0.9), keeps
        self.param_groups, self.state, self.defaults = self.base.param_groups, {}, self.base.defaults

    def step(self) -> None:  # type: ignore[override]
        self.base.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict() if self.keeps else {}


@pytest.mark.parametrize("keeps", [True, False])
def test_what_an_optimizer_around_another_lacks_is_named(keeps: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Pair()
    node = OmegaConf.create({"_target_": f"{__name__}.Lookahead", "lr": 0.1, "keeps": keeps})
    optimizer = _optimizers(node, model, Task())
    update = WeightUpdate(model, optimizer, device=CPU)
    structure = Structure({"model": model, "optimizer": optimizer}, optimizer, Pair)
    loss = model(torch.ones(4, 2)).sum()
    update.backward(loss)
    update.step(loss)
    for step in (1, 2):
        assert structure.changes(step, {"model": model, "optimizer": optimizer}, optimizer) == {}
    lost = "state    optimizer.base (SGD) has state that the state_dict of Lookahead lacks: a resume will not be exact"
    assert caplog.messages == ([] if keeps else [f"{lost}. Save it there"])

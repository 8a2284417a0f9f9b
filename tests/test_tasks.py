"""From batches to losses and metrics."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.errors import ConfigError, TaskError
from runner.task import Task, check_metrics
from runner.tasks.classification import Classification
from runner.tasks.language import LanguageModeling
from runner.update import WeightUpdate

LABELLED = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1, 1, 0])


class Weight(nn.Module):
    """One weight times the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * inputs


class Descent(Task):
    """A loss whose gradient is the mean of the batch."""

    def training_step(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        loss = model(batch).mean()
        return {"loss": loss, "mean": batch.mean()}


class Successor(nn.Module):
    """Is sure that each byte is followed by the next higher one; notes what it is shown."""

    def __init__(self, block_size: int | None = None, next_byte: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.next_byte = next_byte
        self.shown: list[int] = []
        if block_size:
            self.block_size = block_size

    def forward(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens.shape[1])
        following = (tokens + 1) % 256 if self.next_byte is None else torch.full_like(tokens, self.next_byte)
        return F.one_hot(following, 256) * 100.0 + self.weight


class Unsure(Successor):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) / 100


class Uniform(Successor):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 256) + self.weight


def descended(cuts: list[int], **options: Any) -> tuple[float, dict[str, Tensor]]:
    """The weight after one step over 1, 2, 3 and 6, cut into micro-batches, and the metrics of the step."""
    model = Weight()
    update = WeightUpdate(
        model, torch.optim.SGD(model.parameters(), lr=1.0), device=torch.device("cpu"), clip_norm=1e9, **options
    )
    pieces = torch.tensor([1.0, 2.0, 3.0, 6.0]).split(cuts)
    metrics = Descent().optimization_step(model, ((len(piece) / 4, piece) for piece in pieces), update)
    return model.weight.item(), dict(metrics)


@pytest.mark.parametrize("cuts", [[4], [2, 2], [1, 1, 1, 1], [3, 1]])
def test_micro_batches_make_the_step_of_the_global_batch(cuts: list[int]) -> None:
    weight, metrics = descended(cuts)
    assert weight == -3.0
    assert metrics["mean"].item() == 3.0
    assert metrics["loss"].item() == 0.0
    assert metrics["grad_norm"].item() == 3.0


def test_metrics_hold_on_to_no_graph() -> None:
    _, metrics = descended([2, 2])
    assert not any(value.requires_grad for value in metrics.values())


def test_a_task_is_evaluated_as_it_is_trained_by_default() -> None:
    task, model = Descent(), Weight()
    batch = torch.ones(2)
    assert task.evaluation_step(model, batch) == task.training_step(model, batch)
    metrics = {"loss": 1.0}
    assert task.evaluation_end(model, metrics) is metrics


def test_an_output_of_transformers_counts_as_its_loss() -> None:
    class ModelOutput(dict[str, Any]):
        loss = torch.ones(())

    class CausalOutput(ModelOutput):
        """Has logits, too, which are no metric."""

    assert check_metrics(CausalOutput(loss=torch.ones(()), logits=torch.ones(3, 2)), "step") == {"loss": torch.ones(())}
    CausalOutput.loss = None
    with pytest.raises(TaskError, match="step returned a CausalOutput without a loss: the model needs labels"):
        check_metrics(CausalOutput(logits=torch.ones(3, 2)), "step")


def test_classification_trains_on_cross_entropy() -> None:
    assert torch.equal(
        Classification().training_step(nn.Identity(), LABELLED)["loss"], F.cross_entropy(LABELLED[0], LABELLED[1])
    )


def test_label_smoothing_is_for_training_only() -> None:
    smooth = Classification(label_smoothing=0.25)
    expected = F.cross_entropy(LABELLED[0], LABELLED[1], label_smoothing=0.25)
    assert torch.equal(smooth.training_step(nn.Identity(), LABELLED)["loss"], expected)
    plain = Classification().evaluation_step(nn.Identity(), LABELLED)
    assert smooth.evaluation_step(nn.Identity(), LABELLED) == plain
    assert not torch.equal(expected, plain["loss"])


def test_accuracy_is_the_share_of_labels_with_the_highest_logit() -> None:
    assert Classification().evaluation_step(nn.Identity(), LABELLED)["accuracy"].item() == 0.75


def test_a_language_model_predicts_each_byte_from_the_earlier() -> None:
    counting = torch.arange(250, 259).remainder(256).to(torch.uint8).expand(2, 9)
    model = Successor()
    assert LanguageModeling().training_step(model, counting)["loss"].item() == 0.0
    assert model.shown == [8]
    assert LanguageModeling().training_step(model, counting.flip(1))["loss"].item() > 50


def test_bits_per_byte_are_those_of_an_ideal_compressor() -> None:
    task = LanguageModeling(sample_bytes=0)
    loss = task.evaluation_step(Uniform(), torch.zeros(3, 5, dtype=torch.uint8))["loss"].item()
    report = task.evaluation_end(Uniform(), {"loss": math.log(256), "other": 1.0})
    assert report == {"loss": math.log(256), "other": 1.0, "bits_per_byte": 8.0}
    assert loss == torch.tensor(256.0).log().item()


def test_the_sample_goes_on_from_the_prompt() -> None:
    report = LanguageModeling(prompt="ab", sample_bytes=4).evaluation_end(Successor(), {"loss": 0.0})
    assert report["sample"] == "abcdef"


@pytest.mark.parametrize(("block_size", "longest"), [(3, 3), (None, 128)])
def test_sampling_shows_a_model_no_more_than_its_block(block_size: int | None, longest: int) -> None:
    model = Successor(block_size)
    LanguageModeling(prompt="a", sample_bytes=140).evaluation_end(model, {"loss": 0.0})
    assert max(model.shown) == longest
    assert len(model.shown) == 140


def test_a_sample_is_drawn_from_the_global_generator() -> None:
    task = LanguageModeling(prompt="a", sample_bytes=20)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(task.evaluation_end(Uniform(), {"loss": 0.0})["sample"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_low_temperature_samples_the_most_likely() -> None:
    torch.manual_seed(0)
    cold, warm = (LanguageModeling(prompt="a", sample_bytes=9, temperature=degrees) for degrees in (0.01, 1.0))
    assert cold.evaluation_end(Unsure(), {"loss": 0.0})["sample"] == "abcdefghij"
    assert warm.evaluation_end(Unsure(), {"loss": 0.0})["sample"] != "abcdefghij"


def test_a_sample_that_is_no_text_is_shown_all_the_same() -> None:
    report = LanguageModeling(prompt="ü", sample_bytes=2).evaluation_end(Successor(next_byte=0xFF), {"loss": 0.0})
    assert report["sample"] == "ü\ufffd\ufffd"


def test_a_prompt_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.prompt is empty"):
        LanguageModeling(prompt="")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "Mine.training_step returned a NoneType; expected a dict of scalar tensors"),
        (torch.tensor(1.0), "Mine.training_step returned a tensor of shape []; expected a dict"),
        ({"loss": torch.ones(4)}, "returned 'loss' as a tensor of shape [4]; expected a tensor of shape []"),
        ({"loss": torch.tensor(1.0), "name": "x"}, "returned 'name' as a str; expected a tensor of shape []"),
        ({"los": torch.tensor(1.0)}, "returned 'los' and no 'loss'"),
        ({}, "returned nothing and no 'loss'"),
    ],
)
def test_unusable_metrics_are_reported_with_an_example(metrics: Any, message: str) -> None:
    with pytest.raises(TaskError) as error:
        check_metrics(metrics, "Mine.training_step")
    assert message in str(error.value)
    assert '{"loss": loss, ' in str(error.value)


@pytest.mark.parametrize("number", [0.1, 3, True, np.float32(0.5), np.int64(2)])
def test_numbers_among_the_metrics_are_tensors(number: Any) -> None:
    """``"accuracy": hits / count`` is what people write."""
    loss = torch.tensor(1.0)
    metrics = check_metrics({"first": number, "loss": loss}, "Mine.training_step")
    assert [*metrics] == ["first", "loss"]
    assert metrics["loss"] is loss
    assert metrics["first"].item() == float(number)


def test_an_evaluation_needs_no_loss() -> None:
    metrics = {"accuracy": torch.tensor(1.0)}
    assert check_metrics(metrics, "Mine.evaluation_step", training=False) is metrics


def test_a_loss_that_trains_nothing_is_reported() -> None:
    model = Weight().requires_grad_(False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    update = WeightUpdate(model, optimizer, device=torch.device("cpu"))
    with pytest.raises(TaskError, match="requires_grad=False"):
        Descent().optimization_step(model, [(1.0, torch.ones(2))], update)

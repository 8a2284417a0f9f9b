"""The models that come with the runner."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from runner.checkpoint.encoding import decode, encode
from runner.models.convnet import ConvNet
from runner.models.gpt import GPT
from runner.models.mlp import MLP


def gpt(*, dropout: float = 0.0, layers: int = 2) -> GPT:
    torch.manual_seed(0)
    return GPT(block_size=16, layers=layers, heads=2, width=8, dropout=dropout)


def text(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))


def test_a_later_byte_never_changes_earlier_logits() -> None:
    model, tokens = gpt(), text()
    before = model(tokens)
    for place in range(16):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 256
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not (after[:, place:] == before[:, place:]).all(-1).any()


def test_the_rows_of_a_batch_do_not_see_each_other() -> None:
    model, tokens = gpt(), text()
    changed = tokens.clone()
    changed[1] = 0
    assert torch.equal(model(changed)[0], model(tokens)[0])


def test_the_order_of_bytes_matters() -> None:
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(gpt()(tokens)[0, -1], gpt()(tokens[:, [1, 0, 2, 3]])[0, -1])


def test_a_text_may_be_shorter_than_a_block_but_not_longer() -> None:
    assert gpt()(text(3, 1)).shape == (3, 1, 256)
    with pytest.raises(IndexError):
        gpt()(text(1, 17))


def test_embedding_and_head_are_one_weight() -> None:
    model = gpt()
    assert model.head.weight is model.tokens.weight
    assert len([name for name, _ in model.named_parameters() if "tokens" in name or "head" in name]) == 1


def test_tied_weights_stay_tied_through_training_and_restoring() -> None:
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(text()).flatten(0, 1), text().flatten()).backward()
    optimizer.step()
    value, tensors = encode(model.state_dict(), "model")
    restored = gpt(layers=2)
    restored.load_state_dict(decode(json.loads(json.dumps(value)), lambda name: tensors[name].clone()))
    for either in (model, restored):
        assert torch.equal(either.head.weight, either.tokens.weight)
        assert either.head.weight is either.tokens.weight
    assert torch.equal(restored(text()), model(text()))


def test_residual_branches_begin_smaller_the_more_there_are() -> None:
    def spread(model: GPT) -> float:
        return torch.cat([block.attention.project.weight.flatten() for block in model.blocks]).std().item()

    ratio = spread(gpt(layers=1)) / spread(gpt(layers=16))
    assert 3 < ratio < 5


def test_a_width_not_divisible_by_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.width=10 is not divisible by model\.heads=4"):
        GPT(block_size=4, layers=1, heads=4, width=10)


@pytest.mark.parametrize(("size", "channels"), [(28, [4, 8]), (8, [4]), (9, [2, 3, 4]), (1, [])])
def test_a_convolutional_net_takes_images_of_its_size(size: int, channels: list[int]) -> None:
    model = ConvNet(image_size=size, channels=channels, classes=7)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("hidden", [[], [5], [5, 6, 7]])
def test_a_perceptron_flattens_its_inputs(hidden: list[int]) -> None:
    model = MLP(inputs=12, hidden=hidden, outputs=3)
    assert model(torch.zeros(2, 12)).shape == model(torch.zeros(2, 1, 3, 4)).shape == (2, 3)
    assert len([layer for layer in model.layers if isinstance(layer, nn.Linear)]) == len(hidden) + 1


MODELS: list[Callable[[], nn.Module]] = [
    lambda: gpt(dropout=0.5),
    lambda: ConvNet(image_size=8, channels=[4], dropout=0.5),
    lambda: MLP(inputs=64, hidden=[8], outputs=3, dropout=0.5),
]
INPUTS = [text(), torch.rand(2, 1, 8, 8), torch.rand(2, 64)]


@pytest.mark.parametrize(("make", "inputs"), [*zip(MODELS, INPUTS, strict=True)], ids=["gpt", "convnet", "mlp"])
def test_dropout_is_for_training_only(make: Callable[[], nn.Module], inputs: torch.Tensor) -> None:
    model = make()
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("make", MODELS, ids=["gpt", "convnet", "mlp"])
def test_the_seed_decides_the_first_weights(make: Callable[[], nn.Module]) -> None:
    models = []
    for seed in (1, 1):
        torch.manual_seed(seed)
        models.append(make().state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])

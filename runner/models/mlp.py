"""A multi-layer perceptron: the smallest model worth training."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU and dropout; [B, ...] is flattened to [B, inputs] -> [B, outputs]."""

    def __init__(self, *, inputs: int, hidden: list[int], outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        width = inputs
        for out in hidden:
            layers += [nn.Linear(width, out), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            width = out
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs

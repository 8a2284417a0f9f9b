"""A small convolutional classifier for small grey images."""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two 3x3 convolutions per stage, halving the image after each; [B, 1, H, W] -> logits [B, classes]."""

    def __init__(self, *, image_size: int, channels: list[int], classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        width, side = 1, image_size
        for out in channels:
            stages += [*_conv(width, out), *_conv(out, out), nn.MaxPool2d(2), nn.Dropout2d(dropout / 2)]
            width, side = out, side // 2
        self.features = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * side * side, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def _conv(width: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]

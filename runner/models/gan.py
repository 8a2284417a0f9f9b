"""A small generator and discriminator of images (Goodfellow et al. 2014)."""

import torch
from torch import Tensor, nn


class GAN(nn.Module):
    """``part="generator"``: noise [B, noise] -> images [B, 1, image_size, image_size] in [0, 1]; ``"discriminator"``:
    images -> logits [B] that an image is real. Both through ``forward``, so that the model may be sharded.
    """

    def __init__(self, *, image_size: int, noise: int, width: int) -> None:
        super().__init__()
        self.noise, pixels = noise, image_size**2
        self.generator = nn.Sequential(
            *_layer(noise, width), *_layer(width, width), nn.Linear(width, pixels), nn.Sigmoid()
        )
        self.generator.append(nn.Unflatten(1, (1, image_size, image_size)))
        self.discriminator = nn.Sequential(
            nn.Flatten(), *_layer(pixels, width), *_layer(width, width), nn.Linear(width, 1), nn.Flatten(0)
        )

    def forward(self, inputs: Tensor, part: str = "generator") -> Tensor:
        outputs: Tensor = self.get_submodule(part)(inputs)
        return outputs

    def sample(self, count: int, like: Tensor) -> Tensor:
        """As many images from noise, on the device of a tensor."""
        images: Tensor = self(torch.randn(count, self.noise, device=like.device), "generator")
        return images


def _layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]

"""Small grey images with labels, in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from runner.errors import DataError


class LabelledImages:
    """Images in memory: float [N, 1, H, W] in [0, 1] with integer labels [N]; augmented when read.

    ``shift`` moves an image by up to so many pixels in both directions; ``flip`` mirrors half of the images.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, shift: int = 0, flip: bool = False) -> None:
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images and {len(labels)} labels do not belong together")
        self.images = F.pad(images, [shift] * 4)
        self.labels = labels.tolist()
        self.shift = shift
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.shift:
            side = image.shape[-1] - 2 * self.shift
            top, left = torch.randint(2 * self.shift + 1, (2,)).tolist()
            image = image[:, top : top + side, left : left + side]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, self.labels[index]

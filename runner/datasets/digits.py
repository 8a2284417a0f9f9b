"""Handwritten digits: 1797 images of 8x8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998, CC BY 4.0)."""

import torch

from runner.datasets.images import LabelledImages
from runner.errors import ConfigError


class Digits(LabelledImages):
    """1437 images to train on, 360 to validate with."""

    def __init__(self, *, split: str, shift: int = 0) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ConfigError("the digits come with scikit-learn: pip install 'hydra-runner[examples]'") from error
        data = load_digits()
        validation = torch.zeros(len(data.target), dtype=torch.bool)
        validation[::5] = True  # the file's writers are mixed
        mask = {"train": ~validation, "validation": validation}.get(split)
        if mask is None:
            raise ConfigError(f"digits have no split {split!r}; there are train and validation")
        images = torch.from_numpy(data.images).float()[mask].unsqueeze(1) / 16
        super().__init__(images, torch.from_numpy(data.target)[mask], shift=shift)

"""Fashion-MNIST: 60000 and 10000 pictures of clothing of 28x28 pixels (Xiao, Rasul and Vollgraf 2017, MIT)."""

import math

import numpy as np
import torch
from torch import Tensor

from runner.datasets.images import LabelledImages
from runner.errors import ConfigError, DataError
from runner.storage import files

_PREFIX = {"train": "train", "test": "t10k"}
_REMEDY = (
    "On Debian and Ubuntu 'apt-get install dataset-fashion-mnist' installs the files; elsewhere get the four "
    "*-ubyte.gz files from github.com/zalandoresearch/fashion-mnist and set data.train.path to their folder or URL."
)


class FashionMNIST(LabelledImages):
    """Reads ``<path>/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``, ``path`` being any fsspec path."""

    def __init__(self, *, path: str, split: str, shift: int = 0, flip: bool = False) -> None:
        if split not in _PREFIX:
            raise ConfigError(f"Fashion-MNIST has no split {split!r}; there are train and test")
        try:
            images = _read_idx(f"{path}/{_PREFIX[split]}-images-idx3-ubyte.gz")
            labels = _read_idx(f"{path}/{_PREFIX[split]}-labels-idx1-ubyte.gz")
        except DataError as error:
            raise DataError(f"{error}\n{_REMEDY}") from error
        super().__init__(images.unsqueeze(1).float() / 255, labels, shift=shift, flip=flip)


def _read_idx(path: str) -> Tensor:
    """A uint8 tensor from LeCun's idx format: two zeros, type (8), rank, then sizes as big-endian 32-bit numbers."""
    raw = files.read(path)
    rank = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4).tolist() if len(raw) >= 4 + 4 * rank else []
    if not rank or len(raw) != 4 + 4 * rank + math.prod(shape):
        raise DataError(f"{path} is not an idx file of unsigned bytes, or is cut short ({len(raw)} bytes)")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())

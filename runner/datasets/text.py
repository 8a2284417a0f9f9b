"""Text as bytes, in blocks of equal length."""

import sysconfig
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from runner.errors import ConfigError, DataError
from runner.storage import files


class Text:
    """Blocks of ``block_size`` + 1 bytes, each overlapping the next by one, of all files joined: uint8 tensors
    [block_size + 1].

    ``path`` is any fsspec path, folder or glob; absent, the sources of Python's standard library. Of ``held_out``
    files one goes to validation, chosen by a hash of its content; a single file gives its last part. ``limit`` keeps
    that many blocks, spread evenly.
    """

    def __init__(
        self, *, split: str, block_size: int, path: str | None = None, held_out: int = 20, limit: int | None = None
    ) -> None:
        if split not in ("train", "validation"):
            raise ConfigError(f"text has no split {split!r}; there are train and validation")
        self.block_size = block_size
        self.data = _read(path, validation=split == "validation", held_out=held_out)
        blocks = max(0, len(self.data) - 1) // block_size
        if not blocks:
            raise DataError(
                f"{path or 'the standard library'} has {len(self.data)} bytes of {split} text, fewer than one block of "
                f"{block_size + 1}; give more text or a smaller data.train.block_size"
            )
        self.size = min(blocks, limit or blocks)
        self.blocks = blocks

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.blocks // self.size * self.block_size
        return torch.from_numpy(self.data[start : start + self.block_size + 1])


def _read(path: str | None, *, validation: bool, held_out: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    texts = [files.read(name) for name in (_standard_library() if path is None else files.expand(path))]
    if len(texts) == 1:
        border = len(texts[0]) - len(texts[0]) // held_out
        chosen = [texts[0][border:] if validation else texts[0][:border]]
    else:
        chosen = [text for text in texts if (_hash(text) % held_out == 0) is validation]
    return np.frombuffer(bytearray(b"\n".join(chosen)), np.uint8)


def _standard_library() -> list[str]:
    """Python's own sources, without what was installed beside them."""
    found = files.expand(f"{sysconfig.get_path('stdlib')}/**/*.py")
    return [name for name in found if "site-packages" not in name and "dist-packages" not in name]


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")

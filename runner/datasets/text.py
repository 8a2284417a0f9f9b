"""Text as bytes, in blocks of equal length."""

import sysconfig

from torch import Tensor

from runner.errors import ConfigError, DataError
from runner.hashing import int_digest
from runner.shards.tokens import Tokens
from runner.storage import files

_NEWLINE = 10


class Text:
    """The bytes of all files, joined by newlines, in blocks: uint8 tensors [block_size + 1]; each block overlaps the
    next by one byte.

    ``path`` is any fsspec path, folder or glob; by default the sources of Python's standard library. One file of
    ``held_out`` goes to validation, chosen by a hash of its content; of a single file the last part does. ``limit``
    keeps so many blocks, spread evenly. Local files are mapped into memory, remote ones are read a block at a time.
    """

    def __init__(
        self, *, split: str, block_size: int, path: str | None = None, held_out: int = 20, limit: int | None = None
    ) -> None:
        if split not in ("train", "validation"):
            raise ConfigError(f"text has no split {split!r}; there are train and validation")
        if path is None:  # Python's own sources, without installed packages
            names = files.expand(f"{sysconfig.get_path('stdlib')}/**/*.py")
            names = [name for name in names if "site-packages" not in name and "dist-packages" not in name]
        else:
            names = files.expand(path)
        chosen, first, size = _chosen(names, validation=split == "validation", held_out=held_out)
        self._first = -(-first // block_size)
        blocks = max(0, first + size - 1) // block_size - self._first
        if blocks < 1:
            raise DataError(
                f"{path or 'the standard library'} has {size} bytes of {split} text, fewer than one block of "
                f"{block_size + 1}; give more text or a smaller data.train.block_size"
            )
        self._tokens = Tokens(path=chosen, dtype="uint8", length=block_size, separator=_NEWLINE)
        self._blocks = blocks
        self._size = min(blocks, limit or blocks)
        self.fingerprint = self._tokens.fingerprint  # changes with the files and the length of a block
        self.counts = self._tokens.counts if self._size == len(self._tokens) else []

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Tensor:
        return self._tokens[self._block(index)]

    def locate(self, index: int) -> str:
        """The file and the bytes of a block, for messages."""
        return self._tokens.locate(self._block(index))

    def _block(self, index: int) -> int:
        return self._first + index * self._blocks // self._size


def _chosen(names: list[str], *, validation: bool, held_out: int) -> tuple[list[str], int, int]:
    """The files of a split, and the first byte and the size of the split in the joined files."""
    if len(names) == 1:
        size = len(files.read(names[0]))
        border = size - size // held_out
        return (names, border, size - border) if validation else (names, 0, border)
    texts = {name: files.read(name) for name in names}
    chosen = [name for name, text in texts.items() if (int_digest(text) % held_out == 0) is validation]
    return chosen, 0, sum(len(texts[name]) + 1 for name in chosen) - 1

"""Flat arrays of tokens: ``.bin`` (raw, little endian) and ``.npy``. The whole array is one block."""

from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from numpy.lib import format as npy

from runner.errors import ConfigError, DataError
from runner.shards.blocks import Block
from runner.storage import files

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_HEADER_BYTES = 4096  # those of numpy have 128


class Arrays:
    """A record is a token of ``dtype``."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(checked(dtype)).newbyteorder("<")

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """One block, without reading the tokens."""
        if files.is_compressed(path):
            raise DataError(f"{path}: a compressed array cannot be entered in the middle; unpack it")
        start = 0
        if path.endswith(".npy"):
            dtype, count, start = _header(path, size)
            if dtype != self.dtype.name:
                raise DataError(f"{path} holds {dtype}, other shards or the configuration say {self.dtype.name}")
            if size != start + count * self.dtype.itemsize:
                raise DataError(f"{path} is cut: {size} bytes, and its header says {count} tokens of {dtype}")
        if (size - start) % self.dtype.itemsize:
            raise DataError(
                f"{path}: expected tokens of {self.dtype.itemsize} bytes ({self.dtype.name}), found {size - start} "
                "bytes; give the right dtype or restore the file"
            )
        yield Block(start, (size - start) // self.dtype.itemsize)


def dtype_of(paths: Sequence[str], dtype: str | None) -> str:
    """The dtype of the tokens: that of the first .npy header if there is one, else as configured."""
    arrays = [path for path in paths if path.endswith(".npy")]
    if arrays and dtype is None:
        return _header(arrays[0], files.stat(arrays[0]).size)[0]
    return checked(dtype or "uint16")


def checked(dtype: str) -> str:
    """``dtype`` if tokens can have it. Raises ConfigError."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is none of those that tokens can have: {', '.join(DTYPES)}")
    return dtype


def _header(path: str, size: int) -> tuple[str, int, int]:
    """Dtype, number of tokens, and where they begin."""
    file = BytesIO(files.read_range(path, 0, min(size, _HEADER_BYTES)))
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{path} is no array in numpy's format: {error}") from error
    if len(shape) != 1 or dtype.name not in DTYPES or dtype.newbyteorder("<") != dtype:
        raise DataError(
            f"{path}: expected a flat, little-endian array of integers, found {dtype.str} of shape {list(shape)}; "
            "save it with numpy.save(path, tokens.ravel())"
        )
    return dtype.name, shape[0], file.tell()

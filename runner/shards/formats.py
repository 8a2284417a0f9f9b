"""The formats of shards: how a scan finds the records of a file, and how one block of them is read later."""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.lib import format as npy

from runner.errors import ConfigError, DataError
from runner.storage import files

BLOCK_BYTES = 1 << 20  # about what a store sends in the time of one round trip
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


class Block(NamedTuple):
    """Whole records from byte ``start`` on. A block without records only reports the progress of the scan."""

    start: int
    records: int


class Format(Protocol):
    """Finds records and reads them. Holds no state."""

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """Scan a shard of ``size`` bytes, in bounded memory. A block ends where the next begins, or with the file."""

    def read(self, path: str, start: int, stop: int) -> Any:
        """The block at the bytes [start, stop); its ``len`` is the number of its records."""

    def record(self, block: Any, number: int) -> Any:
        """Record ``number`` of a block, a new object at each call. Raises ValueError for an invalid record."""


class TextLines:
    """A record is a line that ends with LF or CRLF. A compressed shard is one block, because it cannot be read from the
    middle; many small ones are read faster than a large one.
    """

    keeps_blank = True

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """A block ends at the last line end of every ``BLOCK_BYTES``, or of more where a line is longer."""
        compressed = files.is_compressed(path)
        start, total = 0, 0
        for data in _whole_lines(path):
            records = len(self._lines(data))
            total += records
            yield Block(start, 0 if compressed else records)
            start += 0 if compressed else len(data)
        if compressed:
            yield Block(0, total)

    def read(self, path: str, start: int, stop: int) -> list[bytes]:
        return self._lines(files.read(path) if files.is_compressed(path) else files.read_range(path, start, stop))

    def record(self, block: list[bytes], number: int) -> Any:
        return block[number].removesuffix(b"\r").decode()

    def _lines(self, data: bytes) -> list[bytes]:
        lines = data.split(b"\n")
        if not lines[-1]:  # after the last line end, or without data; to cut it off before would copy the block
            del lines[-1]
        return lines if self.keeps_blank else [line for line in lines if line.strip()]


class JsonLines(TextLines):
    """A record is a line of JSON. Blank lines are skipped."""

    keeps_blank = False

    def record(self, block: list[bytes], number: int) -> Any:
        text = str(block[number], "utf-8")
        try:
            value, end = _decode_json(text)  # ``loads`` looks for blanks as well, which takes longer
        except ValueError:
            end = -1
        return value if end == len(text) else json.loads(text)


_decode_json = json.JSONDecoder().raw_decode


def _whole_lines(path: str) -> Iterator[bytes]:
    """Pieces of about ``BLOCK_BYTES`` that end with a line end, except perhaps the last."""
    head: list[bytes] = []  # pieces of an unfinished line; joined once, so that long lines take linear time
    for piece in files.chunks(path, BLOCK_BYTES):
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield b"".join([*head, piece[:cut]])
            head = []
        if cut < len(piece):
            head.append(piece[cut:])
    if head:
        yield b"".join(head)


_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_METADATA_NAME = re.compile(r"__[^/]*__(/|$)")  # files in which webdataset keeps its own metadata


class Tar:
    """Tar archives in webdataset's convention: ``dir/000.jpg dir/000.cls dir/001.jpg ...``.

    Consecutive members whose names agree up to the first dot of the base name are one record,
    ``{"__key__": "dir/000", "jpg": bytes, "cls": bytes}``. Members without such a name, and members that are not
    regular files, are skipped. A block begins with the (extended) header of a record's first member.
    """

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """Reads only the headers where the store can seek."""
        start = records = 0
        record: dict[str, Any] = {}
        with files.open_file(path) as file, _tar_archive(file, path) as archive:
            for key, suffix, info in _record_members(archive):
                if key != record.get("__key__"):
                    if records and info.offset - start >= BLOCK_BYTES:
                        yield Block(start, records)
                        records = 0
                    start = start if records else info.offset
                    records += 1
                    record = {"__key__": key}
                if suffix in record:
                    where = f"its second is at byte {info.offset}"
                    raise DataError(f"{path}: record {key!r} has two members .{suffix}; {where}")
                record[suffix] = info
            _check_tar_end(archive, file, path)
        if records:
            yield Block(start, records)

    def read(self, path: str, start: int, stop: int) -> list[dict[str, Any]]:
        """Records whose members are views of the block."""
        records: list[dict[str, Any]] = []
        data = files.read_range(path, start, stop)
        with _tar_archive(BytesIO(data), path) as archive:
            for key, suffix, info in _record_members(archive):
                if not records or records[-1]["__key__"] != key:
                    records.append({"__key__": key})
                content = archive.extractfile(info) if info.issparse() else None
                whole = memoryview(data)[info.offset_data : info.offset_data + info.size]
                records[-1][suffix] = content.read() if content else whole
        return records

    def record(self, block: list[dict[str, Any]], number: int) -> dict[str, Any]:
        """The record with the bytes of its members."""
        return {name: value if name == "__key__" else bytes(value) for name, value in block[number].items()}


@contextmanager
def _tar_archive(file: BinaryIO | BytesIO, path: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a whole tar archive: {error}; make or fetch it again") from error


def _record_members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The key of the record, the suffix and the header of each member of a record."""
    if archive.firstmember is None:  # type: ignore[attr-defined]  # empty: Python 3.10 would seek before its start
        return
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # else the archive remembers them all
        name = _MEMBER_NAME.fullmatch(info.name)
        if name and info.isreg() and not _METADATA_NAME.match(info.name):
            yield name[1], name[2].lower(), info


def _check_tar_end(archive: tarfile.TarFile, file: BinaryIO, path: str) -> None:
    """Raise DataError for a damaged header, which tarfile takes for the end of the archive."""
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise DataError(f"{path} is damaged: no header at byte {archive.offset}; make or fetch it again")


class Parquet:
    """Parquet files, through pyarrow. A record is a row, as a dict; a block is a row group, in memory as columns."""

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        with _parquet_file(path) as file:
            for group in range(file.metadata.num_row_groups):
                metadata = file.metadata.row_group(group)
                yield Block(_first_byte(metadata), metadata.num_rows)

    def read(self, path: str, start: int, stop: int) -> Any:
        """The table of the group that begins at byte ``start``; empty if no group begins there."""
        with _parquet_file(path) as file:
            metadata = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            group = [g for g, data in enumerate(metadata) if data.num_rows and _first_byte(data) == start]
            # One thread: pyarrow's pool does not survive a fork.
            return file.read_row_groups(group, use_threads=False)

    def record(self, block: Any, number: int) -> dict[str, Any]:
        row: dict[str, Any] = block.slice(number, 1).to_pylist()[0]
        return row


@contextmanager
def _parquet_file(path: str) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install 'hydra-runner[parquet]'") from error
    with files.open_file(path) as file, ParquetFile(file) as parquet:
        yield parquet


def _first_byte(group: Any) -> int:
    """The offset of a row group's first column; many writers leave its own ``file_offset`` at 0."""
    columns = [group.column(number) for number in range(group.num_columns)]
    offsets = [(c.dictionary_page_offset if c.has_dictionary_page else None) or c.data_page_offset for c in columns]
    return int(min(offsets, default=0))


_NPY_HEADER_BYTES = 4096  # numpy writes 128; other writers may write more


def token_blocks(path: str, size: int, *, dtype: str) -> Iterator[Block]:
    """The one block of a flat array of tokens, ``.bin`` (little endian) or ``.npy``, whose records are the tokens."""
    if files.is_compressed(path):
        raise DataError(f"{path}: a compressed array cannot be read from the middle; decompress it")
    start, width = 0, np.dtype(dtype).itemsize
    if path.endswith(".npy"):
        actual, count, start = _npy_header(path, size)
        if actual != dtype:
            raise DataError(f"{path} holds {actual}, but other shards or the configuration have {dtype}")
        if size != start + count * width:
            raise DataError(f"{path} is truncated: {size} bytes, but its header promises {count} tokens of {dtype}")
    if (size - start) % width:
        expected = f"expected tokens of {width} bytes ({dtype}), found {size - start} bytes"
        raise DataError(f"{path}: {expected}; give the right dtype or restore the file")
    yield Block(start, (size - start) // width)


def dtype_of(paths: Sequence[str], dtype: str | None) -> str:
    """The dtype of the tokens: as configured, else from the first .npy header, else uint16. Raises ConfigError."""
    arrays = [path for path in paths if path.endswith(".npy")]
    if arrays and dtype is None:
        return _npy_header(arrays[0], files.stat(arrays[0]).size)[0]
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not a dtype of tokens; those are {', '.join(DTYPES)}")
    return dtype or "uint16"


def _npy_header(path: str, size: int) -> tuple[str, int, int]:
    """Dtype, number of tokens, and the offset of the first."""
    file = BytesIO(files.read_range(path, 0, min(size, _NPY_HEADER_BYTES)))
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{path} is not an array in numpy's format: {error}") from error
    if len(shape) != 1 or dtype.name not in DTYPES or dtype.newbyteorder("<") != dtype:
        raise DataError(
            f"{path}: expected a flat, little-endian array of integers, found {dtype.str} of shape {list(shape)}; "
            "save it with numpy.save(path, tokens.ravel())"
        )
    return dtype.name, shape[0], file.tell()


_SUFFIXES = {"jsonl": "jsonl", "ndjson": "jsonl", "txt": "text", "text": "text", "tar": "tar", "parquet": "parquet"}
_SUFFIXES |= {"bin": "tokens", "npy": "tokens"}
KINDS = tuple(dict.fromkeys(_SUFFIXES.values()))
READERS: dict[str, Format] = {"jsonl": JsonLines(), "text": TextLines(), "tar": Tar(), "parquet": Parquet()}


def kind_of(paths: Sequence[str]) -> str:
    """The format of shards by the suffixes of their ``paths``. Raises DataError if they differ or are unknown."""
    kinds: dict[str | None, str] = {}  # format -> the first path of this format
    for path in paths:
        *stem, suffix = path.partition("::")[0].rpartition("/")[2].lower().split(".")
        kind = _SUFFIXES.get(suffix) if stem else None
        if stem and files.is_compressed(path):
            kind = _SUFFIXES.get(stem[-1])
            kind = kind if kind in ("jsonl", "text") else None
        kinds.setdefault(kind, path)
    if None in kinds:
        raise DataError(
            f"{kinds[None]}: unknown suffix; known formats: {', '.join(KINDS)}. Give the format (--format or "
            "format=...), or a glob that leaves this file out"
        )
    [kind, *others] = kinds
    if others:
        mixed = ", ".join(f"{kind} ({path})" for kind, path in kinds.items())
        raise DataError(f"expected shards of one format, found {mixed}; give a glob that matches one format")
    assert kind is not None
    return kind

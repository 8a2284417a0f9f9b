"""Tar archives in webdataset's convention: ``dir/000.jpg dir/000.cls dir/001.jpg ...``.

Consecutive members whose names agree up to the first dot of the base name are one record,
``{"__key__": "dir/000", "jpg": bytes, "cls": bytes}``. What has no such name, or is no file, is passed over.
"""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

from runner.errors import DataError
from runner.shards import blocks
from runner.shards.blocks import Block
from runner.storage import files

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(/|$)")  # webdataset's own notes


class _Part(NamedTuple):
    key: str
    suffix: str
    member: tarfile.TarInfo


class Tar:
    """A record is what has one key. Blocks begin with the (extended) header of a record's first member."""

    def blocks(self, path: str, size: int) -> Iterator[Block]:
        """Reads the headers only, where the store can seek."""
        start = records = 0
        key, seen = None, set[str]()
        with files.open_file(path) as file, _opened(file, path) as archive:
            for part in _parts(archive):
                at = part.member.offset
                if part.key != key:
                    if records and at - start >= blocks.BLOCK_BYTES:
                        yield Block(start, records)
                        records = 0
                    start = start if records else at
                    records += 1
                    key, seen = part.key, set()
                if part.suffix in seen:
                    raise DataError(
                        f"{path}: record {key!r} has two members .{part.suffix}; its second is at byte {at}"
                    )
                seen.add(part.suffix)
            _check_end(archive, file, path)
        if records:
            yield Block(start, records)

    def read(self, path: str, start: int, stop: int) -> list[dict[str, Any]]:
        """The records of a block, each with the bytes of its members."""
        records: list[dict[str, Any]] = []
        with _opened(BytesIO(files.read_range(path, start, stop)), path) as archive:
            for part in _parts(archive):
                if not records or records[-1]["__key__"] != part.key:
                    records.append({"__key__": part.key})
                content = archive.extractfile(part.member)
                assert content is not None, "a regular file has a content"
                records[-1][part.suffix] = content.read()
        return records

    def decode(self, raw: dict[str, Any]) -> dict[str, Any]:
        """A dict of the caller's own: changes must not come back with the next epoch."""
        return dict(raw)


@contextmanager
def _opened(file: BinaryIO | BytesIO, path: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise DataError(f"{path} is no whole tar archive: {error}; make or fetch it again") from error


def _parts(archive: tarfile.TarFile) -> Iterator[_Part]:
    if archive.firstmember is None:  # type: ignore[attr-defined]  # empty: Python 3.10 would seek before its start
        return
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # else the archive remembers them all
        name = _NAME.fullmatch(member.name)
        if name and member.isreg() and not _META.match(member.name):
            yield _Part(name[1], name[2].lower(), member)


def _check_end(archive: tarfile.TarFile, file: BinaryIO, path: str) -> None:
    """tarfile takes a damaged header for the end."""
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise DataError(f"{path} is damaged: no header at byte {archive.offset}; make or fetch it again")

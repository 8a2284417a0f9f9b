"""The formats of shards, by name and by suffix."""

from collections.abc import Sequence

from runner.errors import DataError
from runner.shards.arrays import Arrays
from runner.shards.blocks import Format, Scanner
from runner.shards.lines import JsonLines, Lines
from runner.shards.parquet import Parquet
from runner.shards.tar import Tar
from runner.storage import files

_SUFFIXES = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "txt": "text",
    "text": "text",
    "tar": "tar",
    "parquet": "parquet",
    "bin": "tokens",
    "npy": "tokens",
}
KINDS = tuple(dict.fromkeys(_SUFFIXES.values()))
_READERS: dict[str, Format] = {"jsonl": JsonLines(), "text": Lines(), "tar": Tar(), "parquet": Parquet()}


def scanner(kind: str, dtype: str | None) -> Scanner:
    """What scans shards of ``kind``, one of ``KINDS``; only ``tokens`` have a ``dtype``."""
    return reader(kind) if dtype is None else Arrays(dtype)


def reader(kind: str) -> Format:
    """What reads the records of shards of ``kind``: any but ``tokens``."""
    return _READERS[kind]


def kind_of(paths: Sequence[str]) -> str:
    """The one format that the suffixes of all ``paths`` say. Raises DataError."""
    kinds: dict[str, str] = {}  # format -> the first path of it
    for path in paths:
        kind = _kind(path)
        if kind is None:
            raise DataError(
                f"{path}: its suffix says none of the formats {', '.join(KINDS)}. Give the format (--format, or "
                "format=...), or a glob that leaves this file out"
            )
        kinds.setdefault(kind, path)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({path})" for kind, path in kinds.items())
        raise DataError(f"expected shards of one format, found {found}; give a glob that matches those of one")
    return next(iter(kinds))


def _kind(path: str) -> str | None:
    *stem, suffix = path.partition("::")[0].rpartition("/")[2].lower().split(".")
    if files.is_compressed(path):
        kind = _SUFFIXES.get(stem[-1]) if stem else None
        return kind if kind in ("jsonl", "text") else None
    return _SUFFIXES.get(suffix) if stem else None

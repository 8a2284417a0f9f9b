"""Parses the JSON of a manifest. Anyone may have written it, so every key is checked before it is used."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.shards.arrays import DTYPES
from runner.shards.formats import KINDS
from runner.shards.shard import Shard

_LARGEST = 1 << 62


class Fault(Exception):
    """A key that is not as it must be."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a manifest says; ``again`` is the command that completes it, None if it is complete."""

    kind: str
    dtype: str | None
    again: str | None
    shards: tuple[Shard, ...]


def parse(data: bytes, folder: str, version: int) -> Parsed:
    """The manifest in ``data``, its relative names taken from ``folder``. Raises Fault."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Fault(f"it is no JSON ({error})") from None
    _expect(isinstance(found, dict), "the whole", "an object", found)
    _expect(
        type(found.get("format")) is int and found["format"] == version, "format", str(version), found.get("format")
    )
    kind, dtype = found.get("kind"), found.get("dtype")
    _expect(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
    _expect(dtype in DTYPES if kind == "tokens" else dtype is None, "dtype", "that of tokens, else null", dtype)
    complete, again, shards = found.get("complete"), found.get("again"), found.get("shards")
    _expect(isinstance(complete, bool), "complete", "true or false", complete)
    _expect(complete or isinstance(again, str), "again", "the command that completes it", again)
    _expect(isinstance(shards, list), "shards", "a list", shards)
    parsed = tuple(_shard(shard, f"shards[{number}]", folder) for number, shard in enumerate(shards))
    _expect(len({shard.url for shard in parsed}) == len(parsed), "shards", "each shard once", "a name twice")
    _expect(sum(s.records for s in parsed) < _LARGEST, "shards", "fewer than 2^62 records", "more")
    if kind == "tokens":
        _check_tokens(parsed, np.dtype(dtype).itemsize)
    return Parsed(kind, dtype, None if complete else again, parsed)


def _shard(found: Any, key: str, folder: str) -> Shard:
    _expect(isinstance(found, dict), key, "an object", found)
    name, mark, starts = found.get("name"), found.get("mark"), found.get("starts")
    _expect(isinstance(name, str) and name != "", f"{key}.name", "a path", name)
    _expect(isinstance(mark, str), f"{key}.mark", "a text", mark)
    size, records = _count(found.get("size"), f"{key}.size"), _count(found.get("records"), f"{key}.records")
    _expect(isinstance(starts, dict), f"{key}.starts", "an object", starts)
    firsts = _rising(starts.get("records"), f"{key}.starts.records", records)
    offsets = _rising(starts.get("bytes"), f"{key}.starts.bytes", size)
    _expect(len(firsts) == len(offsets), f"{key}.starts", "as many records as bytes", f"{len(firsts)}, {len(offsets)}")
    _expect(firsts[:1].tolist() == [0][:records], f"{key}.starts.records", "0 first", firsts[:1].tolist())
    absolute = "://" in name or name.startswith("/")
    return Shard(name if absolute else f"{folder}/{name}", size, mark, records, np.stack([firsts, offsets]))


def _check_tokens(shards: tuple[Shard, ...], width: int) -> None:
    for number, shard in enumerate(shards):
        start = shard.starts[1, :1].sum()
        fits = shard.starts.shape[1] <= 1 and (not shard.records or start + shard.records * width == shard.size)
        _expect(fits, f"shards[{number}]", f"tokens of {width} bytes from one start to the end", shard.records)


def _count(found: Any, key: str) -> int:
    _expect(type(found) is int and 0 <= found < _LARGEST, key, "a number from 0 to 2^62", found)
    return int(found)


def _rising(found: Any, key: str, end: int) -> NDArray[np.int64]:
    """A list of numbers, each greater than the one before, in [0, end)."""
    _expect(isinstance(found, list) and all(type(each) is int for each in found), key, "a list of numbers", found)
    _expect(not found or (min(found) >= 0 and max(found) < end), key, f"numbers from 0 to {end - 1}", found)
    numbers = np.array(found, dtype=np.int64)
    _expect(bool((np.diff(numbers) > 0).all()), key, "rising numbers", found)
    return numbers


def _expect(holds: object, key: str, expected: str, found: object) -> None:
    if not holds:
        told = repr(found)
        raise Fault(f"{key}: expected {expected}, found {told if len(told) <= 60 else told[:60] + '...'}")

"""Hashes of content, and seeds, which are hashes too. Digests are on disk and in names of files: no function here may
change its result.
"""

import hashlib
import json
from typing import Any

import xxhash

Buffer = bytes | bytearray | memoryview


def derive(label: str, *parts: int | str) -> int:
    """A 64-bit seed for the purpose ``label``: a hash, not a sum: ``seed + epoch`` is the same for one run and
    for the next epoch of the run with the seed before.
    """
    return int_digest(json.dumps([label, *parts]).encode())


def hex_digest(*pieces: Buffer, size: int = 8) -> str:
    """blake2b of bytes in one piece or several: ``2 * size`` hex digits. For identities, such as that of a data set."""
    hasher = hashlib.blake2b(digest_size=size)
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()


def json_digest(value: Any, *pieces: Buffer, sort_keys: bool = False) -> str:
    """``hex_digest`` of a value as JSON, followed by ``pieces``; ``json_digest([1, "a"])`` has 16 digits."""
    return hex_digest(json.dumps(value, sort_keys=sort_keys).encode(), *pieces)


def int_digest(data: Buffer, *, size: int = 8) -> int:
    """blake2b of bytes as a whole number of ``size`` bytes, to choose by content."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little")


def sha256_digest(data: Buffer) -> str:
    """64 hex digits; for what others compare with ``sha256sum``, and where two contents must never meet."""
    return hashlib.sha256(data).hexdigest()


def checksum(*pieces: Buffer, key: bytes | None = None) -> str:
    """A checksum of many bytes: ``xxh3:<hex>`` (128 bits), which is as fast as memory and resists accidents; with a
    ``key`` ``blake2b:<hex>``, which resists attackers too.
    """
    # blake2b takes at most 64 bytes of a key, so the key is hashed first.
    hasher = xxhash.xxh3_128() if key is None else hashlib.blake2b(digest_size=32, key=hashlib.sha256(key).digest())
    for piece in pieces:
        hasher.update(piece)
    return f"{'xxh3' if key is None else 'blake2b'}:{hasher.hexdigest()}"


def content_hasher() -> xxhash.xxh3_64:
    """An incremental 64-bit hash of the samples of a step (``update``, ``intdigest``)."""
    return xxhash.xxh3_64()


def sha256_hasher() -> "hashlib._Hash":
    """``sha256_digest`` step by step (``update``, ``hexdigest``), for bytes that are not all in memory."""
    return hashlib.sha256()

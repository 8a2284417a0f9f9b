"""Seeds that are hashes of labelled tuples, never sums: ``seed + epoch`` of one run is that of its neighbour."""

import json
from hashlib import blake2b


def derive(label: str, *parts: int | str) -> int:
    """A 64-bit seed for the purpose ``label``; frozen by a golden test, because old runs depend on it."""
    return int.from_bytes(blake2b(json.dumps([label, *parts]).encode(), digest_size=8).digest(), "little")

"""JSON that anyone may have written, as plain values that can be compared, added up and shown.

Other values would fail later, and far from here: whole numbers that are no float or that Python does not print, and
lists in lists that are too deep to be walked.
"""

import json
from typing import Any

MAX_DEPTH = 100
MAX_DIGITS = 300  # of a whole number; the largest float has 309


def parse(raw: bytes) -> Any:
    """The value. Raises ValueError for what is not JSON, and for values beyond the bounds."""
    try:
        value = json.loads(raw, parse_int=parse_integer)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels") from None
    if is_deep(value, MAX_DEPTH):
        raise ValueError(f"more than {MAX_DEPTH} levels")
    return value


def parse_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object; None where there is none."""
    try:
        value = parse(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parse_integer(text: str) -> int:
    """A whole number. Raises ValueError for too long a text."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def is_deep(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than ``depth`` levels; does not recurse."""
    level = [value]
    for _ in range(depth):
        nested = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in nested for item in items if isinstance(item, dict | list | tuple)]
        if not level:
            return False
    return True

"""JSON of unknown origin, parsed within bounds, so that its values can be compared, added up and printed.

Without the bounds, integers that do not fit a float, or that Python refuses to print, and lists too deep for recursion
would fail later and elsewhere.
"""

import json
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100
MAX_DIGITS = 300  # of an integer; the largest float has 309


def parse(raw: bytes) -> Any:
    """The value. Raises ValueError for text that is not JSON, and for values beyond the bounds."""
    try:
        value = json.loads(raw, parse_int=parse_integer)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels") from None
    if is_deep(value, MAX_DEPTH):
        raise ValueError(f"more than {MAX_DEPTH} levels")
    return value


def parse_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object as a dict; None for any other text."""
    try:
        value = parse(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parse_integer(text: str) -> int:
    """An integer of at most ``MAX_DIGITS`` digits. Raises ValueError for a longer text."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def numbers_text(values: Mapping[str, Any]) -> str:
    """The numbers among named values, for people to read: ``loss 0.1234, accuracy 0.5``."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, int | float))


def is_deep(value: Any, depth: int) -> bool:
    """Whether lists and dicts are nested more than ``depth`` levels. Does not recurse."""
    level = [value]
    for _ in range(depth):
        nested = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in nested for item in items if isinstance(item, dict | list | tuple)]
        if not level:
            return False
    return True

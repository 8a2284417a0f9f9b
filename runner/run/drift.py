"""Differences between the configuration that a run was created with and the one of this command."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from runner.config.identity import flatten
from runner.config.secrets import Unresolved
from runner.errors import printable


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class Difference:
    """One key with two values; ``ABSENT`` where a side has no such key."""

    key: str
    saved: Any
    now: Any


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The keys whose resolved values differ. ``1`` equals ``1.0``, but not ``true``."""
    left, right = flatten(saved), flatten({key: _as_saved(saved.get(key), value) for key, value in now.items()})
    pairs = ((key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in sorted(left | right))
    return [Difference(*pair) for pair in pairs if not _equal(*pair[1:])]


def table(differences: list[Difference]) -> str:
    """``key | saved | now``, with control characters escaped, because anyone may have written the saved values."""
    rows = [[printable(cell) for cell in (d.key, repr(d.saved), repr(d.now))] for d in differences]
    return tabulate(rows, headers=["key", "saved", "now"], disable_numparse=True)


def _as_saved(saved: Any, now: Any) -> Any:
    """``now`` with resolved values where an older version saved these in place of ``${oc.env:NAME}``."""
    if isinstance(now, Unresolved):
        return saved if _equal(saved, now.value) else now
    if isinstance(now, Mapping) and isinstance(saved, Mapping):
        return {key: _as_saved(saved.get(key), value) for key, value in now.items()}
    if isinstance(now, list) and isinstance(saved, list) and len(now) == len(saved):
        return [*map(_as_saved, saved, now)]
    return now


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return (bool(a == b) or (a != a and b != b)) and isinstance(a, bool) == isinstance(b, bool)

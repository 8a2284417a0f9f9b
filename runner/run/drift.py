"""Differences between the configuration that a run was created with and the one of this command."""

from collections.abc import Mapping, Sequence
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
class ChangedKey:
    """One key with two values; ``ABSENT`` where a side has no such key."""

    key: str
    saved: Any
    now: Any


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[ChangedKey]:
    """The keys whose values differ. ``1`` equals ``1.0``, but not ``true``; and what an older version saved in place of
    ``${oc.env:NAME}`` equals that, if it is still what that stands for.
    """
    left, right, older = flatten(saved), flatten(now), flatten(resolved(now))
    differing = [
        key
        for key in sorted(left | right)
        if not any(_equal(left.get(key, ABSENT), now.get(key, ABSENT)) for now in (right, older))
    ]
    return [ChangedKey(key, *_shown(left.get(key, ABSENT), right.get(key, ABSENT))) for key in differing]


def resolved(value: Any) -> Any:
    """Plain values with those of the environment in their places, as older versions saved them."""
    if isinstance(value, Mapping):
        return {key: resolved(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [*map(resolved, value)]
    return value.value if isinstance(value, Unresolved) else value


def _shown(saved: Any, now: Any) -> tuple[Any, Any]:
    """Without what an older version saved of the environment."""
    older = resolved(now) != now and saved is not ABSENT and "${" not in str(saved)
    return ("***" if older else saved), now


def drift_table(differences: Sequence[ChangedKey]) -> str:
    """``key | saved | now``, with control characters escaped, because anyone may have written the saved values."""
    rows = [[printable(cell) for cell in (d.key, repr(d.saved), repr(d.now))] for d in differences]
    return tabulate(rows, headers=["key", "saved", "now"], disable_numparse=True)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return (bool(a == b) or (a != a and b != b)) and isinstance(a, bool) == isinstance(b, bool)

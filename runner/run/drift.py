"""Differences between the configuration that a run was created with and that of this command. Imports no Hydra."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from runner.config.identity import RENAMED, flatten
from runner.config.secrets import Unresolved
from runner.errors import printable


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


class ChangedKey(NamedTuple):
    """One key with two values; ``ABSENT`` where a side has no such key."""

    key: str
    saved: Any
    now: Any


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[ChangedKey]:
    """The keys whose values differ. ``1`` equals ``1.0``, but not ``true``. A value that an older version saved in
    place of ``${oc.env:NAME}`` equals the interpolation while the variable has that value.
    """
    left, right, older = flatten(saved), flatten(now), flatten(resolve(now))
    left = {RENAMED.get(key, key): value for key, value in left.items()}
    changes = []
    for key in sorted(left | right):
        old, new = left.get(key, ABSENT), right.get(key, ABSENT)
        if not _equal(old, new) and not _equal(old, older.get(key, ABSENT)):
            # A value that an older version saved of the environment may be a secret.
            secret = resolve(new) != new and old is not ABSENT and "${" not in str(old)
            changes.append(ChangedKey(key, "***" if secret else old, new))
    return changes


def resolve(value: Any) -> Any:
    """Plain values with the values of the environment in place of interpolations, as older versions saved them."""
    if isinstance(value, Mapping):
        return {key: resolve(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [*map(resolve, value)]
    return value.value if isinstance(value, Unresolved) else value


def drift_table(differences: Sequence[ChangedKey]) -> str:
    """``key | saved | now``, with control characters escaped, because anyone may have written the saved values."""
    rows = [[*map(printable, (key, repr(saved), repr(now)))] for key, saved, now in differences]
    return tabulate(rows, headers=["key", "saved", "now"], disable_numparse=True)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return (bool(a == b) or (a != a and b != b)) and isinstance(a, bool) == isinstance(b, bool)

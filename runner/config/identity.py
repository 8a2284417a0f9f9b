"""The half of a configuration that determines what is computed (its *identity*), the run's name made from it, and the
differences between two identities.

Hydra is imported only in functions, because commands that look at runs do not need it and start faster without.
"""

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.hashing import sha256_digest

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Keys that determine the results. All others only determine the execution, and may differ between attempts of a run.
IDENTITY = ("seed", "params", "model", "data", "task", "optimizer", "scheduler", "trainer", "objective", "callbacks")
_UNSET: dict[str, Any] = {  # keys that older runs lack: left out where they have these values
    "params": {},
    "data.overfit": None,
    "data.weights": None,
    "data.test": None,
    "data.evaluation_collate": None,
    "trainer.ema_params": None,
    "trainer.early_stopping.target": None,
}
# Keys with a new name, by their old one, which is read for one version, with a warning; also in runs of that version.
RENAMED: dict[str, str] = {}
# The parent of a run: recorded in run.json, and a part of the run's name, too.
_ORIGIN = ("run.parent", "run.inherit")

_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+~-]")
_SEPARATOR = re.compile("[,=]")
_MAYBE_TYPED = re.compile(r"[-+.\d\[{]|(true|false|null|nan|inf)$", re.IGNORECASE)
_RUN_OPTION = re.compile(r"(\+{0,2}run\.(?:parent|name))=(?!['\"$]|\w+\()([^\"\\]*[=~][^\"\\]*)", re.DOTALL)
_NEXT_PATH = re.compile(",(?=[^,/]*/)")
_LONGEST = 160  # bytes; file systems end at 255, and Hydra, logs and forks add to it


def identity(config: "DictConfig") -> dict[str, Any]:
    """The identity half as plain values, resolved but for what comes from the environment; enumerations by name."""
    from runner.config.schema import plain_value

    values: dict[str, Any] = {key: plain_value(config, key) for key in IDENTITY}
    for key, unset in _UNSET.items():
        *parents, name = key.split(".")
        node = reduce(getitem, parents, values)
        if node.get(name, unset) == unset:
            node.pop(name, None)
    return values


def variant(overrides: Sequence[str]) -> str:
    """The readable name of a run: the overrides of its identity and origin, sorted; ``base`` when there are none. Equal
    values give equal names (``1e-2``, ``0.010``). Where unsafe characters became ``_``, or a long name was cut, a
    digest is added, so that different runs have different names.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if re.split("[./]", key)[0] in IDENTITY or key in _ORIGIN:
            value = override.get_value_string() if override.is_sweep_override() else _canonical(override.value())
            chosen[key] = f"~{key}" if override.is_delete() else f"{key}={value}"
    full = ",".join(chosen[key] for key in sorted(chosen)) or "base"
    safe = _UNSAFE.sub("_", full)
    if safe == full and len(safe) <= _LONGEST:
        return safe
    return f"{safe[: _LONGEST - 9]}~{value_digest(full)}"  # 9: the mark and eight digits


def quote_run_names(words: Sequence[str]) -> list[str]:
    """The words of a command, with the names of runs in the quotes that Hydra wants because they hold ``=``, ``,`` and
    ``~``: a name may be typed as it is printed. In a sweep, a comma separates paths if a slash follows it.
    """
    sweep = {"-m", "--multirun"} & {*words}

    def quote(match: re.Match[str]) -> str:
        runs = _NEXT_PATH.split(match[2]) if sweep else [match[2]]
        return f'{match[1]}="' + '","'.join(runs) + '"'

    return [_RUN_OPTION.sub(quote, word) if _RUN_OPTION.fullmatch(word) else word for word in words]


def is_name(text: str) -> bool:
    """Whether a text is usable as the name of a run without changes."""
    return bool(text) and not _UNSAFE.search(text) and text[0] not in ".-" and len(text) <= _LONGEST


def value_digest(value: object) -> str:
    """Eight hex digits of a hash of plain values."""
    return sha256_digest(json.dumps(_sorted(value)).encode())[:8]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; a list is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


class ChangedKey(NamedTuple):
    """One key with two values; ``ABSENT`` where a side has no such key."""

    key: str
    before: Any
    now: Any


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[ChangedKey]:
    """The keys whose values differ. ``1`` equals ``1.0``, but not ``true``. A value that an interpolation replaces is
    shown as ``***``, because it may be a secret that was written out.
    """
    left, right = flatten(before), flatten(now)
    left = {RENAMED.get(key, key): value for key, value in left.items()}
    changes = []
    for key in sorted(left | right):
        old, new = left.get(key, ABSENT), right.get(key, ABSENT)
        if not _equal(old, new):
            replaced = old is not ABSENT and "${" in str(new) and "${" not in str(old)
            changes.append(ChangedKey(key, "***" if replaced else old, new))
    return changes


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    both_nan = a != a and b != b
    return (bool(a == b) or both_nan) and isinstance(a, bool) == isinstance(b, bool)


def _sorted(value: Any) -> Any:
    """``value`` with the keys of all mappings in order; numbers and texts may both be keys of one."""
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value, key=lambda key: (type(key).__name__, key))}
    return [*map(_sorted, value)] if isinstance(value, list | tuple) else value


def _canonical(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_canonical(v)}" for k, v in sorted(value.items(), key=str)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    text = value.name if isinstance(value, Enum) else str(value)
    # Without quotes it could read like two overrides, or the text "1" like the number.
    return repr(text) if _SEPARATOR.search(text) or (isinstance(value, str) and _needs_quotes(text)) else text


def _needs_quotes(text: str) -> bool:
    """Whether a text without its quotes is another type: a number, a list, null."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not _MAYBE_TYPED.match(text):
        return False
    try:
        return not isinstance(OverridesParser.create().parse_rule(text, "element"), str)
    except HydraException:
        return False

"""The two halves of a configuration, and the name that its identity half gives a run.

Hydra is imported where it is needed: who only looks at runs does without, and starts in half the time.
"""

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What is computed. Every other key says how it is executed and may differ between the attempts of a run.
IDENTITY = ("seed", "model", "data", "task", "optimizer", "scheduler", "trainer", "objective", "callbacks")
# What a run begins from: recorded by the run itself (run.json), and as much a part of its name.
_ORIGIN = ("run.parent", "run.inherit")

_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+~-]")
_SEPARATOR = re.compile("[,=]")
_LONGEST = 160  # bytes; file systems end at 255, and Hydra, logs and forks add to it


def identity(config: "DictConfig") -> dict[str, Any]:
    """The resolved identity half as plain values; enumerations by name."""
    return {key: _plain(config[key]) for key in IDENTITY}


def variant(overrides: Sequence[str]) -> str:
    """The readable name of a run: the overrides of its identity and origin, sorted; ``base`` when there are none.

    The same values give the same name however they are spelt (``1e-2``, ``0.010``). Unsafe characters become ``_``
    and a long name is cut; a digest then keeps different runs apart. What a sweep goes over is named as it is spelt.
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
    return f"{safe[: _LONGEST - 9]}~{digest(full)}"


def is_name(text: str) -> bool:
    """Whether a text can name a run as it is."""
    return bool(text) and not _UNSAFE.search(text) and text[0] not in ".-" and len(text) <= _LONGEST


def digest(value: object) -> str:
    """Eight hex digits that tell plain values apart."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; a list is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True, enum_to_str=True)


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
    return repr(text) if _SEPARATOR.search(text) else text  # else it could stand for two overrides

"""What ``--help KEY`` prints: the meaning of a key from the comments of ``conf/config.yaml``, its type and default; and
the same as a JSON schema for editors.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from itertools import accumulate
from pathlib import Path
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from runner.config.schema import Config
from runner.errors import ConfigError

_KINDS: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}
_INTERPOLATION = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
_NUMBER_OR_AUTO = {"anyOf": [_INTERPOLATION, {"type": "integer", "minimum": 0}, {"const": "auto"}]}
_KEY = re.compile(r"( *)(\w+):(?: (?P<value>[^#]*?))?(?: *# (?P<comment>.*))?")


@dataclass(frozen=True, slots=True)
class KeyHelp:
    """A key of a configuration file with its default, which is empty for a section, and its comment."""

    key: str
    default: str
    comment: str


def explain(key: str, file: Path) -> str:
    """The meaning of a key, and of those below it. Raises ConfigError for a key that does not exist."""
    keys = {entry.key: entry for entry in entries(file.read_text())}
    below = [entry for name, entry in keys.items() if f"{name}.".startswith(f"{key}.")]
    if below and _type(key.partition(".")[0]) is not None:
        return "\n".join(map(_text, below))
    if free := next((part for part in accumulate(key.split("."), "{}.{}".format) if _type(part) is Any), None):
        what = "an argument of the object" if key != free else "the object"
        return f"{key}\n  {what} that {free}._target_ names; choices are in conf/{free}/"
    near = get_close_matches(key, keys, 1)
    raise ConfigError(f"there is no key {key}. {f'Did you mean {near[0]}?' if near else ''}".rstrip())


def values(key: str) -> list[str]:
    """The values that a key may have, where these are a few words; empty for other keys."""
    kind = _type(key)
    return [*kind.__members__] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _text(entry: KeyHelp) -> str:
    choices = " | ".join(values(entry.key))
    default = f"default {entry.default}" if entry.default not in ("", "???") else ""
    default = "required" if entry.default == "???" else default
    facts = ", ".join(filter(None, (choices, default)))
    comment = fill(entry.comment, 100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(filter(None, (f"{entry.key}{f' ({facts})' if facts else ''}", comment)))


def entries(text: str) -> Iterator[KeyHelp]:
    """The keys of a YAML file of plain mappings, with the comments before and behind them."""
    path: list[tuple[int, str]] = []
    before: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        match = _KEY.fullmatch(line)
        if stripped.startswith("#"):
            before.append(stripped[1:].strip())
        elif match is None:
            before = []
        else:
            indent = len(match[1])
            path = [(depth, name) for depth, name in path if depth < indent] + [(indent, match[2])]
            comment = " ".join([*before, *filter(None, [match["comment"]])])
            yield KeyHelp(".".join(name for _, name in path), (match["value"] or "").strip(), comment)
            before = []


def _type(key: str) -> Any:
    """The type of a key by the schema; None if the schema does not have it."""
    kind: Any = Config
    for name in key.split("."):
        if not is_dataclass(kind) or name not in {field.name for field in fields(kind)}:
            return None
        kind = get_type_hints(kind)[name]
    return kind


def json_schema(file: Path) -> dict[str, Any]:
    """The JSON schema of a configuration file, by which editors complete and check it; comments are those of ``file``.
    Every value may be an interpolation; only keys of objects, which have a ``_target_``, are not checked.
    """
    comments = {entry.key: entry.comment for entry in entries(file.read_text())}
    schema = _json_type(Config, "", comments)
    schema["properties"] |= {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "hydra-runner", **schema}


def _json_type(kind: Any, key: str, comments: Mapping[str, str]) -> dict[str, Any]:
    about = {"description": comments[key]} if comments.get(key) else {}
    if is_dataclass(kind):
        path = f"{key}." if key else ""
        inner = {name: _json_type(each, f"{path}{name}", comments) for name, each in get_type_hints(kind).items()}
        return {**about, "type": "object", "properties": inner, "additionalProperties": False}
    if key == "runtime.num_workers":  # ``Any``, because OmegaConf 2.3 cannot merge ``int | str``
        return {**about, **_NUMBER_OR_AUTO}
    if kind is Any:
        return about
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return {**about, "anyOf": [_INTERPOLATION, *map(_json_choice, choices)]}


def _json_choice(kind: Any) -> dict[str, Any]:
    if container := {dict: "object", list: "array"}.get(get_origin(kind)):
        return {"type": container}
    return {"enum": [*kind.__members__]} if issubclass(kind, Enum) else {"type": _KINDS[kind]}

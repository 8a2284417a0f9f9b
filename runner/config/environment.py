"""Values that come from the environment: an object gets the value; identity, names and records get ``${oc.env:NAME}``.

OmegaConf's own resolver is replaced by one that notes that it was asked, and that can answer with the interpolation in
place of the value. So it does not matter through how many other keys and resolvers a value came.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.base import Container, Node

from runner.config.secrets import Unresolved, may_be_secret, names_a_secret
from runner.errors import hide_secret

_NONE = object()
_PLACES = re.compile(
    r"(run\.(root|name|parent)|runtime|checkpoint|metrics|sweep|hydra)\b"
)  # messages need their values
_asked: ContextVar[list[str] | None] = ContextVar("asked", default=None)
_masked: ContextVar[bool] = ContextVar("masked", default=False)


def plain(parent: Container, key: Any) -> Any:
    """The value of a key as plain values, with ``Unresolved`` texts in place of those from the environment.

    Numbers, booleans and choices stay: they are no secrets, and decide what is computed.
    """
    with _asking() as asked:
        value = _container(parent[key])
    return _leaves(parent, key) if asked else value


def _leaves(parent: Any, key: Any) -> Any:
    with _asking() as asked:
        found = parent[key]
    if not asked and OmegaConf.is_dict(found):
        return {_name(inner): _leaves(found, inner) for inner in found}
    if not asked and OmegaConf.is_list(found):
        return [_leaves(found, place) for place in range(len(found))]
    value = _name(_container(found))
    open_value = isinstance(found, int | float | Enum) and not names_a_secret(str(key))
    return value if open_value or not asked else Unresolved(_masked_text(parent, key), value)


def _masked_text(parent: Any, key: Any) -> str:
    """As the value would read if each variable held its own interpolation; else as it is written."""
    token = _masked.set(True)
    try:
        text = parent[key]
    except Exception:  # of a type that is no text, or of a resolver that wants another one
        text = None
    finally:
        _masked.reset(token)
    return text if isinstance(text, str) and "${oc.env:" in text else str(parent._get_node(key)._value())


def _container(found: Any) -> Any:
    if not OmegaConf.is_config(found):
        return _name(found)
    return OmegaConf.to_container(found, resolve=True, throw_on_missing=True, enum_to_str=True)


def _name(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


@contextmanager
def _asking() -> Iterator[list[str]]:
    """The variables that are asked for within the block."""
    asked: list[str] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def _env(variable: str, default: Any = _NONE, *, _node_: Node) -> str | None:
    """``oc.env``, as OmegaConf has it."""
    asked = _asked.get()
    if asked is not None:
        asked.append(variable)
    if _masked.get():
        return f"${{oc.env:{variable}}}" if default is _NONE else f"${{oc.env:{variable},{_spelt(default)}}}"
    if variable not in os.environ:
        if default is _NONE:
            raise KeyError(f"Environment variable '{variable}' not found")
        return None if default is None else str(default)
    value, key = os.environ[variable], str(_node_._get_full_key(None))
    named = names_a_secret(variable) or names_a_secret(key)
    if (named and len(value) >= 4) or (may_be_secret(value) and not _PLACES.match(key)):
        hide_secret(value)
    return value


def _spelt(default: Any) -> str:
    return "null" if default is None else str(default)


OmegaConf.register_new_resolver("oc.env", _env, replace=True)

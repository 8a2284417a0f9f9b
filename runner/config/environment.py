"""Values that come from the environment: an object gets the value; identity, names and records get ``${oc.env:NAME}``.

OmegaConf's own resolver is replaced by a resolver that notes each variable it is asked for, and that can answer with
the interpolation in place of the value. So it does not matter through how many other keys and resolvers a value came.
"""

import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.base import Container, Node

from runner.config.secrets import Unresolved, may_be_secret, names_a_secret
from runner.errors import hide_secret

_NO_DEFAULT = object()
# Below these keys a value of the environment is hidden only if its name says that it is secret: messages need them.
_SHOWN = re.compile(r"(run\.(root|name|parent)|runtime|checkpoint|metrics\.every_steps|sweep|hydra)\b")
_requested: ContextVar[list[str] | None] = ContextVar("requested", default=None)  # names of variables
_masked: ContextVar[bool] = ContextVar("masked", default=False)  # answer with interpolations


def plain_value(parent: Container, key: Any) -> Any:
    """The value of a key as plain values, with ``Unresolved`` texts in place of those from the environment. Numbers,
    booleans and choices stay: they are no secrets, and decide what is computed.
    """
    value, variables = _recorded(lambda: _plain(parent[key]))
    return _leaves(parent, key) if variables else value


def _leaves(parent: Any, key: Any) -> Any:
    node, variables = _recorded(lambda: parent[key])
    if not variables and OmegaConf.is_dict(node):
        return {_plain(inner): _leaves(node, inner) for inner in node}
    if not variables and OmegaConf.is_list(node):
        return [_leaves(node, place) for place in range(len(node))]
    value = _plain(node)
    harmless = isinstance(node, int | float | Enum) and not names_a_secret(str(key))
    return value if harmless or not variables else Unresolved(_masked_text(parent, key), value)


def _masked_text(parent: Any, key: Any) -> str:
    """The text as it would be if each variable held its own interpolation; else as it is written."""
    token = _masked.set(True)
    try:
        text = parent[key]
    except Exception:  # the type is no text, or a resolver wants another one
        text = None
    finally:
        _masked.reset(token)
    return text if isinstance(text, str) and "${oc.env:" in text else str(parent._get_node(key)._value())


def _plain(node: Any) -> Any:
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True, enum_to_str=True)
    return node.name if isinstance(node, Enum) else node


def _recorded(read: Callable[[], Any]) -> tuple[Any, list[str]]:
    variables: list[str] = []
    token = _requested.set(variables)
    try:
        return read(), variables
    finally:
        _requested.reset(token)


def _env(variable: str, default: Any = _NO_DEFAULT, *, _node_: Node) -> str | None:
    requested = _requested.get()
    if requested is not None:
        requested.append(variable)
    if _masked.get():
        text = "" if default is _NO_DEFAULT else f",{'null' if default is None else default}"
        return f"${{oc.env:{variable}{text}}}"
    if variable not in os.environ:
        if default is _NO_DEFAULT:
            raise KeyError(f"Environment variable '{variable}' not found")
        return None if default is None else str(default)
    value, key = os.environ[variable], str(_node_._get_full_key(None))
    named = names_a_secret(variable) or names_a_secret(key)
    if (named and len(value) >= 4) or (may_be_secret(value) and not _SHOWN.match(key)):
        hide_secret(value)
    return value


OmegaConf.register_new_resolver("oc.env", _env, replace=True)

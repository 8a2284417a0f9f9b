"""What the runner adds to Hydra's composition: ``imports``, old names of keys, and a ``_target_`` that starts clean.

Hydra has no hook for any of these. Its function that decides which files are merged, in which order, is wrapped here,
and is given files without the keys that must not be merged: so ``--cfg``, sweeps and Hydra's own records show the same.
A single run is composed once here, and not twice.
"""

import sys
import traceback
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from runner.config.identity import RENAMED
from runner.config.schema import Config
from runner.errors import ConfigError, import_hint

_get_mode = Hydra.get_mode


def install() -> None:
    """Wrap Hydra's functions in this process."""
    vars(config_loader_impl)["create_defaults_list"] = _defaults_list
    Hydra.get_mode = _mode  # type: ignore[assignment, method-assign]


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """``hydra.mode``, as Hydra's method. That composes to find it, and a run composes once more; here it gets the same
    configuration, 0.2 s sooner.
    """
    loader: Any = hydra.config_loader
    words = [*overrides, "hydra.mode=RUN"]  # as Hydra adds it
    try:
        config = loader.load_configuration(config_name, overrides, RunMode.RUN)
    except Exception:  # a sweep, or an error that Hydra finds again
        return _get_mode(hydra, config_name, overrides)

    def load(**options: Any) -> Any:
        del loader.load_configuration  # the method of the class again: this answers a single call
        if options["overrides"] != words:
            return loader.load_configuration(**options)
        config.hydra.mode = RunMode.RUN
        config.hydra.overrides.hydra.append(words[-1])
        return config

    loader.load_configuration = load
    return config.hydra.mode


def _defaults_list(repo: IConfigRepository, overrides_list: list[Override], **options: Any) -> DefaultsList:
    for override in overrides_list:
        _require_key(override, repo)
        if override.key_or_group == "imports" and not override.is_delete() and not override.is_sweep_override():
            _import(override.value())
    repo.load_config = partial(_load, repo.load_config)  # type: ignore[method-assign]
    listed = create_defaults_list(repo=repo, overrides_list=overrides_list, **options)
    for old, new in RENAMED.items():
        if _rename(old, new, repo, listed):
            print(f"{old} is now {new}: the old name will not be read by the next version", file=sys.stderr)
    _start_clean(repo, listed)
    for key in ("validation", "test"):
        _start_clean_sets(key, repo, listed)
    return listed


def _require_key(override: Override, repo: IConfigRepository) -> None:
    """Raise ConfigError for ``~KEY`` where every configuration has the key."""
    key = override.key_or_group
    if override.is_delete() and key in Config.__dataclass_fields__ and not repo.group_exists(key):
        raise ConfigError(f"~{key}: the key {key} cannot be removed. Give its keys other values, as --help {key} shows")


def _load(load: Any, config_path: str) -> ConfigResult | None:
    """A file of the configuration, after the modules that it imports: a choice that it makes may be registered there.

    Hydra reads an experiment before the files that this chooses.
    """
    loaded: ConfigResult | None = load(config_path=config_path)
    top_level = config_path.startswith("experiment/") or "/" not in config_path
    if loaded is not None and top_level:
        _import(_plain(loaded.config).get("imports"))
    return loaded


def _import(modules: Any) -> None:
    if not isinstance(modules, list):
        return  # the schema refuses it later
    for name in modules:
        try:
            import_module(name)
        except Exception as error:
            lines = [] if import_hint(error) else traceback.format_tb(error.__traceback__)[-1:]
            message = f"imports: {name}: {type(error).__name__}: {error}{import_hint(error)}"
            raise ConfigError("\n".join([message, *lines]).rstrip()) from error


def _rename(old: str, new: str, repo: IConfigRepository, listed: DefaultsList) -> bool:
    """Give a value its key's new name, wherever the command or a file has the old one; whether any has."""
    there = False
    for override in listed.config_overrides:
        if override.key_or_group == old:
            override.key_or_group, there = new, True
    for default in listed.defaults:
        config = getattr(repo.load_config(default.config_path or ""), "config", None)
        prefix = f"{default.package}." if default.package else ""
        parent, _, name = old.removeprefix(prefix).rpartition(".")
        node = OmegaConf.select(config, parent) if parent and config else config
        if config and old.startswith(prefix) and isinstance(node, DictConfig) and name in node:
            OmegaConf.update(config, new.removeprefix(prefix), node.pop(name), force_add=True)
            there = True
    return there


def _start_clean(repo: IConfigRepository, listed: DefaultsList) -> None:
    """Take the keys of an option that nobody chose out of it, where an experiment or the command line names another
    ``_target_``, or objects of their own below. Keys that these give, too, stay: they override them.
    """
    for default in listed.defaults:
        group, chosen = default.override_key, listed.overrides.override_choices
        if group is None or group != default.package or group in chosen:
            continue
        option = getattr(repo.load_config(default.config_path or ""), "config", None)
        if not isinstance(option, DictConfig) or "_target_" not in option:
            continue
        others = [other for other in listed.defaults if other is not default]
        files = [(other.package, repo.load_config(other.config_path or "")) for other in others]
        explicit = _explicit(group, files, listed)
        if _several(explicit) or explicit.get("_target_", option._target_) != option._target_:
            for key in {*option} - {*explicit}:
                del option[key]


def _start_clean_sets(key: str, repo: IConfigRepository, listed: DefaultsList) -> None:
    """Take the set of ``data`` out of the files that give it where a later file, or the command line, names several
    instead, and the reverse: the arguments of the one set and the names of the others would be merged.
    """
    earlier: list[DictConfig] = []
    for data in [*_data_nodes(repo, listed), _data_of_command(key, listed)]:
        node = _plain(data).get(key)
        if not isinstance(node, dict):
            earlier = [] if key in data else earlier
            continue
        before: dict[str, Any] = {name: value for each in earlier for name, value in _plain(each[key]).items()}
        to_several = _several(node) and "_target_" in before and not _takes(before["_target_"], node)
        if to_several or ("_target_" in node and _several(before)):
            for each in earlier:
                del each[key]
            earlier = []
        earlier.append(data)


def _data_nodes(repo: IConfigRepository, listed: DefaultsList) -> Iterable[DictConfig]:
    for default in listed.defaults:
        config = getattr(repo.load_config(default.config_path or ""), "config", None)
        node = config if default.package == "data" else OmegaConf.select(config, "data") if config else None
        if default.package in ("", "data") and isinstance(node, DictConfig):
            yield node


def _data_of_command(key: str, listed: DefaultsList) -> DictConfig:
    data = OmegaConf.create()
    for override in listed.config_overrides:
        parent, _, rest = override.key_or_group.partition(".")
        plain = not override.is_delete() and not override.is_sweep_override()
        if plain and parent == "data" and f"{rest}.".startswith(f"{key}."):
            OmegaConf.update(data, rest, override.value(), force_add=True)
    return data


def _several(node: dict[str, Any]) -> bool:
    return "_target_" not in node and any(isinstance(value, dict) and "_target_" in value for value in node.values())


def _takes(target: Any, names: Iterable[str]) -> bool:
    """Whether a function has arguments of these names: objects with a ``_target_`` may be arguments, too."""
    try:
        parameters = signature(get_object(target)).parameters.values()
    except Exception:  # building the data raises it again, with a better message
        return True
    return any(each.kind is each.VAR_KEYWORD or each.name in names for each in parameters)


def _explicit(group: str, files: Iterable[tuple[str | None, Any]], listed: DefaultsList) -> dict[str, Any]:
    """The keys below ``group`` with their values, as files and the command line give them; None where it deletes."""
    values: dict[str, Any] = {}
    for package, loaded in files:
        tree = _plain(loaded.config) if package in ("", group) else {}
        node = tree if package == group else tree.get(group)
        values |= node if isinstance(node, dict) else {}
    for override in listed.config_overrides:
        parent, _, rest = override.key_or_group.partition(".")
        value: Any = None if override.is_delete() else override.value()
        if parent == group:
            name, _, below = rest.partition(".")
            values |= {name: value if not below else values.get(name)} if rest else value or {}
    return values


def _plain(config: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_dict(config) else {}
    return plain if isinstance(plain, dict) else {}

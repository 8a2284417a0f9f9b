"""Names of weights: as they are saved, and by the patterns of a configuration."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from runner.errors import ConfigError

Patterns = str | Sequence[str]  # paths of weights or modules, with * and ?


def saved_name(name: str) -> str:
    """The name under which a tensor is saved: without the prefix of modules that torch.compile has wrapped, so that the
    weights fit a model that is not compiled.
    """
    return name.replace("_orig_mod.", "")


def matching(names: Iterable[str], patterns: Patterns, key: str) -> list[str]:
    """The names of weights that a pattern matches, or that are below a module that it matches. Raises ConfigError,
    naming the ``key`` of the configuration, for a pattern without a match.
    """
    names, chosen = [*names], set[str]()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = {
            n for n in names if fnmatchcase(saved_name(n), pattern) or fnmatchcase(saved_name(n), f"{pattern}.*")
        }
        if not matches:
            near = get_close_matches(pattern, names, 3, cutoff=0.3) or names[:3]
            raise ConfigError(f"{key}: no weight of the model matches {pattern!r}; there are {', '.join(near)} ...")
        chosen |= matches
    return [name for name in names if name in chosen]

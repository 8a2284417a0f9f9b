"""What a proof is asked for: ``verify.*`` among the overrides of an ordinary command."""

import difflib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from runner.errors import ConfigError

_PREFIX = "verify."
# What the proof itself decides; who gives it means something that the proof would not do.
_OURS = {
    "run.root": "the runs of a proof are under verify.root",
    "run.name": "the runs of a proof have names of their own",
    "run.on_drift": "every run of a proof is new",
    "runtime.num_workers": "give verify.workers, for example verify.workers=[0,2]",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How much is tried, and where.

    ``steps`` None: as many as show something, within about 20 seconds of training. ``workers`` are the numbers of data
    workers that lives take in turn; the first is that of the uninterrupted run. Each life has so many ``processes``.
    ``root`` None: a temporary folder. ``html`` is where a page is written. ``seed`` decides the moments of the kills.
    """

    steps: int | None = None
    kills: int = 8
    workers: tuple[int, ...] = (0, 2)
    processes: int = 1
    root: str | None = None
    html: str | None = None
    seed: int = 0
    keep: bool = False


def parse(arguments: Sequence[str]) -> tuple[Options, list[str], bool]:
    """The options, what is left for the runner, and whether JSON is wanted. Raises ConfigError."""
    ours = [argument for argument in arguments if argument.lstrip("+").startswith(_PREFIX)]
    rest = [argument for argument in arguments if argument not in ours and argument != "--json"]
    given = dict(_option(argument) for argument in ours)
    for argument in rest:
        key = argument.lstrip("+~").partition("=")[0]
        if key in _OURS:
            raise ConfigError(f"{argument}: {_OURS[key]}")
        if argument in ("-m", "--multirun"):
            raise ConfigError("a proof is of one run: leave out -m, and give one value for each key")
    return Options(**given), rest, "--json" in arguments


def new_name() -> str:
    """A name for the folder of one proof."""
    return f"verify-{secrets.token_hex(4)}"


def _option(argument: str) -> tuple[str, Any]:
    name, equals, text = argument.lstrip("+").removeprefix(_PREFIX).partition("=")
    known = [field.name for field in fields(Options)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean verify.{near[0]}?" if near else ""
        raise ConfigError(
            f"there is no option verify.{name}{hint} There are: {', '.join(f'verify.{k}' for k in known)}"
        )
    if not equals:
        raise ConfigError(f"verify.{name} needs a value, for example {_EXAMPLES[name]}")
    try:
        return name, _READ[name](text)
    except (ValueError, KeyError):
        raise ConfigError(f"verify.{name}={text} cannot be used: {_EXAMPLES[name]}") from None


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError
        return value

    return read


def _workers(text: str) -> tuple[int, ...]:
    """One number, or a list of them."""
    return tuple(_at_least(0)(each) for each in text.removeprefix("[").removesuffix("]").split(","))


def _text(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_READ: dict[str, Callable[[str], Any]] = {
    "steps": _at_least(2),
    "kills": _at_least(1),
    "workers": _workers,
    "processes": _at_least(1),
    "root": _text,
    "html": _text,
    "seed": _at_least(0),
    "keep": _flag,
}
_EXAMPLES = {
    "steps": "verify.steps=200 (at least 2)",
    "kills": "verify.kills=20 (at least 1)",
    "workers": "verify.workers=[0,2] (numbers of data workers)",
    "processes": "verify.processes=2 (at least 1)",
    "root": "verify.root=s3://bucket/scratch, or a folder",
    "html": "verify.html=report.html",
    "seed": "verify.seed=1 (at least 0)",
    "keep": "verify.keep=true, which leaves the scratch runs where they are",
}

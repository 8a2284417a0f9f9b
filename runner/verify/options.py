"""The options of a proof: ``verify.*`` among the overrides of an ordinary command."""

import difflib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from runner.errors import ConfigError

_PREFIX = "verify."
# Nine moments, so that with kills of all processes and of a single one in turn every moment gets both.
MOMENTS = ("committed", "save", "loaded", "border", "evaluation", "step", "stop", "evaluating", "clock")
# Keys that the proof decides, and what to give instead.
_RESERVED = {
    "run.root": "the runs of a proof are under verify.root",
    "run.name": "the runs of a proof have names of their own",
    "run.on_drift": "every run of a proof is new",
    "runtime.num_workers": "give verify.workers, for example verify.workers=[0,2]",
}


@dataclass(frozen=True, slots=True)
class Options:
    """The options that ``python -m runner.verify --help`` explains. ``steps`` None: up to 100, within about 20 seconds
    of training. The first of ``workers`` is their number in the undisturbed run. ``root`` None: a temporary folder.
    """

    steps: int | None = None
    minutes: float | None = None
    kills: int = 9
    moments: tuple[str, ...] = MOMENTS
    workers: tuple[int, ...] = (0, 2)
    processes: int = 1
    root: str | None = None
    html: str | None = None
    seed: int = 0
    ignore: tuple[str, ...] = ()
    keep: bool = False


def parse(arguments: Sequence[str]) -> tuple[Options, list[str], bool]:
    """The options, the arguments for the runner, and whether JSON is wanted. Raises ConfigError."""
    options = [argument for argument in arguments if argument.lstrip("+").startswith(_PREFIX)]
    rest = [argument for argument in arguments if argument not in options and argument != "--json"]
    for argument in rest:
        key = argument.lstrip("+~").partition("=")[0]
        if key in _RESERVED:
            raise ConfigError(f"{argument}: {_RESERVED[key]}")
        if argument in ("-m", "--multirun"):
            raise ConfigError("a proof is of one run: leave out -m, and give one value for each key")
    return Options(**dict(map(_option, options))), rest, "--json" in arguments


# The runner until the configuration is composed and checked: without torch, in a fraction of a second. The path is that
# of this process, since with ``python -m`` a ``runner.py`` in the working directory would hide the runner.
_CHECK = """
import sys
sys.path[:] = {path!r}
from runner.__main__ import main
from runner.callbacks.base import Observer, observers

class Checked(Observer):
    def on_command(self, directory):
        raise SystemExit(0)

observers.append(Checked())
sys.exit(main())
"""


def check(command: Sequence[str]) -> None:
    """Raise ConfigError for a command whose configuration cannot be used, before anything else is started."""
    with tempfile.TemporaryDirectory(prefix="runner-verify-") as folder:
        where = (f"run.root={folder}", "run.name=check", f"hydra.run.dir={folder}")
        line = [sys.executable, "-c", _CHECK.format(path=sys.path), *command, *where]
        result = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode == ConfigError.status:
        raise ConfigError(result.stderr.strip())


def _option(argument: str) -> tuple[str, Any]:
    name, equals, text = argument.lstrip("+").removeprefix(_PREFIX).partition("=")
    if name not in _VALID:
        near = difflib.get_close_matches(name, _VALID, 1)
        hint = f"; did you mean verify.{near[0]}?" if near else "."
        names = ", ".join(f"verify.{each.name}" for each in fields(Options))
        raise ConfigError(f"there is no option verify.{name}{hint} Options: {names}")
    valid, example = _VALID[name]
    if not equals:
        raise ConfigError(f"verify.{name} needs a value, for example {example}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    value = tuple(value) if isinstance(value, list) else value
    if not valid(value):
        raise ConfigError(f"verify.{name}={text} cannot be used: {example}")
    return name, value


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _all(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, tuple) and values != () and all(map(valid, values))


# Name -> whether a value can be used, an example.
_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_at_least(2), "verify.steps=200 (at least 2)"),
    "minutes": (lambda value: type(value) in (int, float) and value > 0, "verify.minutes=2 (more than 0)"),
    "kills": (_at_least(1), "verify.kills=20 (at least 1)"),
    "moments": (_all(MOMENTS.__contains__), f"verify.moments=[step,stop]; there are {', '.join(MOMENTS)}"),
    "workers": (_all(_at_least(0)), "verify.workers=[0,2] (numbers of data workers)"),
    "processes": (_at_least(1), "verify.processes=2 (at least 1)"),
    "root": (lambda value: isinstance(value, str), "verify.root=s3://bucket/scratch, or a folder"),
    "html": (lambda value: isinstance(value, str), "verify.html=report.html"),
    "seed": (_at_least(0), "verify.seed=1 (at least 0)"),
    "ignore": (_all(lambda name: isinstance(name, str)), "verify.ignore=[gpu_memory] (names of metrics)"),
    "keep": (lambda value: isinstance(value, bool), "verify.keep=true, which leaves the scratch runs where they are"),
}

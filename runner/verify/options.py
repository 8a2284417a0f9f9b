"""The options of a proof: ``verify.*`` among the overrides of an ordinary command."""

import difflib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    """How much is tried, and where.

    ``steps`` None: up to 100, within about 20 seconds of training. ``workers`` are numbers of data workers that
    attempts take in turn; the first is that of the undisturbed run. ``moments`` of kills are taken in turn, too.
    ``processes`` is the number of processes of each attempt. ``root`` None: a temporary folder. ``html`` names a file
    for the report. ``seed`` decides the steps of the kills. ``minutes`` is how long the proof may take: steps and
    kills are left out to keep that.
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
    keep: bool = False


def parse(arguments: Sequence[str]) -> tuple[Options, list[str], bool]:
    """The options, the arguments for the runner, and whether JSON is wanted. Raises ConfigError."""
    options = [argument for argument in arguments if argument.lstrip("+").startswith(_PREFIX)]
    rest = [argument for argument in arguments if argument not in options and argument != "--json"]
    values = dict(map(_option, options))
    for argument in rest:
        key = argument.lstrip("+~").partition("=")[0]
        if key in _RESERVED:
            raise ConfigError(f"{argument}: {_RESERVED[key]}")
        if argument in ("-m", "--multirun"):
            raise ConfigError("a proof is of one run: leave out -m, and give one value for each key")
    return Options(**values), rest, "--json" in arguments


def python(code: str, *arguments: str, first: Sequence[str] = ()) -> list[str]:
    """The command of a process that finds modules where this one does, after those in the folders ``first``. With
    ``python -m`` a ``runner.py`` of the user's in the working directory would hide the runner.
    """
    return [sys.executable, "-c", f"import sys\nsys.path[:] = {[*first, *sys.path]!r}\n{code}", *arguments]


# The runner until it has composed and checked the configuration: without torch, in a fraction of a second.
_CHECK = """
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
        done = subprocess.run(
            python(_CHECK, *command, *where), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    if done.returncode == ConfigError.status:
        raise ConfigError(done.stderr.strip())


def _option(argument: str) -> tuple[str, Any]:
    name, equals, text = argument.lstrip("+").removeprefix(_PREFIX).partition("=")
    if name not in _OPTIONS:
        near = difflib.get_close_matches(name, _OPTIONS, 1)
        hint = f"; did you mean verify.{near[0]}?" if near else "."
        names = ", ".join(f"verify.{each}" for each in _OPTIONS)
        raise ConfigError(f"there is no option verify.{name}{hint} Options: {names}")
    read, example = _OPTIONS[name]
    if not equals:
        raise ConfigError(f"verify.{name} needs a value, for example {example}")
    try:
        return name, read(text)
    except (ValueError, KeyError):
        raise ConfigError(f"verify.{name}={text} cannot be used: {example}") from None


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError
        return value

    return read


def _workers(text: str) -> tuple[int, ...]:
    return tuple(_at_least(0)(each) for each in text.removeprefix("[").removesuffix("]").split(","))


def _minutes(text: str) -> float:
    if not float(text) > 0:
        raise ValueError
    return float(text)


def _moments(text: str) -> tuple[str, ...]:
    names = (*text.removeprefix("[").removesuffix("]").split(","),)
    if {*names} - {*MOMENTS}:
        raise ValueError
    return names


def _text(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# Name -> how to read it, an example. The names are the fields of Options.
_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "steps": (_at_least(2), "verify.steps=200 (at least 2)"),
    "minutes": (_minutes, "verify.minutes=2 (more than 0)"),
    "kills": (_at_least(1), "verify.kills=20 (at least 1)"),
    "moments": (_moments, f"verify.moments=[step,stop]; there are {', '.join(MOMENTS)}"),
    "workers": (_workers, "verify.workers=[0,2] (numbers of data workers)"),
    "processes": (_at_least(1), "verify.processes=2 (at least 1)"),
    "root": (_text, "verify.root=s3://bucket/scratch, or a folder"),
    "html": (_text, "verify.html=report.html"),
    "seed": (_at_least(0), "verify.seed=1 (at least 0)"),
    "keep": (_flag, "verify.keep=true, which leaves the scratch runs where they are"),
}

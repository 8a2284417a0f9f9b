"""``python -m runner experiment=x``: run it, kill it, run it again."""

import os
import sys
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import TracebackType
from typing import Any

from runner import signals
from runner.distributed.world import world
from runner.errors import RunnerError


def main() -> int:
    """Run the application; returns the exit status, as listed in ``runner.errors``."""
    signals.install()  # before the imports, which take a second in which a signal may arrive
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here, where each gets its status

    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from runner import app
    from runner.sweep import launcher, optuna

    if {"--help", "-h"} & {*sys.argv} and not any(word.startswith("experiment=") for word in sys.argv):
        sys.argv.append("experiment=digits")  # help shows a composed configuration, and that needs an experiment
    sweep = launcher.install()
    optuna.register()
    try:
        app.main()
    except (HydraException, OmegaConfBaseException, RunnerError) as error:
        own = _own(error)
        if _speaks():
            print(own or _explained(error), file=sys.stderr)
        return own.status if own else 2
    except YAMLError as error:
        if _speaks():
            print(f"a configuration file is not YAML: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        job = _from_module(app.__name__, error.__traceback__)
        if isinstance(error, OSError) and job is None:
            print(
                f"cannot make the run directory {error.filename}: {error.strerror}. Choose another run.root.",
                file=sys.stderr,
            )
            return 1
        # Above the frames of the attempt stand forty of Hydra's, which tell nothing of the cause.
        raise error.with_traceback(_from_module("runner.experiment", job) or job) from error.__cause__
    if summary := sweep.summary():
        print(f"\n{summary}")
    return sweep.status


def _speaks() -> bool:
    """Whether this process prints what all processes of the run find out alike, before they have met."""
    try:
        return world().rank == 0
    except RunnerError:
        return True


def _own(error: BaseException | None) -> RunnerError | None:
    """The runner's own error behind what Hydra and OmegaConf wrapped around it."""
    while error is not None and not isinstance(error, RunnerError):
        error = error.__cause__ or error.__context__
    return error


def _from_module(name: str, trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins with the first frame of a module; None if it has no such frame."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") != name:
        trace = trace.tb_next
    return trace


def _explained(error: BaseException) -> str:
    """What Hydra and OmegaConf say, without the names of their types, and with a remedy where they give none."""
    told = f"{error}\n{error.__cause__}" if error.__cause__ else str(error)
    lines = [line for line in told.splitlines() if not line.strip().startswith(("object_type=", "reference_type="))]
    key, equals, value = str(getattr(error, "override", "")).partition("=")
    if equals and told.startswith("LexerNoViableAltException: "):  # which is all that Hydra says
        lines.append(f"A value with characters besides letters, digits and -./:%+@ needs quotes: '{key}=\"{value}\"'")
    if remedy := _known_keys(error):
        lines = [line for line in lines if not line.startswith("To append to your config use")]  # it would be refused
        lines.append(remedy)
    return "\n".join(lines)


def _known_keys(error: BaseException | None) -> str:
    """The remedy for a key that the schema does not have; empty for any other error."""
    while error is not None and not hasattr(error, "object_type"):
        error = error.__cause__ or error.__context__
    schema: Any = getattr(error, "object_type", None)
    if not is_dataclass(schema) or "not in" not in str(error):
        return ""
    key, full_key = str(getattr(error, "key", "")), str(getattr(error, "full_key", ""))
    if full_key == "experiment":
        return "The first line of a file in experiment/ must be: # @package _global_"
    known, parent = [field.name for field in fields(schema)], full_key.removesuffix(key)
    near = get_close_matches(key, known, 1)
    return f"Did you mean {parent}{near[0]}?" if near else f"There are: {', '.join(parent + name for name in known)}"


if __name__ == "__main__":
    sys.exit(main())

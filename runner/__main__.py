"""``python -m runner experiment=x``: run it, kill it, run it again."""

import os
import sys
from traceback import walk_tb

from runner import signals
from runner.distributed.world import world
from runner.errors import RunnerError


def main() -> int:
    """Run the application; returns the exit status, as listed in ``runner.errors``."""
    signals.install()  # before the imports, which take a second in which a signal may arrive
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here, where each gets its status

    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

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
            print(own or _as_hydra_says(error), file=sys.stderr)
        return own.status if own else 2
    except OSError as error:
        if any(frame.f_globals.get("__name__") == app.__name__ for frame, _ in walk_tb(error.__traceback__)):
            raise  # the job's own; the directory had been made
        print(
            f"cannot make the run directory {error.filename}: {error.strerror}. Choose another run.root.",
            file=sys.stderr,
        )
        return 1
    if summary := sweep.summary():
        print(f"\n{summary}")
    return sweep.status


def _speaks() -> bool:
    """Whether this is the process that says what all find out alike, before they have met."""
    try:
        return world().rank == 0
    except RunnerError:
        return True


def _own(error: BaseException | None) -> RunnerError | None:
    """The runner's own error behind what Hydra and OmegaConf wrapped around it."""
    while error is not None and not isinstance(error, RunnerError):
        error = error.__cause__ or error.__context__
    return error


def _as_hydra_says(error: BaseException) -> str:
    told = f"{error}\n{error.__cause__}" if error.__cause__ else str(error)
    if told.startswith("LexerNoViableAltException: "):  # which is all that Hydra says
        key, _, value = getattr(error, "override", "").partition("=")
        told += f"\nA value with other characters than letters, digits and -./:%+@ needs quotes: '{key}=\"{value}\"'"
    return told


if __name__ == "__main__":
    sys.exit(main())

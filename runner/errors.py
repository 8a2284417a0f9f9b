"""Every error a user may meet, named by what the user must do about it.

    RunnerError                  1   anything else
    ├── ConfigError              2   mend the configuration or the command
    ├── DriftRefused             3   decide what the changed configuration means
    ├── RunInUse                 4   another live process owns the run
    │   └── Superseded           4   a newer attempt took this run over
    ├── FinishedMeanwhile        1   nothing: the command takes the result that another process has just stored
    ├── NoLoadableCheckpoint     5   a checkpoint was committed, none can be loaded
    ├── Interrupted             75   run the same command again to go on
    ├── StorageError             1   mend the disk, its permissions or the network
    ├── StateError               1   a part of the state cannot be saved or restored
    ├── DataError                1   mend the data set
    ├── TaskError                1   mend what the task returns
    ├── NonFiniteError           1   the loss is no longer a number
    ├── JobDied                  1   mend what killed the process of a job of a sweep
    └── SweepFailed              1   mend what made every job of a sweep fail

The number is the exit status. A message says what, where, what was expected and found, and the remedy.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class RunnerError(Exception):
    """Root of all errors that are meant for the user; shown without a traceback."""

    status = 1
    agreed = False  # whether all processes of the run raise it at the same place


class ConfigError(RunnerError):
    """The configuration or the command line cannot be used."""

    status = 2


class DriftRefused(RunnerError):
    """The configuration of this command is not the one the run directory was made with."""

    status = 3


class RunInUse(RunnerError):
    """Another live process works on the run."""

    status = 4


class Superseded(RunInUse):
    """A newer attempt has claimed the run; what this one still writes will not be used."""


class FinishedMeanwhile(RunnerError):
    """Another process finished the run after this one had looked and before it had claimed it."""


class NoLoadableCheckpoint(RunnerError):
    """Checkpoints were committed, but none of them can be loaded."""

    status = 5


class Interrupted(RunnerError):
    """The attempt stopped on request, with everything committed."""

    status = 75


class StorageError(RunnerError):
    """The storage refused to read or write."""


class StateError(RunnerError):
    """A part of the state cannot be saved, or does not fit what is restored."""


class DataError(RunnerError):
    """The data set cannot be used as configured, or is not the one the run began with."""


class TaskError(RunnerError):
    """A step of the task returned something that cannot be differentiated, averaged or reported."""


class NonFiniteError(RunnerError):
    """The loss became NaN or infinite."""


class JobDied(RunnerError):
    """The process of a job was killed, or ended without a word."""


class SweepFailed(RunnerError):
    """No job of a sweep has an objective."""


def printable(text: object) -> str:
    """``text`` with control characters escaped: what is read from a run directory may aim at the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


@contextmanager
def exit_is_an_error() -> Iterator[None]:
    """Within the block, sys.exit of somebody's code fails: it would end a whole sweep, and 0 would claim success."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r}) was called in the run") from error

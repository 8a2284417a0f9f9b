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
    ├── RunGone                  1   find out who moved or removed the run's directory while it was at work
    ├── StateError               1   a part of the state cannot be saved or restored
    ├── DataError                1   mend the data set
    ├── TaskError                1   mend what the task returns
    ├── NonFiniteError           1   the loss is no longer a number
    ├── JobDied                  1   mend what killed the process of a job of a sweep
    └── SweepFailed              1   mend what made every job of a sweep fail

The number is the exit status. A message says what, where, what was expected and found, and the remedy.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_hidden: set[str] = set()  # values of secrets that this process read from its environment
_USER = re.compile(r"(?<=://)()[^/?#\s@:]*:(?!:|\d+(?:/|$))[^\s@]*(?=@)")  # with a password, and not a port
_QUERY = re.compile(
    r"(?i)((?:^|[?&;]|\s(?=passw|pwd))[\w.-]*(?:sig|signature|token|secret|passw(?:or)?d|pwd|credential|api_?key|access_?key|account_?key"
    r"|access_?key_?id)=)(?![{<])([^&;\s'\"]{4,})"
)


class RunnerError(Exception):
    """Root of all errors that are meant for the user; shown without a traceback, and without secrets."""

    status = 1
    agreed = False  # whether all processes of the run raise it at the same place

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redacted(each) if isinstance(each, str) else each for each in arguments))

    def __str__(self) -> str:
        return printable(super().__str__())  # it may quote what is in a run directory


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


class RunGone(RunnerError):
    """The directory of the run is not there any more, or not the one that this process claimed."""


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
    """``text`` without secrets, and with control characters escaped: what is read from a run directory may aim at the
    terminal.
    """
    shown = redacted(str(text))
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in shown)


def hide_secret(secret: str) -> None:
    """From now on, show and store no text with this in it."""
    _hidden.add(secret)


def redacted(text: str) -> str:
    """``text`` without the secrets of this process and without credentials in URLs: others' messages repeat them."""
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, "***")
    for pattern in (_USER, _QUERY):
        text = pattern.sub(lambda found: found[0] if "${" in found[0] else f"{found[1]}***", text)
    return text


def has_credentials(text: str) -> bool:
    """Whether a text is a URL with a password, or with a signature or a token in its query, written out."""
    written = (found[0] for pattern in (_USER, _QUERY) for found in pattern.finditer(text))
    return any("${" not in found for found in written)


@contextmanager
def exit_is_an_error() -> Iterator[None]:
    """Within the block, sys.exit of somebody's code fails: it would end a whole sweep, and 0 would claim success."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r}) was called in the run") from error

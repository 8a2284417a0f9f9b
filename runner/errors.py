"""Every error a user may meet, named by what the user must do about it; ``status`` is the exit status of the command.

A message says what failed and where, the expected and the actual value, and the remedy.
Programs tell causes apart by the ``kind`` of an error, a short word given where it is raised, never by its message.
"""

import atexit
import os
import re
import sys
import traceback
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

_EXTRAS = {"mlflow": "mlflow", "peft": "lora", "trackio": "trackio", "transformers": "lora", "wandb": "wandb"}
_secrets: set[str] = set()  # values that this process read from its environment
_USER = re.compile(r"(?<=://)()[^/?#\s@:]*:(?!:|\d+(?:/|$))[^\s@]*(?=@)")  # user and password, not host and port
_QUERY = re.compile(
    r"(?i)((?:^|[?&;]|\s(?=passw|pwd))[\w.-]*(?:sig|signature|token|secret|passw(?:or)?d|pwd|credential|api_?key|access_?key|account_?key"
    r"|access_?key_?id)=)(?![{<])([^&;\s'\"]{4,})"
)


class RunnerError(Exception):
    """Root of all errors that are meant for the user; shown without a traceback, and without secrets."""

    status = 1
    kind = "other"

    def __init__(self, *arguments: object, kind: str | None = None, agreed: bool = False) -> None:
        """``agreed``: all processes of the run raise it at the same place."""
        super().__init__(*(redacted(each) if isinstance(each, str) else each for each in arguments))
        self.kind, self.agreed = kind or self.kind, agreed

    def extend(self, text: str) -> None:
        """Add lines to the message."""
        self.args = (f"{super().__str__()}\n{redacted(text)}",)

    def __str__(self) -> str:
        return printable(super().__str__())  # it may quote the content of a run directory


class ConfigError(RunnerError):
    """The configuration or the command line cannot be used: fix it."""

    status = 2


class DriftRefused(RunnerError):
    """The configuration of this command differs from that of the run directory: decide what the change means."""

    status = 3


class RunInUse(RunnerError):
    """Another live process works on the run."""

    status = 4


class Superseded(RunInUse):
    """A newer attempt has claimed the run. Nothing that this attempt still writes will be used."""


class ChangedMeanwhile(RunnerError):
    """Another process finished the run, or took it although this process waits for it, between its opening and its
    claim by this process, which opens it again.
    """


class NoLoadableCheckpoint(RunnerError):
    """Checkpoints were committed, but none of them can be loaded."""

    status = 5


class Interrupted(RunnerError):
    """The attempt stopped on request, with its last step committed, unless it had waited for data for too long. The
    same command continues.
    """

    status = 75


class StorageError(RunnerError):
    """The storage refused to read or write: fix the disk, its permissions or the network."""

    LASTING = "lasting"  # the kind of an error that no other try of this process can pass


class RunGone(RunnerError):
    """The directory of the running run was moved, removed or replaced: find out by whom."""


class StateError(RunnerError):
    """A part of the state cannot be saved, or does not fit the checkpoint that is restored."""

    kind = "state"


class DataError(RunnerError):
    """The data set cannot be used as configured, or differs from the data set that the run began with."""


class TaskError(RunnerError):
    """A step of the task returned a value that cannot be differentiated, averaged or reported."""


class EvaluationFailed(RunnerError):
    """An evaluation raised an error, and the state is that before it: fix the task, and run the same command again."""

    @classmethod
    def of(cls, cause: Exception, *, agreed: bool = False) -> "EvaluationFailed":
        """For an error of the user's code, with its traceback; or for another error of the runner."""
        text, status = f"\n{''.join(traceback.format_exception(cause)).rstrip()}", cls.status
        if isinstance(cause, RunnerError):
            text, status = f" {cause}", cause.status
        error = cls(f"the evaluation failed:{text}", kind=kind_of(cause), agreed=agreed)
        error.status = status
        return error


class NonFiniteError(RunnerError):
    """The loss became NaN or infinite."""


class JobDied(RunnerError):
    """The process of a job was killed, or ended without a result."""


class SweepFailed(RunnerError):
    """No job of a sweep has an objective."""


def kind_of(error: BaseException) -> str:
    """The kind of any error. "kernel": torch has no deterministic implementation of an operation that was called."""
    if isinstance(error, RunnerError):
        return error.kind
    return "kernel" if "does not have a deterministic implementation" in str(error) else RunnerError.kind


def import_hint(error: BaseException) -> str:
    """What helps where Python did not find a module: the extra that has it, a similar name, or where Python looked.
    Empty for any other error.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, ModuleNotFoundError):
        return ""
    parent, _, name = str(error.name).rpartition(".")
    if (package := str(error.name).partition(".")[0]) in _EXTRAS and package not in sys.modules:
        return f" Install it: pip install 'hydra-runner[{_EXTRAS[package]}]'"
    if parent in sys.modules:
        module = sys.modules[parent]
        similar = get_close_matches(name, dir(module), 1)
        remedy = f" Did you mean {parent}.{similar[0]}?" if similar else ""
        return f"{remedy} {parent} is {getattr(module, '__file__', None)}"
    folders = [
        folder for folder in dict.fromkeys(sys.path) if "/lib/python" not in folder and Path(folder or ".").is_dir()
    ]
    return f" Python looked in {', '.join(folder or os.getcwd() for folder in folders)}, and among installed packages"


def printable(text: object) -> str:
    """``text`` without secrets, and with control characters escaped: a run directory may hold terminal sequences."""
    shown = redacted(str(text))
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in shown)


def hide_secret(secret: str) -> None:
    """Replace ``secret`` by *** in all texts that this process shows and stores from now on."""
    _secrets.add(secret)


def redacted(text: str) -> str:
    """``text`` without the secrets of this process and without credentials in URLs, which libraries put in errors."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    for pattern in (_USER, _QUERY):
        text = pattern.sub(lambda match: match[0] if "${" in match[0] else f"{match[1]}***", text)
    return text


def has_credentials(text: str) -> bool:
    """Whether a text is a URL with a password, signature or token in it, and not an interpolation of one."""
    return any("${" not in match[0] for pattern in (_USER, _QUERY) for match in pattern.finditer(text))


def show(text: str) -> None:
    """Print, for a reader that may close the pipe when it has seen enough, such as ``head``."""
    with suppress(BrokenPipeError):
        print(text)
    _flush()


@atexit.register
def _flush() -> None:
    try:
        with suppress(AttributeError, ValueError):  # it is closed
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush would fail again

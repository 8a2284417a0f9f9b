"""``python -m runner experiment=x``: run it, kill it, run it again."""

import json
import os
import re
import shlex
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from runner import __version__, signals
from runner.distributed.world import world
from runner.errors import RunnerError, printable, show

_GRAMMAR = re.compile("LexerNoViableAlt|no viable alternative|mismatched input|extraneous input")
_COMMANDS = ("runs", "verify", "shards")
_EXIT_SECONDS = 60.0  # for what a user's code does at the exit; none once a stop is asked for
_POLL_SECONDS = 0.5
_PLAIN = "letters, digits and -./:%+@"
_WHOLE = re.compile("(?s).+")
_NESTED = re.compile(r"[\[{]|\w+\(")
_PART = re.compile(r"[^][{}(),:\s]*[^][{}(),\w\s./:%+@-][^][{}(),]*")
_MISSING = re.compile("Could not find '([a-z]+)/(.*)'")
_OBJECTS = ("model", "task", "optimizer", "scheduler")  # groups whose options have a ``_target_``
_QUOTED = r'"\g<0>"'


def main() -> int:
    """Run the application; returns the exit status, as listed in ``runner.errors``."""
    _open_standard_files()
    if sys.argv[1:] == ["--version"]:
        show(f"hydra-runner {__version__}")
        return 0
    signals.install()  # before the imports, which take a second in which a signal may arrive
    sys.excepthook = _print_escaped
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come here, where each gets its status

    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from runner import app
    from runner.config.identity import quote_run_names
    from runner.sweep import launcher, optuna

    if sys.argv[1:] == ["schema"]:
        from runner.config.help import json_schema

        show(json.dumps(json_schema(app.CONFIGS / "config.yaml"), indent=1))
        return 0
    sys.argv[1:] = [*_completed_folder(), *_flags_first(quote_run_names(sys.argv[1:]))]
    if (key := _key_to_explain(sys.argv[1:])) is not None:
        from runner.config.help import explain

        try:
            show(explain(key, app.CONFIGS / "config.yaml"))
        except RunnerError as error:
            print(error, file=sys.stderr)
            return error.status
        return 0
    if {"--help", "-h"} & {*sys.argv} and not any(word.startswith("experiment=") for word in sys.argv):
        sys.argv.append("experiment=digits")  # help shows a composed configuration, and that needs an experiment
    report = launcher.install()
    optuna.register()
    try:
        app.main()
    except (HydraException, OmegaConfBaseException, RunnerError) as error:
        own = _runner_error(error)
        if _prints():
            print(own or _escape(_explain(error)), file=sys.stderr)
        return own.status if own else 2
    except Exception as error:
        return report_error(error)
    if summary := report.summary():
        print(f"\n{summary}")
    return report.exit_status


def console() -> int:
    """The command ``hydra-runner``: a run, or one of ``runs``, ``verify`` and ``shards``, as with ``python -m``.

    Modules of the working directory are imported last, so that a ``runner.py`` of the user's shadows nothing.
    """
    with suppress(FileNotFoundError):  # it was removed, as ``main`` will say
        sys.path.append(os.getcwd())
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        module = import_module(f"runner.{sys.argv.pop(1)}.__main__")
        return int(module.main())
    return run_main()


def _open_standard_files() -> None:
    """Open /dev/null for standard descriptors that are closed. A file of the run would get the number of one, and with
    it what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _flags_first(words: list[str]) -> list[str]:
    """The words of a command with ``-m`` before the overrides: Hydra's parser takes no override behind a flag."""
    flags = [word for word in words if word in ("-m", "--multirun")]
    return [*flags[:1], *(word for word in words if word not in flags)]


def _completed_folder() -> list[str]:
    """The ``--config-dir`` of a line that a shell completes, taken out of the line: Hydra completes overrides alone."""
    line = os.environ.get("COMP_LINE", "")
    if (option := re.search(r" +(--config-dir|-cd)[ =]+(\S+)", line)) is None:
        return []
    os.environ["COMP_LINE"] = line.replace(option[0], "", 1)
    return [option[1], option[2]]


def _key_to_explain(words: list[str]) -> str | None:
    """The word after ``--help`` if it is the name of a key."""
    place = next((n for n, word in enumerate(words) if word in ("--help", "-h")), None)
    after = words[place + 1 :] if place is not None else []
    return after[0] if len(after) == 1 and re.fullmatch(r"[\w.]+", after[0]) else None


def _print_escaped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(_escape("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _escape(text: str) -> str:
    """Printable, but with the tabs of Hydra's lists."""
    return "\t".join(map(printable, text.split("\t")))


def report_error(error: Exception) -> int:
    """Print an error before the job began, and return the status; raise one of the job, for Python to print it."""
    from runner import app

    if (job := _from_module(app.__name__, error.__traceback__)) is not None:
        # Above the frames of the attempt stand forty of Hydra's, which do not help to find the cause.
        raise error.with_traceback(_from_module("runner.experiment", job) or job) from error.__cause__
    status = 2
    if isinstance(error, BrokenPipeError):  # whoever reads the help or the configuration, such as head, has seen enough
        return 0
    if isinstance(error, OSError):
        status = 1
        message = _unwritable(error)
    elif type(error).__module__.startswith("yaml."):
        message = f"a configuration file is not YAML: {error}"
    elif "Config group override must be a string" in str(error):  # Hydra's words, in a plain ValueError
        message = f"{error}. Leave a group out with ~GROUP instead of GROUP=null"
    elif "can be specified" in str(error):  # another plain ValueError, for --cfg and its like with -m
        message = f"{error}. Leave -m out to see the configuration of one job"
    elif any(frame.name == "_apply_overrides_to_config" for frame in traceback.extract_tb(error.__traceback__)):
        message = f"an override cannot be applied: {error}".replace("\n    full_key", ", key").partition("\n")[0]
        message += ". A key that is null until then, like hydra.sweeper.params, can get keys only in a file of yours"
    else:
        raise error
    if _prints():
        print(printable(message), file=sys.stderr)
    return status


def _unwritable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and not error.filename:  # from os.getcwd
        return "the working directory was removed: change to another one, or to its new place"
    name = f" {error.filename}" if error.filename else ""  # a full disk does not name the file
    folders = Path(str(error.filename)).parents if error.filename else ()
    run = next((folder for folder in folders if (folder / "run.json").exists()), None)
    if run is None:
        return f"cannot make the run directory{name}: {error.strerror}. Choose another run.root."
    shown = shlex.join(["python", "-m", "runner.runs", "show", str(run)])
    return f"cannot write to the run directory{name}: {error.strerror}. `{shown}` shows the run and writes nothing."


def _prints() -> bool:
    """Whether this process prints errors that all processes of the run find alike, before they have met."""
    with suppress(RunnerError):
        return world().rank == 0
    return True


def _runner_error(error: BaseException | None) -> RunnerError | None:
    """The runner's own error inside the errors that Hydra and OmegaConf wrapped around it."""
    while error is not None and not isinstance(error, RunnerError):
        error = error.__cause__ or error.__context__
    return error


def _from_module(name: str, trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins with the first frame of a module; None if it has no such frame."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") != name:
        trace = trace.tb_next
    return trace


def _explain(error: BaseException) -> str:
    """The message of Hydra or OmegaConf without the names of their types, and with a remedy where they give none."""
    if override := getattr(error, "override", None):  # which Hydra does not always name
        (key, _, value), text = override.partition("="), str(error)
        # Hydra says where its grammar ended, which is mostly for want of quotes around a value or a part of it.
        if value[:1] in ("[", "{") and value.count("[") + value.count("{") != value.count("]") + value.count("}"):
            example = shlex.quote(f"{key}=[1, 2]")
            why = f"its brackets do not match. If it has spaces, quote it for the shell, as in {example}"
        elif value and _GRAMMAR.search(text) and not {*value} & {*"'\""}:
            parts = _PART.sub(_QUOTED, value) if _NESTED.match(value) else value
            quoted = shlex.quote(f"{key}={_WHOLE.sub(_QUOTED, value) if parts == value else parts}")
            why = f"a value with characters besides {_PLAIN} needs quotes: {quoted}"
        else:
            why = re.sub(r"\s*(Error parsing override '.*?'|See https:\S* for details|\^)\s*", " ", text).strip()
            if text.startswith("LexerNoViableAlt"):  # says nothing but the value
                why = f"each part of it with characters besides {_PLAIN} needs quotes"
        return f"the override {shlex.quote(override)} cannot be read: {why}"
    message = f"{error}\n{error.__cause__}" if error.__cause__ else str(error)
    lines = [line for line in message.splitlines() if not line.strip().startswith(("object_type=", "reference_type="))]
    if launcher := re.search("hydra/launcher/(submitit|joblib|ray)", message):
        extra = launcher[1].replace("submitit", "slurm")
        lines = [*lines[:1], f"Install it: pip install 'hydra-runner[{extra}]'"]
    if remedy := _unknown_key(error):
        # Hydra advises to append the key with +, which is refused as well.
        lines = [*(line for line in lines if not line.startswith("To append to your config use")), remedy]
    if key := re.search(r"override ~(\S+)\n(?=.*does not support deletion)", message):
        lines = [
            f"{key[1]} is a key of the schema, which cannot be deleted. Give it another value, as --help {key[1]} shows"
        ]
    if (option := _MISSING.search(message)) and option[1] in _OBJECTS:
        named = option[2] if "." in option[2] else "my_module.MyClass"
        lines.insert(0, f"A class or function of any module: {option[1]}._target_={named}")
    return "\n".join(lines)


def _unknown_key(error: BaseException | None) -> str:
    """The remedy for a key that the schema does not have; empty for any other error."""
    while error is not None and not hasattr(error, "object_type"):
        error = error.__cause__ or error.__context__
    schema: Any = getattr(error, "object_type", None)
    if not is_dataclass(schema) or "not in" not in str(error):
        return ""
    key, full_key = str(getattr(error, "key", "")), str(getattr(error, "full_key", ""))
    if full_key == "experiment":
        return "The first line of a file in experiment/ must be: # @package _global_"
    from runner.config.schema import known_keys

    return known_keys(schema, full_key.removesuffix(key), key)


def _leave(status: int) -> None:
    """End this process with ``status`` after a while: Python's own exit waits for every thread that is no daemon."""

    def end() -> None:
        until = time.monotonic() + _EXIT_SECONDS
        while time.monotonic() < until and not signals.received():
            time.sleep(_POLL_SECONDS)
        main_thread = threading.main_thread()
        if left := [each.name for each in threading.enumerate() if not each.daemon and each is not main_thread]:
            with suppress(Exception):  # stderr may be anything
                print(f"threads that never end are left behind: {', '.join(left)}", file=sys.stderr)
                sys.stdout.flush()
            os._exit(status)

    threading.Thread(target=end, name="exit", daemon=True).start()


def run_main() -> int:
    """``main``, and an exit that waits for no thread that never ends."""
    status = 1  # of what is raised
    try:
        status = main()
    except SystemExit as error:  # the application leaves with the status of its error
        status = error.code if isinstance(error.code, int) else status
        raise
    finally:
        _leave(status)
    return status


if __name__ == "__main__":
    sys.exit(run_main())

"""Runs from Python, for notebooks and scripts: ``runner.train``, ``runner.open`` and ``runner.table``.

Experiments, keys, values and run directories are those of the command line: what one of the two began, the other
continues. Imports torch only to build a model, a task or data.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from runner import signals
from runner.callbacks.base import Observer, observed_by
from runner.config.identity import flatten
from runner.errors import ConfigError, DriftRefused, Interrupted, NoLoadableCheckpoint, RunInUse, RunnerError
from runner.metrics import lines
from runner.run.directory import RunDirectory
from runner.run_facts import RunFacts
from runner.runs.compare import compare_runs

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn

    from runner.task import Task

_POLL_SECONDS = 0.5
_LAST_LINES = 30  # of the output, in the message of an error
_WORD = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE)
_ERRORS: dict[int, type[RunnerError]] = {
    error.status: error for error in (ConfigError, DriftRefused, RunInUse, NoLoadableCheckpoint, Interrupted)
}


class Run:
    """A run as it is when this object is made.

    >>> run = runner.open("outputs/digits/base")
    >>> run.config.optimizer.lr, run.result["metrics"]["val/loss"]
    >>> run.model()(inputs)
    """

    def __init__(self, run: str | Path, storage_options: Mapping[str, Any] | None = None) -> None:
        self._directory = RunDirectory.at(str(run), storage_options)
        self._facts = RunFacts(self._directory)

    def __repr__(self) -> str:
        return f"Run({self.url!r}, {self.status}, step {self.step})"

    @property
    def url(self) -> str:
        """Its directory, a path or URL."""
        return self._directory.location.url

    @cached_property
    def status(self) -> str:
        """The status as ``runs list`` shows it: complete, running, killed, ..."""
        return self._facts.summary().status

    @property
    def step(self) -> int:
        """The step of the result or, while there is none, of the newest checkpoint."""
        return self._facts.step

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of ``result.json``: step, metrics, objective, ...; None while the run is not finished."""
        return self._facts.result

    @cached_property
    def config(self) -> DictConfig:
        """The configuration of what is computed, resolved: ``run.config.optimizer.lr``."""
        return OmegaConf.create(self._facts.identity)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All metrics by step, ``[{"step": 10, "train/loss": 0.3}, ...]``; ``pandas.DataFrame(run.metrics)``."""
        return [*lines.read(self._directory.location)]

    def model(self, checkpoint: int | str | None = None) -> "nn.Module":
        """The model on the CPU in evaluation mode, with the weights that were evaluated: averaged ones, if there are.

        ``checkpoint``: a step, ``"best"`` (by the objective) or ``"last"``; None: the best, or the last if there is no
        objective. The random generators stay as they are. Raises ConfigError for a step that is not kept,
        NoLoadableCheckpoint, StateError for a model that the code builds differently now.
        """
        from runner.restore import load_model

        return load_model(self._facts, checkpoint)

    def task(self, checkpoint: int | str | None = None) -> "Task":
        """The task, with the state that it had at a checkpoint, chosen as for ``model``."""
        from runner.restore import load_task

        return load_task(self._facts, checkpoint)

    def data(self, name: str = "validation") -> Any:
        """The data set ``train``, ``validation`` or ``test``; where there are several, a dict of all by name, or one of
        them, as in ``validation.clean``. Raises ConfigError.
        """
        from runner.restore import rebuild

        key = f"data.{name}"
        node = OmegaConf.select(self.config, key)
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{self.url} has no data set {name}: expected train, validation, validation.NAME or test")
        return (
            rebuild(self._facts, key)
            if "_target_" in node
            else {str(each): self.data(f"{name}.{each!s}") for each in node}
        )


def train(
    experiment: str, *overrides: str, config_dir: str | Path | None = None, quiet: bool = False, **values: Any
) -> Run:
    """Start a run, or continue it, in a process of its own, and return it finished. A finished run is returned at once.

    >>> runner.train("digits", seed=3, optimizer={"lr": 0.01}, trainer={"max_epochs": 5})
    >>> runner.train("mine", "optimizer=sgd", "+data.train.noise=0.1", config_dir="my_conf")

    ``overrides`` are as on the command line, ``values`` are keys with their values, sections as mappings;
    ``config_dir`` has experiments of your own. The output is printed as it comes, unless ``quiet``. Ctrl-C, or the
    button that interrupts a notebook, saves the run. Raises the error of the exit status, with the last lines of the
    output.
    """
    folder = [] if config_dir is None else [f"--config-dir={config_dir}"]
    keys = [f"{key}={_literal(value)}" for key, value in flatten(values).items()]
    reader, writer = os.pipe()
    with open(reader, "rb") as reports:
        words = [*folder, f"experiment={experiment}", *overrides, *keys]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "runner.api", str(writer), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=[writer],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        finally:
            os.close(writer)
        last = _follow(process, quiet=quiet)
        if process.returncode == 0:
            os.set_blocking(reader, False)  # a process that the run left behind may still have its end
            report = json.loads((reports.read() or b"").splitlines()[-1])
            return Run(report["run"], report["options"])
    error = _ERRORS.get(process.returncode, RunnerError)
    raise error(f"the run ended with status {process.returncode}:\n" + "".join(last))


def table(root: str | Path = "outputs", storage_options: Mapping[str, Any] | None = None) -> "DataFrame":
    """The runs under a root as a pandas DataFrame, the best first: status, objective, and a column for each parameter
    in which they differ and for each metric of their results. ``storage_options`` are those of fsspec for a URL. Raises
    ConfigError without runs, or without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("runner.table needs pandas: pip install pandas, or the extra pandas") from error
    comparison = compare_runs(str(root), lambda run: True, storage_options)
    rows: dict[str, dict[str, Any]] = {}
    for run in comparison["runs"]:
        values = {key: run[key] for key in ("status", "step", "objective", "attempts")}
        parameters = {key: run["parameters"].get(key) for key in comparison["swept"]}
        rows[run["run"]] = {**values, **parameters, **run["metrics"]}
    return pandas.DataFrame([*rows.values()], index=pandas.Index([*rows], name="run"))


def _literal(value: Any) -> str:
    """A value as Hydra's grammar writes it; numbers and arrays of numpy and torch as those of Python."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple | range):
        return "[" + ",".join(map(_literal, value)) + "]"
    if isinstance(value, str | Path):
        text = str(value)
        return text if _WORD.fullmatch(text) else QuotedString(text, Quote.double).with_quotes()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, int | float):
        kind = type(value).__qualname__
        raise ConfigError(f"{value!r} is a {kind}; expected a number, a text, a path, a list or a mapping of them")
    return repr(value)


def _follow(process: "subprocess.Popen[str]", *, quiet: bool) -> deque[str]:
    """Print the output of a process until it ends; returns the last lines. An interrupt stops the process first."""
    assert process.stdout
    last: deque[str] = deque(maxlen=_LAST_LINES)
    interrupted = None
    while True:
        try:
            for line in process.stdout:
                last.append(line)
                if not quiet:
                    print(line, end="", flush=True)
            process.wait()
            break
        except KeyboardInterrupt as error:
            process.terminate() if interrupted is None else process.kill()
            interrupted = error
    process.stdout.close()
    if interrupted is not None:
        raise interrupted
    return last


class _Announce(Observer):
    """Writes the directory of the run, which after a fork is another than the command named, to ``train``."""

    def __init__(self, writer: int) -> None:
        self._writer = writer

    def on_command(self, directory: RunDirectory) -> None:
        options = None if directory.options is None else dict(directory.options)
        report = json.dumps({"run": directory.location.url, "options": options})
        os.write(self._writer, report.encode() + b"\n")

    def on_finish(self, directory: RunDirectory, result: Mapping[str, Any]) -> None:
        self.on_command(directory)


def _stop_with_parent() -> None:
    while not signals.orphaned():
        time.sleep(_POLL_SECONDS)
    signals.request("SIGTERM")


def _child() -> int:
    """The process that ``train`` starts: a descriptor for reports, and the words of a command."""
    from runner.__main__ import run_main

    writer = int(sys.argv.pop(1))
    os.set_inheritable(writer, False)
    signals.orphaned()  # remembers the parent
    threading.Thread(target=_stop_with_parent, name="parent", daemon=True).start()
    with observed_by(_Announce(writer)):
        return run_main()


if __name__ == "__main__":
    sys.exit(_child())

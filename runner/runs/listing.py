"""The list of runs under a root, also updated until Ctrl-C; and how all commands print values on a terminal.

Control characters are escaped where a value is printed, because anyone may have written it.
"""

import contextlib
import json
import os.path
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

from tabulate import tabulate

from runner.errors import ConfigError, RunnerError, printable
from runner.run_facts import RunSummary, map_runs

# The statuses of runs, the most interesting first.
_UNDONE = ("running", "unknown", "failed", "diverged", "killed", "interrupted", "superseded", "new")
STATES = (*_UNDONE, "finished", "complete", "unreadable")
SORTS = ("status", "step", "objective", "attempts", "age", "name")
_COLUMNS = ("status", "step / max", "objective", "attempts", "age", "host")
_WIDEST = 64  # characters of a cell
_WIDEST_NAME = 1000  # of the name of a run, or of a fact that has a line for itself
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_SILENCE_SECONDS = 15.0  # three heartbeats of a process that works on a remote root
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # a second screen without a cursor, and back
_HOME, _END_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def list_runs(root: str, selects: Callable[[RunSummary], bool]) -> list[RunSummary]:
    """The selected runs under a root. Raises ConfigError if there are no runs at all, StorageError for the root."""
    return [*filter(selects, map_runs(root, lambda path, facts: facts.summary(path), lambda summary: summary))]


def sort_runs(runs: list[RunSummary], column: str, *, reverse: bool = False) -> list[RunSummary]:
    """The runs by a column of ``SORTS``, the youngest first by age; those without a value are last either way."""

    def key(run: RunSummary) -> Any:
        if column == "status":
            return STATES.index(run.state) if run.state in STATES else len(STATES)
        if column == "age":
            return -datetime.fromisoformat(run.seen).timestamp() if run.seen else None
        return getattr(run, "run" if column == "name" else column)

    valued = sorted((run for run in runs if key(run) is not None), key=key, reverse=reverse)
    return valued + [run for run in runs if key(run) is None]


def format_runs(runs: list[RunSummary]) -> str:
    """The table of the list."""
    return format_table(map(_row, runs), ["run", *_COLUMNS])


def format_narrow(runs: list[RunSummary]) -> str:
    """The table for a narrow screen: shortened names behind the values, and above it the part that all names share."""
    shared, names = _shorten([run.run for run in runs])
    rows = [{**_row(run), "status": format_cell(run.status, widest=22)} for run in runs]
    rows = [{**row, "run": name} for row, name in zip(rows, names, strict=True)]
    table = format_table(rows, [*_COLUMNS[:3], "run", *_COLUMNS[3:]])
    return f"{f'all in {format_cell(shared)}' if shared else ''}\n{table}"


def _shorten(names: list[str]) -> tuple[str, list[str]]:
    """The folders and overrides that all names share, and each name without them."""
    if len(names) < 2:
        return "", names
    folders, leaves = zip(*(name.rpartition("/")[::2] for name in names), strict=True)
    parts, words = [folder.split("/") for folder in folders], [leaf.split(",") for leaf in leaves]
    top = len([part for part in os.path.commonpath(folders).split("/") if part])
    alike = {*words[0]}.intersection(*words)
    own = [",".join(word for word in each if word not in alike) or ",".join(each) for each in words]
    short = ["/".join([*part[top:], leaf]) for part, leaf in zip(parts, own, strict=True)]
    return "/".join([*parts[0][:top], ",".join(word for word in words[0] if word in alike)]), short


def _row(run: RunSummary) -> dict[str, Any]:
    steps = run.step if run.max_steps is None else f"{run.step} / {run.max_steps}"
    age = None
    if run.seen is not None:  # another machine's clock may be ahead
        seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(run.seen)).total_seconds()
        age = next((f"{seconds // size:.0f} {unit} ago" for unit, size in _UNITS if seconds >= size), "now")
    return {**asdict(run), "step / max": steps, "age": age}


def format_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows under the columns' names; a missing value stays empty. The name of a run is never cut: other commands
    need it, and the runs of a sweep may differ in nothing but its end.
    """
    widths = {"run": _WIDEST_NAME}
    cells = [[format_cell(row.get(name), widest=widths.get(name, _WIDEST)) for name in columns] for row in rows]
    return tabulate(cells, headers=list(map(format_cell, columns)), disable_numparse=True)


def format_facts(facts: Mapping[str, Any]) -> str:
    """A line for each fact that is not None."""
    lines = [(name, format_cell(value, widest=_WIDEST_NAME)) for name, value in facts.items() if value is not None]
    return tabulate(lines, tablefmt="plain", disable_numparse=True)


def format_cell(value: Any, *, widest: int = _WIDEST) -> str:
    """A value in a line of at most ``widest`` characters."""
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else printable(value).partition("\n")[0]
    return text if len(text) <= widest else f"{text[: widest - 3]}..."


def format_setting(value: Any) -> str:
    """A value of a configuration as JSON, but a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def watch(read: Callable[[], list[RunSummary]], *, interval: float, as_json: bool) -> None:
    """Show the runs that ``read`` returns, running ones first, every ``interval`` seconds until interrupted. Errors of
    the first ``read`` are raised; later ones are shown, because they may be temporary.
    """
    if not 0 < interval < float("inf"):
        raise ConfigError(f"--interval {interval:g} is no number of seconds to wait: give more than 0")
    pulse = Pulse(max(_SILENCE_SECONDS, 3 * interval))
    on_terminal = sys.stdout is not None and sys.stdout.isatty() and not as_json
    with _screen(on_terminal):
        rows, problem = read(), ""
        while True:
            rows = sort_runs([pulse.judge(row) for row in rows], "status")
            if as_json:
                print(json.dumps([asdict(row) for row in rows]), flush=True)
            else:
                table = format_narrow(rows) if on_terminal else f"\n{format_runs(rows)}\n"
                counts = {state: sum(row.state == state for row in rows) for state in STATES}
                summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
                text = printable(f"{time.strftime('%H:%M:%S')}  {len(rows)} runs: {summary}{problem}\n{table}")
                if on_terminal:  # cut to it, and drawn over what is there
                    (width, height), lines = shutil.get_terminal_size(), text.splitlines()
                    if len(lines) > height:
                        lines = [*lines[: height - 1], f"... {len(lines) - height + 1} more"]
                    text = _HOME + "\n".join(f"{line[:width]}{_END_OF_LINE}" for line in lines) + _REST
                print(text, end="" if on_terminal else "\n", flush=True)
            time.sleep(interval)
            try:
                rows, problem = read(), ""
            except RunnerError as error:
                problem = f"\nnot up to date: {error}"


class Pulse:
    """Finds out which runs on other machines live: their heartbeats change. Does not compare clocks of machines."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: dict[str, str | None] = {}
        self._moved: dict[str, float] = {}

    def judge(self, row: RunSummary) -> RunSummary:
        """The row, with the status ``running`` instead of ``unknown`` if its heartbeat has changed lately."""
        now = time.monotonic()
        if self._seen.setdefault(row.run, row.seen) != row.seen:
            self._moved[row.run] = now
        self._seen[row.run] = row.seen
        beats = now - self._moved.get(row.run, -float("inf")) < self._patience
        return replace(row, status="running") if beats and row.state == "unknown" else row


@contextlib.contextmanager
def _screen(on_terminal: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block, not the program. On a terminal it has a screen to draw on."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(_ENTER if on_terminal else "", end="", flush=True)
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, former)
        print(_LEAVE if on_terminal else "", end="", flush=True)

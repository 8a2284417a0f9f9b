"""The list of runs, updated until Ctrl-C: redrawn in place on a terminal, printed again and again elsewhere."""

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from runner.errors import ConfigError, RunnerError, printable
from runner.run_facts import RunSummary
from runner.runs.listing import STATES, format_narrow, format_runs, sort_runs

_SILENCE_SECONDS = 15.0  # three heartbeats of a process that works on a remote root

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # a second screen without a cursor, and back
_HOME, _END_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def watch(read: Callable[[], list[RunSummary]], *, interval: float, as_json: bool) -> None:
    """Show the runs that ``read`` returns, running ones first, every ``interval`` seconds until interrupted.

    Raises ConfigError for an invalid interval, and whatever the first ``read`` raises; errors of later calls are shown,
    because they may be temporary.
    """
    if not 0 < interval < float("inf"):
        raise ConfigError(f"--interval {interval:g} is no number of seconds to wait: give more than 0")
    pulse = Pulse(max(_SILENCE_SECONDS, 3 * interval))
    on_terminal = sys.stdout is not None and sys.stdout.isatty() and not as_json
    with _interruptible(), contextlib.ExitStack() as stack:
        rows, problem = read(), ""
        stack.enter_context(_screen(on_terminal))
        while True:
            rows = sort_runs([pulse.judge(row) for row in rows], "status")
            if as_json:
                print(json.dumps([asdict(row) for row in rows]), flush=True)
            else:
                table = format_narrow(rows) if on_terminal else f"\n{format_runs(rows)}\n"
                text = printable(f"{_summary(rows)}{problem}\n{table}")
                print(_frame(text) if on_terminal else text, end="" if on_terminal else "\n", flush=True)
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


def _summary(rows: list[RunSummary]) -> str:
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{time.strftime('%H:%M:%S')}  {len(rows)} runs: {text}"


def _frame(text: str) -> str:
    """The text cut to the terminal, to be drawn over what is there."""
    width, height = shutil.get_terminal_size()
    lines = text.splitlines()
    if len(lines) > height:
        lines = [*lines[: height - 1], f"... {len(lines) - height + 1} more"]
    return _HOME + "\n".join(f"{line[:width]}{_END_OF_LINE}" for line in lines) + _REST


@contextlib.contextmanager
def _screen(on_terminal: bool) -> Iterator[None]:
    """A screen to draw on; the former one comes back at the end."""
    if not on_terminal:
        yield
        return
    try:
        print(_ENTER, end="", flush=True)
        yield
    finally:
        print(_LEAVE, end="", flush=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block, not the program."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, former)

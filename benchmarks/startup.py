"""The price of a start: from the command to the first step, fresh and resumed, and the no-op re-run of a finished run.

    first step   ``python -m runner experiment=smoke`` in a new run directory, until its first optimizer step is done
                 (its task is the ``stopwatch`` below, which says so and leaves), against a script that imports the same
                 libraries and takes one optimizer step with the same data and a model of the same shape
    no-op        ``python -m runner experiment=smoke`` where that run is finished, until it has exited, against
                 ``python -c "import torch, hydra"``

    resumed      from the command to the first new step of a run that SIGKILL ended, against the first step of a new run
                 of the same model, whose state (weights and two moments) has so many ``--megabytes``; below ``--root``,
                 which may be remote

Both sides take turns, so that other load on the machine meets both; figures are medians over the turns, ratios are of
those, and the spread is the quartiles of the ratios within one turn. Files are in the page cache and bytecode is
compiled, as after an installation: one turn goes before the first that counts. ``--cpu`` measures processor time, which
varies less beside other load.

    python -m benchmarks.startup --turns 10 [--cpu]    # from the root of the repository; some minutes
    python -m benchmarks.startup --megabytes 60 600 --root s3://bucket/folder
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tabulate import tabulate

from runner.callbacks.base import Observer

ROOT = Path(__file__).parent.parent
DONE = "the first step is done"

BARE = f"""
import hydra, os, sys, torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torchdata.stateful_dataloader import StatefulDataLoader

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
loader = StatefulDataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
writer = SummaryWriter(sys.argv[1])
inputs, targets = next(iter(loader))
F.cross_entropy(model(inputs), targets).backward()
optimizer.step()
print({DONE!r}, flush=True)
os._exit(0)
"""


def stopwatch(**settings: Any) -> Any:
    """In the runner's process: the task of the smoke experiment, which kills the process after the first step, or in
    the first step after ``COMMIT`` appears in the environment and a checkpoint was committed.
    """
    from runner.tasks.classification import Classification

    class Stopwatch(Classification):
        def optimization_step(self, *arguments: Any) -> Any:
            metrics = super().optimization_step(*arguments)
            if "COMMIT" not in os.environ or commits:
                print(DONE, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return metrics

    return Stopwatch(**settings)


commits: list[int] = []


class NoteCommit(Observer):
    """Tells the stopwatch of commits."""

    def on_commit(self, step: int) -> None:
        commits.append(step)


def seconds_until(line: str | None, command: Sequence[str]) -> float:
    """Seconds from starting the command until it prints that line, or until it has exited; processor seconds if
    ``CPU`` is in the environment: the process ends at the line.
    """
    if "CPU" in os.environ:
        before = processor_seconds()
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        if line is not None and line not in output:
            sys.exit(f"{' '.join(command)} ended early:\n{output}")
        return processor_seconds() - before
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        printed = []
        for text in process.stdout:
            printed.append(text)
            if text == f"{line}\n":
                return time.perf_counter() - start
    if process.returncode or line is not None:
        sys.exit(f"{' '.join(command)} exited with {process.returncode}:\n{''.join(printed)}")
    return time.perf_counter() - start


def processor_seconds() -> float:
    """Of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def runner(root: Path | str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "runner", "experiment=smoke", f"run.root={root}", *overrides]


def resumed(root: str, megabytes: int, turns: int) -> list[str]:
    """The cells of a table for a resumed start of a state of this size."""
    width = megabytes * 1_000_000 // (3 * 4 * (64 + 1 + 10))  # weights and two moments, of 4 bytes each
    overrides = [
        f"model.hidden=[{width}]",
        "task._target_=benchmarks.startup.stopwatch",
        "+observers.commits._target_=benchmarks.startup.NoteCommit",
        "checkpoint.every_steps=1",
        "trainer.max_steps=1000",
        "trainer.evaluate_every_steps=1000",
    ]
    killed = runner(f"{root}/resumed{megabytes}", *overrides)
    os.environ["COMMIT"] = "1"
    seconds_until(DONE, killed)
    del os.environ["COMMIT"]
    return compare(
        lambda turn: seconds_until(DONE, runner(f"{root}/fresh{megabytes}-{turn}", *overrides)),
        lambda turn: seconds_until(DONE, killed),
        turns,
    )


def compare(bare: Callable[[int], float], ours: Callable[[int], float], turns: int) -> list[str]:
    """Take turns; the cells of the table."""
    pairs = []
    for turn in range(-1, turns):
        first, second = (bare, ours) if turn % 2 else (ours, bare)
        seconds = first(turn), second(turn)
        if turn >= 0:
            pairs.append(seconds if turn % 2 else seconds[::-1])
    low, _, high = quantiles((b / a for a, b in pairs), n=4)
    a, b = median(a for a, _ in pairs), median(b for _, b in pairs)
    return [f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}", f"{low:.2f} .. {high:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--cpu", action="store_true", help="measure processor time")
    parser.add_argument("--megabytes", type=int, nargs="*", help="only resumed starts, of states of these sizes")
    parser.add_argument("--root", help="the folder of the resumed runs, local (default: a temporary one) or remote")
    arguments = parser.parse_args()
    turns = arguments.turns
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, our modules would be compiled in every turn
    if arguments.cpu:
        os.environ["CPU"] = "1"
    if arguments.megabytes:
        with tempfile.TemporaryDirectory() as temporary:
            rows = [[f"{size} MB", *resumed(arguments.root or temporary, size, turns)] for size in arguments.megabytes]
        headers = ["resumed", "fresh s", "resumed s", "ratio", "spread"]
        print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first_step = compare(
            lambda turn: seconds_until(DONE, [sys.executable, "-c", BARE, str(folder / f"bare{turn}")]),
            lambda turn: seconds_until(
                DONE, runner(folder / f"runner{turn}", "task._target_=benchmarks.startup.stopwatch")
            ),
            turns,
        )
        finished = runner(folder / "finished")
        seconds_until(None, finished)
        no_op = compare(
            lambda turn: seconds_until(None, [sys.executable, "-c", "import torch, hydra"]),
            lambda turn: seconds_until(None, finished),
            turns,
        )
    table = [["first step", *first_step], ["no-op", *no_op]]
    print(tabulate(table, ["case", "bare s", "runner s", "ratio", "spread"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()

"""The price of a start: from the command to the first step, and the no-op re-run of a finished run.

    first step   ``python -m runner experiment=smoke`` in a new run directory, until its first optimizer step is done
                 (its task is the ``stopwatch`` below, which says so and leaves), against a script that imports the same
                 libraries and takes one optimizer step with the same data and a model of the same shape
    no-op        ``python -m runner experiment=smoke`` where that run is finished, until it has exited, against
                 ``python -c "import torch, hydra"``

Both sides take turns, so that other load on the machine meets both; figures are medians over the turns, ratios are of
those, and the spread is the quartiles of the ratios within one turn. Files are in the page cache and bytecode is
compiled: one turn goes before the first that counts.

    python -m benchmarks.startup --turns 10            # from the root of the repository; some minutes
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NoReturn

from tabulate import tabulate

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
    """In the runner's process: the task of the smoke experiment, which ends the process after the first step."""
    from runner.tasks.classification import Classification

    class Stopwatch(Classification):
        def optimization_step(self, *arguments: Any) -> NoReturn:
            super().optimization_step(*arguments)
            print(DONE, flush=True)
            os._exit(0)

    return Stopwatch(**settings)


def seconds_until(line: str | None, command: Sequence[str]) -> float:
    """Seconds from starting the command until it prints that line, or until it has exited."""
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


def runner(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "runner", "experiment=smoke", f"run.root={folder}", *overrides]


def compare(bare: Callable[[int], float], ours: Callable[[int], float], turns: int) -> list[str]:
    """Take turns; the cells of the table."""
    pairs = []
    for turn in range(-1, turns):
        first, second = (bare, ours) if turn % 2 else (ours, bare)
        found = first(turn), second(turn)
        if turn >= 0:
            pairs.append(found if turn % 2 else found[::-1])
    low, _, high = quantiles((b / a for a, b in pairs), n=4)
    a, b = median(a for a, _ in pairs), median(b for _, b in pairs)
    return [f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}", f"{low:.2f} .. {high:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    turns = parser.parse_args().turns
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

"""The price of a step: the runner's loop against a bare PyTorch loop.

Both sides have the same model, data set, optimizer, scheduler and clipping (those of the experiment), the same full
batches, the same scalars for TensorBoard every 10 steps, one thread, and no data workers.

    bare      torch's DataLoader(shuffle=True), a for loop, SummaryWriter, torch.save; nothing can be resumed, nothing
              is checked
    runner    ``runner.experiment.run`` as the command runs it: all callbacks, deterministic kernels, metric lines,
              heartbeats. Once for each ``data.randomness``: ``off``; ``batch``, which seeds before every batch;
              ``sample``, which seeds before every sample.

All sides of a case live at the same time, each in a process of its own, and take turns: a block of steps here, a block
of steps there. A figure is the median over blocks of the mean CPU time of the training thread for a step, start-up and
warm-up left out, so that other load on the machine hardly shows; a ratio is one of two such medians. The spread is the
quartiles of the ratios between blocks of the same turn. ``--clock`` measures the time that passes instead.

    python -m benchmarks.loop                          # from the root of the repository; about ten minutes
    python -m benchmarks.loop mlp --turns 20 --sets 1
    python -m benchmarks.loop mlp --peers /tmp/peers       # beside other libraries: see ``benchmarks.peers``
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

from tabulate import tabulate

from benchmarks.gate import BARE, NEVER, Gate, endless
from benchmarks.peers import environments
from runner import app
from runner.config.identity import identity
from runner.config.schema import check

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Case:
    """An experiment with overrides, the kinds of randomness to run it with, the steps between two checkpoints, and the
    sizes of blocks and warm-up in steps.
    """

    experiment: str
    overrides: tuple[str, ...]
    randomness: tuple[str, ...]
    save_every: int
    block: int
    warm_up: int


_MLP = ("data.batch_size=32", "trainer.clip_norm=null")
# Blocks of a fraction of a second; those of gpt are shorter than the 10 steps between two reports. ``mlp`` draws no
# random numbers in its samples, ``mlp-draws`` draws from torch in each of them.
CASES = {
    "mlp": Case("smoke", (*_MLP, "data.train.shift=0"), ("off", "sample"), 500, block=500, warm_up=500),
    "mlp-draws": Case("smoke", _MLP, ("batch", "sample"), 500, block=500, warm_up=500),
    "digits": Case("digits", (), ("off", "batch", "sample"), NEVER, block=20, warm_up=60),
    "gpt": Case("gpt", (), ("off",), NEVER, block=2, warm_up=2),
}


def train_with_runner(config: Any, overrides: list[str], gate: Gate) -> None:
    """The way of ``app.main``, with the gate as an observer."""
    from runner import experiment
    from runner.callbacks.base import Loop, Observer, observed_by
    from runner.distributed.communicator import Team
    from runner.run.directory import RunDirectory
    from runner.run.opening import RunSpec, open_run

    class Gated(Observer):
        def on_step(self, loop: Loop) -> None:
            if not gate.passed():
                loop.stop = "benchmark"

    check(config)
    directory = RunDirectory.under(config.run.root, "benchmark", "runner")
    opening = open_run(RunSpec(directory, identity(config), overrides=overrides))
    with observed_by(Gated()):
        experiment.run(opening, config, Team())


def train_bare(config: Any, gate: Gate, save_every: int) -> None:
    """The loop that people write."""
    import torch
    from hydra.utils import instantiate
    from torch import Tensor, nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader
    from torch.utils.tensorboard import SummaryWriter

    def classification(batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    def language(batch: Any) -> Tensor:
        tokens = batch.long()
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    torch.set_num_threads(config.runtime.num_threads)
    torch.manual_seed(config.seed)
    batch_size, every, clip_norm = config.data.batch_size, config.metrics.every_steps, config.trainer.clip_norm
    loader = DataLoader(instantiate(config.data.train), batch_size=batch_size, shuffle=True, drop_last=True)
    model: nn.Module = instantiate(config.model)
    optimizer = instantiate(config.optimizer, _partial_=True)(model.parameters())
    scheduler = instantiate(config.scheduler, _partial_=True)(optimizer)
    losses = {"classification": classification, "language": language}
    loss_of: Callable[[Any], Tensor] = losses[config.task._target_.split(".")[2]]
    writer = SummaryWriter(f"{config.run.root}/tensorboard")

    batches = endless(loader)
    step, waited, since = 0, 0.0, time.monotonic()
    window: list[dict[str, Tensor]] = []
    while True:
        rate = scheduler.get_last_lr()[0]
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        metrics = {"loss": loss.detach()}
        if clip_norm is not None:
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        window.append(metrics)
        step += 1
        if step % every == 0:
            seconds = time.monotonic() - since
            for name in metrics:
                mean = torch.stack([each[name] for each in window]).mean().item()
                writer.add_scalar(f"train/{name}", mean, step)
            writer.add_scalar("train/lr", rate, step)
            writer.add_scalar("time/step", seconds / every, step)
            writer.add_scalar("time/data_wait", waited / every, step)
            samples_per_second = every * batch_size / seconds
            writer.add_scalar("time/samples_per_second", samples_per_second, step)
            window, waited, since = [], 0.0, time.monotonic()
        if step % save_every == 0:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "step": step}, f"{config.run.root}/checkpoint.pt")
        if not gate.passed():
            return


def child(name: str, side: str, folder: str, *, clock: Callable[[], float]) -> None:
    """One side of a case, in this process."""
    from hydra import compose, initialize_config_dir

    case = CASES[name]
    overrides = [
        f"experiment={case.experiment}",
        *case.overrides,
        f"run.root={folder}",
        "runtime.device=cpu",
        "runtime.num_threads=1",
        "runtime.num_workers=0",  # as the bare loop; ``benchmarks.workers`` measures ``auto``
        "runtime.audit=false",  # it would refuse randomness=off for data that draws
        f"trainer.max_steps={NEVER}",
        f"trainer.evaluate_every_steps={NEVER}",
        "checkpoint.every=null",
        f"checkpoint.every_steps={case.save_every}",
        "checkpoint.every_seconds=null",
    ]
    if side != BARE:
        overrides.append(f"data.randomness='{side}'")
    app.register()
    with initialize_config_dir(str(app.CONFIGS.absolute()), version_base="1.3"):
        config = compose("config", overrides)
    gate = Gate(case.warm_up, clock)
    if side == BARE:
        train_bare(config, gate, case.save_every)
    else:
        train_with_runner(config, overrides, gate)


class Side:
    """In the parent: one child of a ``module`` of this folder, waiting at its gate; ``python`` runs it."""

    def __init__(
        self,
        case: str,
        side: str,
        stack: ExitStack,
        *options: str,
        module: str = "loop",
        python: str | Path = sys.executable,
    ) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self._errors: IO[str] = stack.enter_context(tempfile.TemporaryFile("w+"))
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", case, "--child", side, "--folder", folder, *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        stack.callback(self._close)
        self._answer()

    def milliseconds(self, steps: int) -> float:
        """Let it do so many steps; how long one of them took, or one unit of its work."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return 1e3 * self._answer()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            sys.exit(f"a child died:\n{self._errors.read()}")
        return float(line)

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(
    name: str, *options: str, turns: int, sets: int, peers: Mapping[str, Path] | None = None
) -> dict[str, list[float]]:
    """Milliseconds per step of every block, by side. ``sets`` times new processes, each for ``turns`` turns. ``peers``:
    the interpreters of the loops of ``benchmarks.peers`` that take part.
    """
    case, peers = CASES[name], peers or {}
    times: dict[str, list[float]] = {side: [] for side in (BARE, *case.randomness, *peers)}
    for _ in range(sets):
        with ExitStack() as stack:
            sides = {side: Side(name, side, stack, *options) for side in (BARE, *case.randomness)}
            for peer, python in peers.items():
                sides[peer] = Side(name, peer, stack, *options, module="peers", python=python)
            for turn in range(turns):
                for side in list(sides) if turn % 2 else list(sides)[::-1]:
                    times[side].append(sides[side].milliseconds(case.block))
    return times


def rows(name: str, measured: Mapping[str, list[float]]) -> Iterator[list[str]]:
    """Lines of the table."""
    bare = measured[BARE]
    for side, times in measured.items():
        if side != BARE:
            low, _, high = quantiles(sorted(t / b for t, b in zip(times, bare, strict=True)), n=4)
            yield [
                name,
                side,
                f"{median(bare):.3f}",
                f"{median(times):.3f}",
                f"{median(times) / median(bare):.3f}",
                f"{low:.3f} .. {high:.3f}",
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; default: all")
    parser.add_argument("--turns", type=int, default=40, help="blocks of each side for each set of processes")
    parser.add_argument("--sets", type=int, default=3, help="how many times to start new processes")
    parser.add_argument("--peers", type=Path, help="with mlp: the environments that benchmarks.peers has made")
    parser.add_argument("--clock", action="store_true", help="measure the time that passes, and not that of the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}")
    if arguments.child:
        clock = time.perf_counter if arguments.clock else time.thread_time
        child(arguments.cases[0], arguments.child, arguments.folder, clock=clock)
        return
    table: list[list[str]] = []
    options = ["--clock"] * arguments.clock
    for name in arguments.cases or CASES:
        peers = environments(arguments.peers) if arguments.peers and name == "mlp" else {}
        table += rows(name, measure(name, *options, turns=arguments.turns, sets=arguments.sets, peers=peers))
    headers = ["case", "side", "bare ms", "ms", "ratio", "spread"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()

"""The price of a checkpoint, against doing the same with the bytes and nothing else.

    memory      what a process needs beside its state while it saves; a fresh process
    stall       ``Staging.stage``, in memory that is used again, against copying the tensors into memory that is
    save        ``CheckpointStore.commit``, against one file written and fsynced, and against other libraries
    restore     ``open`` and ``load``, against reading that file at once and digesting it; the page cache is warm, and
                memory has to be got from the system, as at a start (glibc's allocator gives it back each time)
    training    steps of some 20 ms with a save in the background every 50 of them, against the same steps without

The state is a model of 100 tensors and two moments for each of them. All sides take turns within a round, every round
in the other order, after a round that does not count. Figures are medians over the rounds, ratios are of those, and the
spread is the smallest and the largest of the ratios within one round; stall and restore take the median of three each
time. Saves are files of a temporary folder (``TMPDIR``), which must be on a real disk for fsync to mean something.

    python -m benchmarks.checkpoint --megabytes 60 600 [--rounds 5] [--only save restore]
"""

import argparse
import ctypes
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
import xxhash
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.nn import functional as F

from runner.callbacks.base import Loop
from runner.callbacks.saving import SaveCheckpoint, SaveTimer
from runner.checkpoint.snapshot import Snapshot, Staging
from runner.checkpoint.store import CheckpointStore, Retention
from runner.checkpoint.tensor_file import bytes_of
from runner.storage.local import LocalLocation

LAYERS = 50
SECTIONS = "memory", "stall", "save", "restore", "training"
Sides = Mapping[str, Callable[[], float]]  # each does its work and returns the seconds that count


class State:
    """Stands for the state of a training: parts by name."""

    def __init__(self, megabytes: int) -> None:
        width = int((megabytes * 1e6 / (3 * LAYERS * 4)) ** 0.5)
        shapes = {
            f"{layer}.{name}": (width,) * n for layer in range(LAYERS) for name, n in (("weight", 2), ("bias", 1))
        }
        model, first, second = ({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3))
        self.parts: dict[str, Any] = {"model": model, "optimizer": {"exp_avg": first, "exp_avg_sq": second}}

    def state_dict(self) -> dict[str, Any]:
        return self.parts

    def changes(self) -> dict[str, Any]:
        return {}

    def weights(self) -> list[str]:
        return []


class Training(State):
    """A training whose steps take some 20 ms on one thread."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.ReLU())))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.inputs = torch.randn(128, 512)
        self.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def megabytes(self) -> int:
        return sum(tensor.nbytes for tensor in Snapshot.of(1, self.state_dict()).tensors.values()) // 10**6

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.inputs), self.inputs).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def often(work: Callable[[], object]) -> float:
    return median(timed(work) for _ in range(3))


def anew(work: Callable[[], object]) -> float:
    """As ``often``, each time in memory that the allocator has not kept from earlier work."""

    def once() -> float:
        ctypes.CDLL(None).malloc_trim(0)
        return timed(work)

    return median(once() for _ in range(3))


def take_turns(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            seconds = sides[name]()
            if turn >= 0:
                found[name].append(seconds)
    return found


def rows(megabytes: int, found: Mapping[str, list[float]], targets: Mapping[str, float]) -> Iterator[list[str]]:
    """Of a table; the first side is the one that others are compared with."""
    bare = next(iter(found.values()))
    for name, seconds in found.items():
        ratios = [ours / other for ours, other in zip(seconds, bare, strict=True)]
        ratio = median(seconds) / median(bare)
        target = f"{targets[name]:.2f}: {'met' if ratio <= targets[name] else 'missed'}" if name in targets else ""
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        yield [str(megabytes), name, f"{median(seconds) * 1000:.1f}", f"{ratio:.2f}", spread, target]


def stall(state: State, folder: Path) -> Sides:
    snapshot, staging = Snapshot.of(1, state.parts), Staging()
    tensors = list(snapshot.tensors.values())
    room = [torch.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for to, tensor in zip(room, tensors, strict=True):
            to.copy_(tensor)

    def async_save() -> float:
        start = time.perf_counter()
        future: Any = dcp.async_save(state.parts, storage_writer=FileSystemWriter(folder / "dcp"), no_dist=True)
        seconds = time.perf_counter() - start
        future.result()
        return seconds

    return {
        "bare copy": lambda: often(copy),
        "Staging.stage": lambda: often(lambda: staging.stage(snapshot)),
        "Snapshot.of, stage": lambda: often(lambda: staging.stage(Snapshot.of(1, state.parts))),
        "dcp.async_save returns": async_save,
    }


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors.values():
            view = bytes_of(tensor)
            while view:
                view = view[file.write(view) or 0 :]
        os.fsync(file.fileno())


def save(state: State, folder: Path) -> Sides:
    staging = Staging()
    staging.stage(Snapshot.of(1, state.parts))
    snapshot = staging.snapshot
    target = folder / "save"

    def fresh(work: Callable[[], object]) -> Callable[[], float]:
        def side() -> float:
            target.mkdir(exist_ok=True)
            seconds = timed(work)
            for path in target.rglob("*"):
                if not path.is_dir():
                    path.unlink()
            return seconds

        return side

    def torch_save() -> None:
        torch.save(state.parts, target / "file")
        sync(target / "file")

    def safetensors_save() -> None:
        safetensors.torch.save_file(snapshot.tensors, target / "file")
        sync(target / "file")

    def dcp_save() -> None:
        dcp.save(state.parts, storage_writer=FileSystemWriter(target), no_dist=True)

    def async_save() -> None:
        future: Any = dcp.async_save(state.parts, storage_writer=FileSystemWriter(target), no_dist=True)
        future.result()

    store = CheckpointStore(LocalLocation(target))
    return {
        "raw write, fsync": fresh(lambda: write(target / "file", snapshot.tensors)),
        "CheckpointStore.commit": fresh(lambda: store.commit(snapshot, attempt=1, require_newest=lambda: None)),
        "torch.save, fsync": fresh(torch_save),
        "safetensors, fsync": fresh(safetensors_save),
        "dcp.save": fresh(dcp_save),
        "dcp.async_save until done": fresh(async_save),
    }


def restore(state: State, folder: Path) -> Sides:
    snapshot = Snapshot.of(1, state.parts)
    store = CheckpointStore(LocalLocation(folder / "store"))
    commit = store.commit(snapshot, attempt=1, require_newest=lambda: None)
    folder.mkdir(exist_ok=True)
    raw, pickled, flat = folder / "raw", folder / "pickled", folder / "flat"
    write(raw, snapshot.tensors)
    torch.save(state.parts, pickled)
    safetensors.torch.save_file(snapshot.tensors, flat)

    def read() -> None:
        view = bytes_of(torch.empty(raw.stat().st_size, dtype=torch.uint8))
        filled = 0
        with open(raw, "rb", buffering=0) as file:
            while filled < len(view):
                filled += file.readinto(view[filled:])
        xxhash.xxh3_128_hexdigest(view)

    def load() -> list[Any]:
        checkpoint = store.open(commit)
        return [checkpoint.load(part) for part in state.parts]

    return {
        "raw read, xxh3_128": lambda: anew(read),
        "Checkpoint.load": lambda: anew(load),
        "torch.load": lambda: anew(lambda: torch.load(pickled, mmap=False)),
        "safetensors": lambda: anew(lambda: safetensors.torch.load_file(flat)),
    }


def saver(state: State, folder: Path, steps: int) -> tuple[SaveCheckpoint, Loop]:
    """What saves a state in the background every so many steps, as in an experiment."""
    store = CheckpointStore(LocalLocation(folder))
    callback = SaveCheckpoint(
        store, SaveTimer(steps=steps), Retention(), attempt_number=1, identity={}, max_unsaved=60.0, background=True
    )
    loop = Loop(state, max_steps=None)  # type: ignore[arg-type]
    callback.on_start(loop)
    return callback, loop


def training(state: Training, folder: Path) -> Sides:
    callback, loop = saver(state, folder / "training", 50)
    loop.step = 25  # the saves of a block are in its middle, and done when it ends

    def steps(after: Callable[[], None]) -> None:
        for _ in range(100):
            state.step()
            after()

    def save_if_due() -> None:
        loop.step += 1
        callback.on_step(loop)

    sides: dict[str, Callable[[], None]] = {"without": lambda: None, "SaveCheckpoint": save_if_due}
    return {name: partial(timed, partial(steps, after)) for name, after in sides.items()}


def memory(megabytes: int, folder: Path) -> list[str]:
    """Run in a process that has done nothing else."""
    state = State(megabytes)
    copy = sum(tensor.nbytes for tensor in Snapshot.of(1, state.parts).tensors.values()) / 1e6
    callback, loop = saver(state, folder / "memory", 1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    for _ in range(4):
        loop.step += 1
        callback.on_step(loop)
        callback.on_end(loop)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    target = f"{copy + 200:.0f}: {'met' if peak - before <= copy + 200 else 'missed'}"
    return [str(megabytes), f"{before:.0f}", f"{peak:.0f}", f"{peak - before:.0f}", f"{copy:.0f}", target]


def memory_of_a_child(megabytes: int) -> list[str]:
    # A process begins with the peak of the one that started it: this must come before anything large.
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--child", "--megabytes", str(megabytes)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().split("|")


def show(title: str, table: list[list[str]], headers: list[str]) -> None:
    if table:
        print(f"{title}\n\n{tabulate(table, headers, tablefmt='github', disable_numparse=True)}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[60, 600])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    torch.manual_seed(0)
    headers = ["MB", "case", "ms", "ratio", "spread", "target"]
    sections = {"stall": (stall, {"Staging.stage": 1.2}), "save": (save, {"CheckpointStore.commit": 1.25})}
    sections["restore"] = (restore, {"Checkpoint.load": 1.25})
    with tempfile.TemporaryDirectory() as temporary:
        if options.child:
            print("|".join(memory(options.megabytes[0], Path(temporary))))
            return
        if "memory" in options.only:
            table = [memory_of_a_child(megabytes) for megabytes in options.megabytes]
            show("memory", table, ["MB", "before", "peak", "more", "one copy", "target"])
        for title in (title for title in sections if title in options.only):
            sides, targets = sections[title]
            table = []
            for megabytes in options.megabytes:
                folder = Path(tempfile.mkdtemp(dir=temporary))
                found = take_turns(sides(State(megabytes), folder), options.rounds)
                table += rows(megabytes, found, targets)
                shutil.rmtree(folder)
            show(title, table, headers)
        if "training" in options.only:
            torch.set_num_threads(1)
            state = Training()
            found = take_turns(training(state, Path(temporary)), options.rounds)
            show("training, blocks of 100 steps", [*rows(state.megabytes(), found, {})], headers)


if __name__ == "__main__":
    main()

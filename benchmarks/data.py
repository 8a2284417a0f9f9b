"""The price of data whose position is known: the runner's streams against a bare loader or reader.

    overhead   CPU per sample (``time.process_time``: of this process, which also loads) of drawing batches of 64 tensor
               rows, against ``torch.utils.data.DataLoader(shuffle=True)`` over the same data set, or without shuffling
               for an iterable. ``extra`` is the difference, in microseconds. A block is about one epoch of 10 000.
    first      milliseconds from a data set to the first batch, through ``load_state_dict``, at position 0 and at 90 %
               of an epoch; ``more`` is the difference. The bare loader begins at 0: it can do nothing else, and would
               need a list of 10^9 numbers. Then what the start-up audit adds, with the digits
               (three times as many turns: it is small).
    memory     growth of the resident set's peak (Linux' VmHWM, which unlike ``ru_maxrss`` begins anew in a new process)
               while a stream is opened and draws 100 batches, in a fresh process for each line; then the peak of
               tracemalloc while the same is done again
    shards     MB/s of reading one epoch in default streams (shuffled, from the page cache, randomness off), against a
               loop over the files that parses as much: 200 MB as lines of 1 kB of JSON, as tar members of 100 kB, and
               as rows of 1025 tokens. Both sides hold the records of a batch at a time, as training must. With two
               workers the bare side is a DataLoader over that loop, shards dealt out. The batches that are sent are the
               numbers of their samples. Without workers seconds are of CPU, as for ``overhead``.
    ledger     microseconds per step for a line of the ledger, against ``os.write`` of such a line; and for the digest
               of a micro-batch's samples, against blake2b of their indices

Streams are made by ``runner.data.training_data`` from a configuration with its defaults, as the command does it. One
thread.
Both sides of a line live in this process and take turns (a block here, a block there, the order changing from turn to
turn), so that other load meets both; the first turn does not count. Figures are medians over the turns; ratios are of
such medians, and differences are medians of those within a turn; the spread is the quartiles, of the ratios within a
turn or of the differences where the target is one.

    python -m benchmarks.data                          # from the root of the repository; about five minutes
    python -m benchmarks.data overhead --turns 20
"""

import argparse
import gc
import io
import json
import logging
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from hashlib import blake2b
from itertools import islice, repeat
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from runner.app import CONFIGS
from runner.data.ledger import Ledger, LedgerLine
from runner.data.loader import LoaderOptions
from runner.data.order import digest_words
from runner.data.stream import TrainingStream
from runner.data.training_data import training_data
from runner.datasets.digits import Digits
from runner.distributed.world import World
from runner.shards.__main__ import main as scan_shards
from runner.shards.records import Records
from runner.shards.tokens import Tokens
from runner.storage.local import LocalLocation

ROOT = Path(__file__).parent.parent
BATCH = 64
STEPS = 157  # of a block: one epoch of 10 000 samples, and a little
SHARDS = 16
BARE = "bare"
ALLOWED = {"off": 2, "batch": 2, "sample": 15}  # microseconds per sample

Sides = Mapping[str, Callable[[], float]]
Found = Mapping[str, list[float]]


class Rows(Dataset[Tensor]):
    """Rows of a tensor in memory; ``draws`` random numbers for each from no generator, torch's, or the other two."""

    def __init__(self, size: int, draws: str = "nothing") -> None:
        self.rows = torch.arange(8.0 * size).view(size, 8)
        self.draws = draws

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        if self.draws == "torch":
            return self.rows[index] + torch.rand(8)
        if self.draws == "python, numpy":
            return self.rows[index] * random.random() + np.random.random()
        return self.rows[index]


class ShardedRows(Rows):
    """As if in shards of 1000."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.counts = [1000] * (size // 1000)


class LongRows(Rows):
    """With lengths, all of which a budget of 64 * 64 lets into batches of 64: of the size that the bare side has."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.lengths = np.random.default_rng(0).integers(1, 65, size)


class RowIterator:
    """Rows one after the other, with a state."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._at = 0

    def __iter__(self) -> "RowIterator":
        return self

    def __next__(self) -> Tensor:
        if self._at == len(self._rows):
            raise StopIteration
        self._at += 1
        return self._rows[self._at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self._at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._at = state["at"]


class IterableRows(IterableDataset[Tensor]):
    """The same rows for an iterable."""

    def __init__(self, size: int) -> None:
        self.rows = Rows(size).rows

    def __iter__(self) -> RowIterator:
        return RowIterator(self.rows)


class Numbers(Dataset[Tensor]):
    """As many samples as one likes, none of which is anywhere; in 1000 shards, or with lengths."""

    def __init__(self, kind: str, size: int) -> None:
        self._size = size
        if kind == "sharded":
            self.counts = [size // 1000] * 1000
        if kind == "token budget":
            self.lengths = np.random.default_rng(0).integers(1, 65, size)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index])


def stream_of(
    samples: Any, *, workers: int = 0, audit: bool = True, collate: Any = None, **data: Any
) -> TrainingStream:
    """The stream that a configuration with these keys of ``data`` makes."""
    with initialize_config_dir(str(CONFIGS.absolute()), version_base="1.3"):
        config: Any = compose("config", ["experiment=smoke"])
    config.runtime.num_workers, config.runtime.audit = workers, audit
    config.data.batch_size = BATCH
    for key, value in data.items():
        setattr(config.data, key, value)
    loading = LoaderOptions(workers, config.runtime.prefetch, config.runtime.start_method)
    return training_data(config, samples, loading, torch.device("cpu"), collate, World())[0]


def drawn(stream: TrainingStream) -> Iterator[Any]:
    """The batches of an open stream, for ever."""
    while True:
        for _, batch in stream.step():
            yield batch
        stream.advance()


def bare_batches(samples: Any, *, workers: int = 0) -> Iterator[Any]:
    """The batches of torch's loader, for ever; an iterable in its own order."""
    shuffle = not isinstance(samples, IterableDataset)
    return endless(DataLoader(samples, batch_size=BATCH, shuffle=shuffle, num_workers=workers))


def endless(loader: Any) -> Iterator[Any]:
    """One epoch after the other."""
    while True:
        yield from loader


def take_turns(sides: Sides, turns: int) -> Found:
    """What each side measures in each turn, without the first."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(-1, turns):
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            value = sides[side]()
            if turn >= 0:
                found[side].append(value)
    return found


def ratio(ours: Sequence[float], bare: Sequence[float]) -> list[str]:
    """Cells: the ratio of the medians, and the quartiles of the ratios within a turn."""
    low, _, high = quantiles((a / b for a, b in zip(ours, bare, strict=True)), n=4)
    return [f"{median(ours) / median(bare):.2f}", f"{low:.2f} .. {high:.2f}"]


def extra(ours: Sequence[float], bare: Sequence[float]) -> tuple[float, str]:
    """The median of the differences within a turn; a cell with their quartiles."""
    low, middle, high = quantiles((a - b for a, b in zip(ours, bare, strict=True)), n=4)
    return middle, f"{low:.2f} .. {high:.2f}"


def verdict(value: float, target: float) -> str:
    return f"{'met' if value <= target else 'missed'} (<= {target:g})"


def show(headers: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True), end="\n\n", flush=True)


def overhead(turns: int) -> None:
    """Extra CPU per sample."""
    every, seeded = ("off", "batch", "sample"), ("batch", "sample")
    cases: list[tuple[str, Any, tuple[str, ...], dict[str, Any]]] = [
        ("indexed", Rows(10_000), every, {}),
        ("indexed", Rows(1_000_000), every, {}),
        ("indexed, draws from torch", Rows(10_000, "torch"), seeded, {}),
        ("indexed, draws from python, numpy", Rows(10_000, "python, numpy"), seeded, {}),
        ("sharded", ShardedRows(10_000), every, {}),
        ("sharded", ShardedRows(1_000_000), every, {}),
        ("token budget", LongRows(10_000), every, {"max_tokens": 64 * BATCH}),
        ("iterable", IterableRows(10_000), every, {}),
    ]
    table = []
    for name, samples, kinds, data in cases:
        sides: dict[str, Callable[[], float]] = {BARE: partial(microseconds_per_sample, bare_batches(samples))}
        for randomness in kinds:
            stream = stream_of(samples, randomness=randomness, **data)
            stream.open()
            sides[randomness] = partial(microseconds_per_sample, drawn(stream))
        found = take_turns(sides, turns)
        for randomness in kinds:
            ours, theirs = found[randomness], found[BARE]
            more, spread = extra(ours, theirs)
            cells = [f"{median(theirs):.2f}", f"{median(ours):.2f}", f"{more:.2f}", spread, ratio(ours, theirs)[0]]
            size = len(samples.rows)
            table.append([name, f"{size}", randomness, *cells, verdict(more, ALLOWED[randomness])])
    headers = [
        "data",
        "samples",
        "randomness",
        "bare us",
        "runner us",
        "extra us",
        "spread of extra",
        "ratio",
        "target",
    ]
    show(headers, table)


def microseconds_per_sample(batches: Iterator[Any]) -> float:
    start = time.process_time()
    for _ in range(STEPS):
        next(batches)
    return 1e6 * (time.process_time() - start) / (STEPS * BATCH)


def first(turns: int) -> None:
    """The first batch, and the audit."""
    cases = [(kind, size, workers) for kind in ("indexed", "sharded") for size in (10**6, 10**9) for workers in (0, 2)]
    table = []
    for kind, size, workers in [*cases, ("token budget", 10**6, 0)]:
        samples = Numbers(kind, size)
        make = partial(stream_of, samples, workers=workers)
        if kind == "token budget":
            make.keywords["max_tokens"] = 64 * BATCH
        state = make().state_dict()
        sides: dict[str, Callable[[], float]] = {
            "0": partial(until_first, partial(resumed, make, state | {"consumed": 0})),
            "90": partial(until_first, partial(resumed, make, state | {"consumed": size * 9 // 10})),
        }
        if size < 10**9 and kind == "indexed":
            sides[BARE] = partial(until_first, partial(bare_batches, samples, workers=workers))
        found = take_turns(sides, turns)
        bare = f"{median(found[BARE]):.1f}" if BARE in found else "-"
        more, spread = extra(found["90"], found["0"])
        cells = [bare, f"{median(found['0']):.1f}", f"{median(found['90']):.1f}", f"{more:.1f}", spread]
        table.append([kind, f"10^{len(str(size)) - 1}", f"{workers}", *cells, verdict(more, 100)])
    show(["data", "samples", "workers", "bare ms", "at 0 ms", "at 90 % ms", "more ms", "spread", "target"], table)

    digits = Digits(split="train", shift=1)
    table = []
    for workers in (0, 2):
        sides = {
            name: partial(until_first, partial(opened, partial(stream_of, digits, workers=workers, audit=name == "on")))
            for name in ("off", "on")
        }
        found = take_turns(sides, 3 * turns)
        more, spread = extra(found["on"], found["off"])
        cells = [f"{median(found['off']):.1f}", f"{median(found['on']):.1f}", f"{more:.1f}", spread]
        table.append([f"{workers}", *cells, verdict(more, 20)])
    show(["workers", "no audit ms", "audit ms", "more ms", "spread", "target"], table)


def resumed(make: Callable[[], TrainingStream], state: dict[str, Any]) -> Iterator[Any]:
    stream = make()
    stream.load_state_dict(state)
    return drawn(stream)


def opened(make: Callable[[], TrainingStream]) -> Iterator[Any]:
    stream = make()
    stream.open()
    return drawn(stream)


def until_first(begin: Callable[[], Iterator[Any]]) -> float:
    """Milliseconds until the first batch is there."""
    gc.collect()  # which also ends the workers of the one before
    start = time.perf_counter()
    batches = begin()
    next(batches)
    return 1e3 * (time.perf_counter() - start)


def memory(turns: int) -> None:
    """Peaks in fresh processes."""
    kinds = {BARE: (10**4, 10**6), "indexed": (10**4, 10**6, 10**9), "sharded": (10**4, 10**6, 10**9)}
    table = []
    for kind, sizes in kinds.items():
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.data", "memory", "--child", kind, "--size", f"{size}"]
            grown = [
                json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(turns)
            ]
            cells = [f"{median(values):.2f}" for values in zip(*grown, strict=True)]
            table.append([kind, f"10^{len(str(size)) - 1}", *cells])
    show(["data", "samples", "resident set MB", "tracemalloc MB"], table)


def memory_child(kind: str, size: int) -> None:
    """In a fresh process: print both peaks."""
    samples = Numbers(kind, size)

    def draw() -> None:
        batches = bare_batches(samples) if kind == BARE else opened(partial(stream_of, samples))
        for _ in range(100):
            next(batches)

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = status("VmRSS")
    draw()
    resident = (status("VmHWM") - before) / 1e3
    gc.collect()
    tracemalloc.start()
    draw()
    print(json.dumps([resident, tracemalloc.get_traced_memory()[1] / 1e6]))


def status(key: str) -> int:
    """Kilobytes, as Linux tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class BareReader(IterableDataset[Any]):
    """All records of some files, in order; each worker reads files of its own."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Iterator[Any]]) -> None:
        self._paths = paths
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        for path in self._paths if worker is None else self._paths[worker.id :: worker.num_workers]:
            yield from self._read(path)


def read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def read_members(path: Path) -> Iterator[Any]:
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            yield {"__key__": member.name, "bin": content.read()}


def read_tokens(path: Path) -> Iterator[Any]:
    tokens: NDArray[np.uint16] = np.memmap(path, np.uint16, mode="r")
    for start in range(0, len(tokens) - 1024, 1024):
        yield torch.from_numpy(tokens[start : start + 1025].astype(np.int32))


def write_lines(path: Path, size: int) -> None:
    words = random.Random(path.name)
    texts = ["".join(words.choices("etaoin shrdlu", k=960)) for _ in range(100)]
    with path.open("w") as file:
        for number in range(size // 1000):
            file.write(json.dumps({"id": number, "text": texts[number % 100]}) + "\n")


def write_members(path: Path, size: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(size // 100_000):
            member = tarfile.TarInfo(f"{number:06d}.bin")
            member.size = 100_000
            archive.addfile(member, io.BytesIO(os.urandom(member.size)))


def write_tokens(path: Path, size: int) -> None:
    np.random.default_rng(0).integers(50_000, size=size // 2, dtype=np.uint16).tofile(path)


def shards(turns: int, megabytes: int = 200) -> None:
    """Reading at a rate."""
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "jsonl": (write_lines, read_lines, Records),
        "tar": (write_members, read_members, Records),
        "bin": (write_tokens, read_tokens, partial(Tokens, length=1024)),
    }
    table = []
    for suffix, (write, read, samples_of) in kinds.items():
        with tempfile.TemporaryDirectory() as temporary:
            paths = [Path(temporary) / f"{number:02d}.{suffix}" for number in range(SHARDS)]
            for path in paths:
                write(path, megabytes * 1_000_000 // SHARDS)
            manifest = f"{temporary}/shards.json"
            with redirect_stdout(None):
                scan_shards([f"{temporary}/*.{suffix}", "--out", manifest, "--json"])
            reader = BareReader(paths, read)
            sides: dict[str, Callable[[], float]] = {}
            for workers in (0, 2):
                bare = partial(bare_counts, reader, workers)
                ours = partial(counts_of, partial(samples_of, manifest=manifest), workers)
                clock = time.perf_counter if workers else time.process_time
                sides[f"bare {workers}"] = partial(megabytes_per_second, bare, megabytes, clock)
                sides[f"runner {workers}"] = partial(megabytes_per_second, ours, megabytes, clock)
            found = take_turns(sides, turns)
            for workers in (0, 2):
                theirs, mine = found[f"bare {workers}"], found[f"runner {workers}"]
                cells = [f"{median(theirs):.0f}", f"{median(mine):.0f}", *ratio(mine, theirs)]
                table.append([suffix, f"{workers}", *cells])
    show(["shards", "workers", "bare MB/s", "runner MB/s", "ratio", "spread"], table)


def bare_counts(reader: BareReader, workers: int) -> Iterator[int]:
    """Records, batch by batch."""
    if workers:
        yield from DataLoader(reader, batch_size=BATCH, num_workers=workers, collate_fn=len)
        return
    records = iter(reader)
    while batch := [*islice(records, BATCH)]:
        yield len(batch)


def counts_of(make: Callable[[], Any], workers: int) -> Iterator[int]:
    """Records, batch by batch of one epoch, by a data set that holds nothing yet."""
    samples = make()
    batches = opened(partial(stream_of, samples, workers=workers, randomness="off", collate=len))
    for _ in range(len(samples) // BATCH):
        yield next(batches)


def megabytes_per_second(
    counts: Callable[[], Iterator[int]], megabytes: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """From the first batch to the last, by ``clock``."""
    gc.collect()
    found = counts()
    begun = next(found)
    start = clock()
    read = sum(found)
    seconds = clock() - start
    return megabytes * read / (begun + read) / seconds


def ledger(turns: int) -> None:
    """Lines and digests."""
    steps = 2000
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        location = LocalLocation(temporary)

        def attempt(number: int) -> Ledger:
            found = Ledger(location, attempt=number, recipe={"samples": 1}, grouping=BATCH)
            found.open(0)
            return found

        lines = [
            LedgerLine(step, step * BATCH, step * BATCH + BATCH - 1, step**5 % 2**64)
            for step in range(1, steps * (turns + 1) + 1)
        ]
        before = attempt(1)
        fresh = attempt(2)
        for line in lines:
            before.add(line)
        descriptor = os.open(f"{temporary}/bare", os.O_WRONLY | os.O_CREAT)
        again = attempt(3)
        writes: dict[str, Callable[[LedgerLine], object]] = {
            BARE: lambda line: os.write(descriptor, f"{line.step} {line.first} {line.last}\n".encode()),
            "a line": fresh.add,
            "a line that an earlier attempt wrote": again.add,
        }
        found = take_turns({name: calls(write, iter(lines), steps) for name, write in writes.items()}, turns)
        for name in list(writes)[1:]:
            cells = [f"{median(found[BARE]):.2f}", f"{median(found[name]):.2f}", *ratio(found[name], found[BARE])]
            table.append([name, *cells, verdict(median(found[name]), 10)])
    for size in (64, 1024):
        pair = np.arange(size), np.random.default_rng(0).integers(1_000_000, size=size)
        digests = {
            BARE: calls(lambda pair: blake2b(pair[1].tobytes(), digest_size=8).digest(), repeat(pair), steps),
            "digest": calls(lambda pair: digest_words(*pair).sum(dtype=np.uint64), repeat(pair), steps),
        }
        found = take_turns(digests, turns)
        cells = [f"{median(found[BARE]):.2f}", f"{median(found['digest']):.2f}", *ratio(found["digest"], found[BARE])]
        table.append([f"a digest of {size} samples", *cells, ""])
    show(["per step", "bare us", "runner us", "ratio", "spread", "target"], table)


def calls(function: Callable[[Any], object], arguments: Iterator[Any], times: int) -> Callable[[], float]:
    """Measures microseconds per call, with the next so many arguments."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(times):
            function(next(arguments))
        return 1e6 * (time.perf_counter() - start) / times

    return measure


TABLES: dict[str, tuple[Callable[[int], None], int]] = {
    "overhead": (overhead, 9),
    "first": (first, 7),
    "memory": (memory, 1),
    "shards": (shards, 3),
    "ledger": (ledger, 15),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; default: all")
    parser.add_argument("--turns", type=int, help="of each side; default: " + ", ".join(map(turns_of, TABLES)))
    parser.add_argument("--megabytes", type=int, default=200, help="of shards; default: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tables if name not in TABLES]:
        parser.error(f"no such table here: {', '.join(unknown)}")
    if arguments.turns is not None and arguments.turns < 2:
        parser.error("--turns must be at least 2: there are no quartiles of fewer")
    torch.set_num_threads(1)
    if arguments.child:
        memory_child(arguments.child, arguments.size)
        return
    logging.getLogger("runner").setLevel(logging.ERROR)
    for name in arguments.tables or TABLES:
        measure, turns = TABLES[name]
        if name == "shards":
            measure = partial(shards, megabytes=arguments.megabytes)
        measure(arguments.turns or turns)


def turns_of(table: str) -> str:
    return f"{TABLES[table][1]} for {table}"


if __name__ == "__main__":
    main()

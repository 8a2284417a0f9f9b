"""``runtime.num_workers=auto`` against fixed numbers of data workers, on four shapes of work.

    tensors    rows of a tensor in memory
    jpeg       decoding pictures of 256 x 256
    remote     a store that answers after 5 ms
    numpy      crops, flips and noise in numpy

Each side is a stream of training batches (batches of 32; the step is an MLP on what the batch has, forwards and
backwards, on one thread), in a turn of some seconds; sides take turns, the order changing from turn to turn, so that
other load meets all of them. ``settled`` are the samples per second in the second half of a turn, when ``auto`` has
chosen; ``whole`` counts the search as well. Both are ratios of ``auto`` to the best fixed number, and to 0 workers,
within a turn: medians and quartiles. The numbers that ``auto`` came to are shown.

    python -m benchmarks.workers                       # from the root of the repository; about ten minutes
    python -m benchmarks.workers jpeg --turns 3 --seconds 5
"""

import argparse
import io
import logging
import random
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import show
from runner.data.fetch import Fetcher
from runner.data.limits import Limits, cores
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan
from runner.data.stream import MapStyleStream

AUTO = "auto"
SIZE = 4096  # samples
BATCH = 32


class Tensors:
    def __init__(self) -> None:
        self.rows = torch.rand(SIZE, 1024)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Jpegs(Tensors):
    def __init__(self) -> None:
        super().__init__()
        pixels = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
        self.files = [self.encoded(picture) for picture in pixels]

    def encoded(self, pixels: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((256, 256)).save(file, "jpeg")
        return file.getvalue()

    def __getitem__(self, index: int) -> Tensor:
        picture = Image.open(io.BytesIO(self.files[index % len(self.files)])).resize((32, 32))
        return torch.from_numpy(np.asarray(picture)[:, :, 0].reshape(-1) / np.float32(255))


class Remote(Tensors):
    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.005)
        return self.rows[index]


class Augmented(Tensors):
    def __init__(self) -> None:
        super().__init__()
        self.pictures = np.random.default_rng(0).random((16, 3, 128, 128), dtype=np.float32)

    def __getitem__(self, index: int) -> Tensor:
        top, left = random.randrange(32), random.randrange(32)
        picture = self.pictures[index % len(self.pictures)][:, top : top + 96, left : left + 96]
        picture = picture[:, :, ::-1] if random.random() < 0.5 else picture
        noisy = np.clip(picture + 0.1 * np.random.standard_normal(picture.shape), 0, 1)
        return torch.from_numpy(np.ascontiguousarray(noisy[0, :32, :32], dtype=np.float32).reshape(-1))


SHAPES: Mapping[str, type[Tensors]] = {"tensors": Tensors, "jpeg": Jpegs, "remote": Remote, "numpy": Augmented}


class Training:
    """Steps over a stream, with ``number`` workers."""

    def __init__(self, samples: Any, number: int | str) -> None:
        limits = Limits(cores()) if number == AUTO else None
        loading = LoaderOptions(0 if number == AUTO else int(number), limits=limits)
        fetcher = Fetcher(samples, Plan(SIZE, 1, BATCH), label="train")
        self.stream = MapStyleStream(fetcher, loading=loading, device=torch.device("cpu"), audit=True)
        self.stream.open()
        self.model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def rate(self, seconds: float) -> float:
        """Samples per second."""
        began, steps = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < seconds:
            self.stream.ready()
            for _, batch in self.stream.step():
                self.optimizer.zero_grad()
                torch.autograd.backward(F.mse_loss(self.model(batch), batch))
                self.optimizer.step()
            self.stream.advance()
            steps += 1
        return steps * BATCH / elapsed


def turn(samples: Callable[[], Any], number: int | str, seconds: float) -> tuple[float, float, int]:
    """Samples per second of the whole turn and of its second half; the number of workers at its end."""
    training = Training(samples(), number)
    first, second = training.rate(seconds / 2), training.rate(seconds / 2)
    workers = training.stream.workers
    training.stream.close()
    return (first + second) / 2, second, workers


def spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.2f} ({low:.2f} .. {high:.2f})"


def measure(name: str, turns: int, seconds: float, numbers: list[int]) -> list[list[str]]:
    """A line for each comparison."""
    sides: list[int | str] = [AUTO, *numbers]
    results: dict[int | str, list[tuple[float, float, int]]] = {side: [] for side in sides}
    for count in range(turns):
        for side in sides[:: -1 if count % 2 else 1]:
            results[side].append(turn(SHAPES[name], side, seconds))
    best = max(numbers, key=lambda side: median(half for _, half, _ in results[side]))
    chosen = ", ".join(str(workers) for _, _, workers in results[AUTO])
    lines = []
    for other in dict.fromkeys([best, 0]):
        pairs = [*zip(results[AUTO], results[other], strict=True)]
        whole, settled = ([ours[at] / theirs[at] for ours, theirs in pairs] for at in (0, 1))
        rate = f"{median(half for _, half, _ in results[other]):.0f}"
        lines.append([name, f"{other}{' (best)' * (other == best)}", rate, spread(settled), spread(whole), chosen])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"{', '.join(SHAPES)}; default: all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--numbers", type=int, nargs="+", default=[0, 1, 2, 4], help="of workers, to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("runner").setLevel(logging.ERROR)
    for name in arguments.shapes or SHAPES:
        lines = measure(name, arguments.turns, arguments.seconds, arguments.numbers)
        show(["data", "against", "samples/s", "auto, settled", "auto, whole", "chose"], lines)


if __name__ == "__main__":
    main()

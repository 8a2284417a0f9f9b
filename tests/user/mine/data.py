"""Data sets that a user might write, good and bad."""

import glob
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch

from mine.tasks import first
from runner.datasets.digits import Digits


class Rows:
    """Eight noisy numbers and a label; the noise comes from all global generators."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = torch.randn(8) + random.gauss(0, 1) + np.random.standard_normal()
        return row(index) + 0.1 * noise.float(), index % 3


class Slow(Rows):
    """As from a store that answers slowly, so that data workers are worth while; they make the file ``mark``."""

    def __init__(self, size, mark):
        super().__init__(size)
        self.mark = mark

    def __getitem__(self, index):
        time.sleep(0.002)
        if torch.utils.data.get_worker_info():
            Path(self.mark).touch()
        return super().__getitem__(index)


def harder(samples):
    """A curriculum for 100 rows: in the first two epochs the first half alone, then the second half more and more."""
    first, all_ = np.arange(100) < 50, np.ones(100)
    return {0: first, 2: 4 * first + all_, 4: all_ + np.arange(100) % 3}


class Stuck(Digits):
    """In one rank, is never built. Not where the file ``once`` is, which it makes."""

    def __init__(self, *, rank, once, **how):
        super().__init__(**how)
        if os.environ.get("RANK") == str(rank) and first(once):
            threading.Event().wait()


class Stalls(Digits):
    """In one rank, its 60th sample never comes; then there is the file ``mark``."""

    def __init__(self, *, rank, mark, **how):
        super().__init__(**how)
        self.left = 60 if os.environ.get("RANK") == str(rank) else math.inf
        self.mark = mark

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            Path(self.mark).touch()
            threading.Event().wait()
        return super().__getitem__(index)


class Guarded(Rows):
    """Gets many secrets that are one, and repeats it where it is ``broken``."""

    def __init__(self, size, secrets, more, broken):
        super().__init__(size)
        self.secrets, self.broken = json.dumps(secrets), broken
        assert self.secrets.count(os.environ["CANARY"]) == len(secrets)
        self.fail("constructor")

    def __getitem__(self, index):
        self.fail("sample")
        return super().__getitem__(index)

    def fail(self, where):
        if self.broken == where:
            raise ValueError(f"403 for {self.secrets}")


def collated(batch, token):
    """The default, for who knows the token."""
    assert token == os.environ["CANARY"]
    return torch.utils.data.default_collate(batch)


class Hidden(Rows):
    """Draws from a generator of its own."""

    def __init__(self, size):
        super().__init__(size)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        return row(index) + float(self.generator.random()), index % 3


class Counter(Rows):
    """Gets harder from call to call."""

    calls = 0

    def __getitem__(self, index):
        self.calls += 1
        return row(index) * self.calls, index % 3


class ByProcess(Rows):
    """Depends on the process that reads it."""

    def __getitem__(self, index):
        return row(index) + os.getpid() % 1000, index % 3


class Unsized:
    """A map without a length."""

    def __init__(self, size):
        pass

    def __getitem__(self, index):
        return row(index), 0


class WithLambda(Rows):
    """Cannot be sent to another process."""

    def __init__(self, size):
        super().__init__(size)
        self.transform = lambda x: x


class File(Rows):
    """Numbers in a text file."""

    def __init__(self, size, path):
        with open(path) as file:
            self.rows = [[float(word) for word in line.split()] for line in file]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.tensor(self.rows[index]), index % 3


class Broken(Rows):
    """Some samples cannot be read."""

    def __getitem__(self, index):
        if index % 10 == 7:
            raise KeyError("label")
        return super().__getitem__(index)


class Remote(Rows):
    """Some samples are in a file that may be ``gone``."""

    def __init__(self, size, gone):
        super().__init__(size)
        self.gone = gone

    def __getitem__(self, index):
        if index % 10 == 7 and os.path.exists(self.gone):
            raise FileNotFoundError(index)
        return super().__getitem__(index)


class Holes(Rows):
    """Has no sample at some indices."""

    def __getitem__(self, index):
        return None if index % 10 == 3 else super().__getitem__(index)


class Unreadable(Rows):
    """No sample can be read."""

    def __getitem__(self, index):
        raise OSError("gone")


class Waits(Rows):
    """Once, at one sample, stops the training process, and waits forever. Before that, until there is a file."""

    def __init__(self, size, at, once, after):
        super().__init__(size)
        self.at, self.once, self.after = at, once, after

    def __getitem__(self, index):
        if index == self.at and first(self.once):
            while self.after != "null" and not glob.glob(self.after):
                time.sleep(0.01)
            training = multiprocessing.parent_process()
            os.kill(training.pid if training else os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        return super().__getitem__(index)


class Sentences(Rows):
    """Rows of different lengths."""

    @property
    def lengths(self):
        return [1 + index * index % 13 for index in range(self.size)]


class Iterable(torch.utils.data.IterableDataset):
    """The same rows as a stream that knows where it is; shares itself out to workers."""

    def __init__(self, size, rows=None):
        self.rows = rows or Rows(size)
        self.at = 0

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        while self.at * workers + number < self.rows.size:
            self.at += 1
            yield self.rows[(self.at - 1) * workers + number]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Stateless:
    """An iterable that does not know where it is."""

    def __init__(self, size):
        self.rows = Rows(size)

    def __iter__(self):
        return (self.rows[index] for index in range(self.rows.size))


def decode(record):
    """A row out of a record with its number."""
    noise = 0.1 * torch.randn(8)
    return row(record["number"]) + noise, record["number"] % 3


def row(index):
    """What a sample is without its noise."""
    return torch.sin(torch.arange(8.0) * (index % 97 + 1))


def write_shards(folder, counts):
    """One jsonl file for each count, the numbers going through all of them."""
    number = 0
    os.makedirs(folder, exist_ok=True)
    for shard, count in enumerate(counts):
        with open(f"{folder}/{shard:03d}.jsonl", "w") as file:
            for _ in range(count):
                file.write(json.dumps({"number": number}) + "\n")
                number += 1


def hugging_face(folder, iterable):
    """A Hugging Face data set from a disk."""
    import datasets

    found = datasets.load_from_disk(folder).with_format("torch")
    return found.to_iterable_dataset(num_shards=4) if iterable else found


def pairs(rows):
    """Batches for a classification out of rows with names."""
    return torch.stack([line["x"] for line in rows]), torch.stack([line["y"] for line in rows])


def save_hugging_face(folder, size):
    """The rows without noise."""
    import datasets

    rows = {"x": [row(index).tolist() for index in range(size)], "y": [index % 3 for index in range(size)]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows).save_to_disk(folder)

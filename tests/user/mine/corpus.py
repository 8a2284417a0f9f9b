"""Tasks that remember, read or change something outside of their state, each in a form of its own. ``mended`` fixes
it as ``runner.verify`` advises. The comment ``culprit`` marks the line that it has to name.
"""

import ctypes
import functools
import io
import itertools
import multiprocessing
import random
import sqlite3
import threading
import weakref
from array import array
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch

from runner.tasks.classification import Classification


class Scaled(Classification):
    """Scales its inputs by ``amount``. Mended, it saves its attributes ``kept``."""

    kept = ()

    def __init__(self, mended):
        super().__init__()
        self.mended = mended

    def training_step(self, model, batch):
        x, y = batch
        return super().training_step(model, (x * (1 + self.amount(x) / 10), y))

    def state_dict(self):
        return {name: getattr(self, name) for name in self.kept} if self.mended else {}

    def load_state_dict(self, state):
        vars(self).update(state)


class Counted(Scaled):
    """Mended, it counts in an attribute that it saves, and no longer elsewhere."""

    kept = ("number",)
    number = 0

    def amount(self, x):
        if not self.mended:
            return self.elsewhere()
        self.number += 1
        return self.number


tally = 0


class Tallies(Counted):
    def elsewhere(self):
        global tally
        tally += 1  # culprit
        return tally


class Registers(Counted):
    registry = {"seen": 0}  # noqa: RUF012

    def elsewhere(self):
        self.registry["seen"] += 1  # culprit
        return self.registry["seen"]


def rungs():
    rung = 0

    def climb():
        nonlocal rung
        rung += 1  # culprit
        return rung

    return climb


class Encloses(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.elsewhere = rungs()


class Defaults(Counted):
    def elsewhere(self, visits=[]):  # noqa: B006
        visits.append(1)  # culprit
        return len(visits)


def warm():
    warm.calls += 1  # culprit
    return warm.calls


warm.calls = 0


class Annotates(Counted):
    def elsewhere(self):
        return warm()


class Singleton:
    only = None

    def __new__(cls):
        if cls.only is None:
            cls.only = super().__new__(cls)
            cls.only.level = 0
        return cls.only


class Shares(Counted):
    def elsewhere(self):
        Singleton().level += 1  # culprit
        return Singleton().level


LEVEL = ContextVar("LEVEL", default=0)


class Contextual(Counted):
    def elsewhere(self):
        LEVEL.set(LEVEL.get() + 1)  # culprit
        return LEVEL.get()


here = threading.local()
here.depth = 0


class Local(Counted):
    def elsewhere(self):
        here.depth += 1  # culprit
        return here.depth


class Ages(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.ages = weakref.WeakKeyDictionary()

    def training_step(self, model, batch):
        self.ages[model] = self.ages.get(model, 0) + 1  # culprit
        self.elsewhere = lambda: self.ages[model]
        return super().training_step(model, batch)


class Native(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.cell = ctypes.c_int(0)

    def elsewhere(self):
        self.cell.value += 1  # culprit
        return self.cell.value


class SharedValue(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.total = multiprocessing.Value("i", 0)

    def elsewhere(self):
        self.total.value += 1  # culprit
        return self.total.value


class Packs(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.numbers = array("d", [0.0])

    def elsewhere(self):
        self.numbers[0] += 1  # culprit
        return self.numbers[0]


class Binds(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.shrink = functools.partial(max, 0)

    def elsewhere(self):
        self.shrink = functools.partial(max, self.shrink() + 1 if self.shrink.args[1:] else 1, 0)  # culprit
        return self.shrink.args[0]


class Yields(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.rates = (2.0**n for n in range(-9, 1000))

    def elsewhere(self):
        return next(self.rates)  # culprit


class Numbers(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.ordinals = itertools.count()

    def elsewhere(self):
        return next(self.ordinals)  # culprit


class Tapes(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.tape = io.BytesIO(bytes(range(100)))

    def elsewhere(self):
        return self.tape.read(1)[0]  # culprit


class Databases(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.table = sqlite3.connect(":memory:")
        self.table.execute("create table rows (x)")

    def elsewhere(self):
        self.table.execute("insert into rows values (1)")  # culprit
        return self.table.execute("select count(*) from rows").fetchone()[0]


class Windows(Scaled):
    """Clips by a window of what it saw."""

    def __init__(self, mended):
        super().__init__(mended)
        self.window = deque(maxlen=4)

    def amount(self, x):
        self.window.append(float(x.mean()))  # culprit
        return sum(self.window)

    def state_dict(self):
        return {"window": [*self.window]} if self.mended else {}

    def load_state_dict(self, state):
        self.window.extend(state.get("window", []))


class Averages(Scaled):
    kept = ("mean",)
    mean = torch.zeros(())

    def amount(self, x):
        self.mean = 0.9 * self.mean + x.detach().mean()  # culprit
        return self.mean


class Banks(Scaled):
    kept = ("bank", "row")

    def __init__(self, mended):
        super().__init__(mended)
        self.bank, self.row = torch.zeros(512, 8), 0

    def amount(self, x):
        self.bank[self.row * 100] = x.detach().mean(0)  # culprit
        self.row = (self.row + 1) % 5  # culprit
        return self.bank.sum()


class Histograms(Scaled):
    def __init__(self, mended):
        super().__init__(mended)
        self.histogram = np.zeros(8)

    def amount(self, x):
        self.histogram += x.detach().numpy().mean(0)  # culprit
        return float(self.histogram.sum())

    def state_dict(self):
        return {"histogram": self.histogram.tolist()} if self.mended else {}

    def load_state_dict(self, state):
        self.histogram = np.array(state.get("histogram", self.histogram))


class Tables(Scaled):
    """Has the loss of every sample in a table of thousands."""

    def __init__(self, mended):
        super().__init__(mended)
        self.losses = dict.fromkeys(range(3000), 0.0)

    def amount(self, x):
        self.losses[int(x.sum().abs() * 10)] = 1.0  # culprit
        return sum(self.losses.values())

    def state_dict(self):
        return {"losses": [*self.losses.values()]} if self.mended else {}

    def load_state_dict(self, state):
        self.losses = dict(enumerate(state.get("losses", self.losses.values())))


class Links(Scaled):
    """Has a list whose nodes hold each other."""

    def __init__(self, mended):
        super().__init__(mended)
        self.head = None
        for _ in range(20):
            self.head = {"next": self.head, "value": 0.0}

    def amount(self, x):
        self.head = {"next": self.head, "value": float(x.mean())}  # culprit
        return sum(self.values())

    def values(self):
        node = self.head
        while node:
            yield node["value"]
            node = node["next"]

    def state_dict(self):
        return {"values": [*self.values()]} if self.mended else {}

    def load_state_dict(self, state):
        for value in reversed(state.get("values", [])):
            self.head = {"next": self.head, "value": value}
        for node in [self.head] if state else []:
            for _ in state["values"][1:]:
                node = node["next"]
            node["next"] = None


@dataclass(slots=True)
class Meter:
    total: float = 0.0
    count: int = 0


class Meters(Scaled):
    """Has a meter with slots, of which one is read."""

    def __init__(self, mended):
        super().__init__(mended)
        self.meter = Meter()

    def amount(self, x):
        self.meter.count += 1
        self.meter.total += float(x.mean())  # culprit
        return self.meter.total

    def state_dict(self):
        return {"total": self.meter.total} if self.mended else {}

    def load_state_dict(self, state):
        self.meter.total = state.get("total", 0.0)


class Labels(Scaled):
    def __init__(self, mended):
        super().__init__(mended)
        self.sums = set()

    def amount(self, x):
        self.sums.add(round(float(x.sum()), 2))  # culprit
        return len(self.sums)

    def state_dict(self):
        return {"sums": sorted(self.sums)} if self.mended else {}

    def load_state_dict(self, state):
        self.sums = {*state.get("sums", [])}


class Logs(Scaled):
    kept = ("text",)
    text = ""

    def amount(self, x):
        self.text += f"{float(x.mean()):.3f} "  # culprit
        return len(self.text) / 10


class First(Scaled):
    """Centres by its first batch."""

    kept = ("centre",)
    centre = None

    def amount(self, x):
        if self.centre is None:
            self.centre = float(x.mean())  # culprit
        return float(x.mean()) - self.centre


class Mixes(Scaled):
    """Mixes a batch with the one before."""

    kept = ("previous",)
    previous = torch.zeros(())

    def training_step(self, model, batch):
        x, y = batch
        mixed = 0.9 * x + 0.1 * self.previous.mean()
        self.previous = x  # culprit
        return super().training_step(model, (mixed, y))

    def amount(self, x):
        return 0


class Rolls(Scaled):
    """Rolls dice of its own."""

    def __init__(self, mended):
        super().__init__(mended)
        self.dice = random.Random(7)

    def amount(self, x):
        return self.dice.random()  # culprit

    def state_dict(self):
        version, numbers, gauss = self.dice.getstate()
        return {"dice": [version, [*numbers], gauss]} if self.mended else {}

    def load_state_dict(self, state):
        if state:
            version, numbers, gauss = state["dice"]
            self.dice.setstate((version, tuple(numbers), gauss))


class Shakes(Scaled):
    def __init__(self, mended):
        super().__init__(mended)
        self.noise = np.random.default_rng(7)

    def amount(self, x):
        return float(self.noise.random())  # culprit

    def state_dict(self):
        return {"noise": self.noise.bit_generator.state} if self.mended else {}

    def load_state_dict(self, state):
        if state:
            self.noise.bit_generator.state = state["noise"]


class Seeds(Scaled):
    """Seeds all that is drawn later, when it is used first."""

    ready = False

    def amount(self, x):
        if not self.ready and not self.mended:
            torch.manual_seed(3)
            self.ready = True  # culprit
        return torch.rand(())

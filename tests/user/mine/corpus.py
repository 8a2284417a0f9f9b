"""Tasks that remember, read or change something outside of their state, each in a form of its own. ``mended`` fixes
it as ``runner.verify`` advises. The comment ``culprit`` marks the line that it has to name.
"""

import functools
import multiprocessing
import random
import sqlite3
import threading
import weakref
from contextvars import ContextVar

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


class SharedValue(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.total = multiprocessing.Value("i", 0)

    def elsewhere(self):
        self.total.value += 1  # culprit
        return self.total.value


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


class Databases(Counted):
    def __init__(self, mended):
        super().__init__(mended)
        self.table = sqlite3.connect(":memory:")
        self.table.execute("create table rows (x)")

    def elsewhere(self):
        self.table.execute("insert into rows values (1)")  # culprit
        return self.table.execute("select count(*) from rows").fetchone()[0]


class Averages(Scaled):
    kept = ("mean",)
    mean = torch.zeros(())

    def amount(self, x):
        self.mean = 0.9 * self.mean + x.detach().mean()  # culprit
        return self.mean


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


class Seeds(Scaled):
    """Seeds all that is drawn later, when it is used first."""

    ready = False

    def amount(self, x):
        if not self.ready and not self.mended:
            torch.manual_seed(3)
            self.ready = True  # culprit
        return torch.rand(())

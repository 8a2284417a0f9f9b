"""Tasks whose state is wrong. ``mended`` fixes them as ``runner.verify`` advises. The comment ``culprit`` marks the
line that it has to name.
"""

import torch

from mine.corpus import Scaled


class Unsaved(Scaled):
    """Means to save a set."""

    def __init__(self, mended):
        super().__init__(mended)
        self.sums = set()

    def amount(self, x):
        self.sums.add(float(x.sum()))
        return len(self.sums)

    def state_dict(self):
        return {"sums": sorted(self.sums) if self.mended else self.sums}

    def load_state_dict(self, state):
        self.sums = {*state["sums"]}


class Renames(Scaled):
    """Loads another name than it saves."""

    number = 0

    def amount(self, x):
        self.number += 1
        return self.number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):  # culprit
        self.number = state.get("number" if self.mended else "count", 0)


class Misses(Renames):
    """Loads what it never saved."""

    def load_state_dict(self, state):
        self.number = state["number" if self.mended else "count"]  # culprit


class Rounds(Scaled):
    """Saves less than it knows."""

    mean = 0.0

    def amount(self, x):
        self.mean += float(x.mean())  # culprit
        return self.mean

    def state_dict(self):
        return {"mean": self.mean if self.mended else round(self.mean, 2)}


class Empties(Scaled):
    """Takes its queue away when it is saved."""

    queue = ()

    def amount(self, x):
        self.queue = (*self.queue, float(x.mean()))
        return sum(self.queue)

    def state_dict(self):  # culprit
        saved = [*self.queue]
        if not self.mended:
            self.queue = ()
        return {"queue": saved}

    def load_state_dict(self, state):
        self.queue = tuple(state["queue"])


class Stirs(Scaled):
    """Draws a number for the name of what it saves."""

    def amount(self, x):
        return torch.rand(())

    def state_dict(self):  # culprit
        return {"name": 0.0 if self.mended else float(torch.rand(()))}


class Extends(Scaled):
    """Appends what it loads to what it has."""

    def __init__(self, mended):
        super().__init__(mended)
        self.means = []

    def amount(self, x):
        self.means.append(float(x.mean()))
        return sum(self.means)

    def state_dict(self):
        return {"means": [*self.means]}

    def load_state_dict(self, state):  # culprit
        self.means = state["means"] if self.mended else [*self.means, *state["means"]]


class Watches(Scaled):
    """Counts evaluations, which scale training."""

    looks = 0

    def amount(self, x):
        return self.looks

    def evaluation_step(self, model, batch):
        self.looks += 0 if self.mended else 1  # culprit
        return super().evaluation_step(model, batch)

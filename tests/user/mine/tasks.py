"""Tasks that a user might write."""

import copy
import os
import signal
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from runner.errors import RunnerError
from runner.tasks.classification import Classification


class Curriculum(Classification):
    """Smooths labels more with every step, which is state, and has a loss that is not finite now and then."""

    def __init__(self, *, bad_every: int = 0) -> None:
        super().__init__()
        self.seen = 0
        self.bad_every = bad_every

    def training_step(self, model, batch):
        self.seen += 1
        self.label_smoothing = min(0.3, self.seen / 200)
        metrics = super().training_step(model, batch)
        if self.bad_every and self.seen % self.bad_every == 0:
            metrics["loss"] = metrics["loss"] * torch.inf
        return metrics

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Forgetful(Curriculum):
    """The same memory, with something in its state that cannot be saved."""

    def state_dict(self):
        return {"seen": self.seen, "nested": [{"what": object()}]}


class Stops(Classification):
    """Sends its own process a signal: ``during`` training or evaluation, at that call."""

    def __init__(self, *, during: str, call: int, number: int) -> None:
        super().__init__()
        self.during, self.call, self.number = during, call, number
        self.calls = {"training": 0, "evaluation": 0}

    def training_step(self, model, batch):
        self._maybe("training")
        return super().training_step(model, batch)

    def evaluation_step(self, model, batch):
        self._maybe("evaluation")
        return super().evaluation_step(model, batch)

    def _maybe(self, phase):
        import os

        self.calls[phase] += 1
        if (phase, self.calls[phase]) == (self.during, self.call):
            os.kill(os.getpid(), self.number)


class Breaks(Classification):
    """Fails with an error of its own."""

    def training_step(self, model, batch):
        raise KeyError("mine")


class Fails(Classification):
    """Divides by zero in its training step number ``step``."""

    def __init__(self, *, step: int) -> None:
        super().__init__()
        self.step = step

    def training_step(self, model, batch):
        self.step -= 1
        return {**super().training_step(model, batch), "inverse": torch.tensor(1 / self.step)}


class Exits(Classification):
    """Ends its process with status 0."""

    def training_step(self, model, batch):
        sys.exit(0)


class Leaves(Classification):
    """Ends its process with ``os._exit``."""

    def __init__(self, status=3, **options):
        super().__init__(**options)
        self.status = status

    def training_step(self, model, batch):
        import os

        os._exit(self.status)


class Counted(Classification):
    """Prints how many models of earlier jobs are alive, and fails."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.error = RunnerError("mine") if own else KeyError("mine")

    def training_step(self, model, batch):
        import gc

        gc.collect()
        models = [each for each in gc.get_objects() if isinstance(each, type(model)) and each is not model]
        roots = [each for each in models if not any(each is part for part in model.modules())]
        print(f"alive before this job: {len(roots)} models", flush=True)
        raise self.error


class Slow(Classification):
    """Sleeps in each training step for the seconds in the file that the environment variable PACE names."""

    def training_step(self, model, batch):
        import os
        import time
        from pathlib import Path

        if "PACE" in os.environ:
            time.sleep(float(Path(os.environ["PACE"]).read_text() or 0))
        return super().training_step(model, batch)


class Hangs(Classification):
    """Hangs in one rank at a step ``during`` training or evaluation; or ``fails`` or ``dies`` there. With ``once``, a
    path, only the first time: it makes that file.
    """

    def __init__(self, *, rank: int, step: int, during="training", fails=False, dies=False, once=None) -> None:
        super().__init__()
        self.here, self.step, self.during, self.once = os.environ.get("RANK") == str(rank), step, during, once
        self.fails, self.dies = fails, dies

    def training_step(self, model, batch):
        self._maybe("training")
        return super().training_step(model, batch)

    def evaluation_step(self, model, batch):
        self._maybe("evaluation")
        return super().evaluation_step(model, batch)

    def _maybe(self, phase):
        self.step -= phase == self.during
        if not self.here or self.step or phase != self.during or (self.once and not first(self.once)):
            return
        if self.fails:
            raise RuntimeError("mine")
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


def first(once):
    """Whether this is the first call with this path; makes the file."""
    try:
        open(once, "x").close()
    except FileExistsError:
        return False
    return True


class Wakes(Classification):
    """Evaluates in training mode, and trains the smoother the more it has evaluated; ``pushes`` weights, too, or
    ``swaps`` others in until the end. Sends its process SIGTERM at a call.
    """

    def __init__(self, *, call: int, pushes: bool = False, swaps: bool = False, remembers: bool = True) -> None:
        super().__init__()
        self.call, self.pushes, self.remembers, self.seen = call, pushes, remembers, torch.zeros(())
        self.swaps, self.own = swaps, []

    def training_step(self, model, batch):
        self.label_smoothing = min(0.3, self.seen.item() / 50)
        return super().training_step(model, batch)

    def evaluation_step(self, model, batch):
        self.call -= 1
        if self.call == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        model.train()
        self.seen += self.remembers
        if self.pushes:
            next(model.parameters()).mul_(1.01)
        if self.swaps and not self.own:
            self.own = [(part, {**part._parameters}) for part in model.modules()]
            for part, weights in self.own:
                part._parameters.update({name: nn.Parameter(weight / 2) for name, weight in weights.items()})
        return self.training_step(model, batch)

    def evaluation_end(self, model, metrics):
        for part, weights in self.own:
            part._parameters.update(weights)
        self.own = []
        return metrics

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Counts(Classification):
    """Adds up hits by itself, and reports their share."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__()
        self.together = together
        self.hits = self.samples = 0

    def evaluation_step(self, model, batch):
        metrics = super().evaluation_step(model, batch)
        self.hits += int((model(batch[0]).argmax(1) == batch[1]).sum())
        self.samples += len(batch[1])
        return metrics

    def evaluation_end(self, model, metrics):
        share = metrics["accuracy"] if self.together else self.hits / self.samples
        self.hits = self.samples = 0
        return {**metrics, "share": share}


class Averages(Classification):
    """Follows a teacher that is made in ``setup`` and averages the student's weights; returns an object with a loss."""

    def __init__(self, *, remembers: bool = True) -> None:
        super().__init__()
        self.remembers = remembers

    def setup(self, model, device):
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.direction = torch.randn(10, device=device)

    def training_step(self, model, batch):
        with torch.no_grad():
            wanted = self.teacher(batch[0]) + self.direction
            for mine, other in zip(self.teacher.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, 0.1)
        loss = super().training_step(model, batch)["loss"] + 0.1 * (model(batch[0]) - wanted).square().mean()
        return ModelOutput(loss=loss)

    def state_dict(self):
        return {"teacher": self.teacher.state_dict() if self.remembers else {}}

    def load_state_dict(self, state):
        self.teacher.load_state_dict(state["teacher"], strict=self.remembers)


class ModelOutput(OrderedDict):
    """As that of transformers: a mapping with attributes."""

    def __init__(self, loss) -> None:
        super().__init__(loss=loss, logits=torch.zeros(3, 2))
        self.loss = loss


class Mended(Classification):
    """Raises in its evaluation while the file ``broken`` is there, on all ranks or on those of which its text is the
    number. Counts its evaluated batches, which is state.
    """

    def __init__(self, *, broken: str) -> None:
        super().__init__()
        self.broken, self.seen = Path(broken), torch.zeros(())

    def training_step(self, model, batch):
        self.label_smoothing = min(0.3, self.seen.item() / 50)
        return super().training_step(model, batch)

    def evaluation_step(self, model, batch):
        self.seen += 1
        rank = os.environ.get("RANK", "")
        if self.seen % 4 == 3 and self.broken.exists() and self.broken.read_text() in ("", rank):
            return {"loss": undefined}  # noqa: F821
        torch.randn(1)
        return super().evaluation_step(model, batch)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Misspelt(Stops):
    """Raises a NameError in its evaluation."""

    def evaluation_step(self, model, batch):
        return {"loss": undefined}  # noqa: F821

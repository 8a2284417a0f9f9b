"""What makes runs differ, in words: the likely cause of a first difference, and what to do about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from runner.verify.difference import Difference, Remembered

_STATEFUL = "give it state_dict and load_state_dict; both are then saved and restored with the model"
_SEEDED = "draw from python's, numpy's or torch's global generators, which are seeded for every sample"


@dataclass(frozen=True, slots=True)
class Cause:
    """A ``kind`` for programs; ``what`` and ``remedy`` for people; whether repetitions made it ``sure``."""

    kind: str
    what: str
    remedy: str
    sure: bool = True

    def at(self, part: str, names: str = "") -> "Cause":
        """The same, with where it shows first."""
        return replace(self, what=f"{self.what}. It shows in: {part}{f' ({names})' if names else ''}")


CAUSES: Mapping[str, Cause] = {
    cause.kind: cause
    for cause in (
        Cause(
            "hash",
            "hash() of a text or the order of a set is used in training: both are others in every process",
            "sort what is in a set before it is used, and use hashlib or zlib.crc32 instead of hash()",
        ),
        Cause(
            "pid",
            "the number of the process (os.getpid) is used in training",
            "use the configuration's seed instead of the pid",
        ),
        Cause("time", "the time is used in training", "count steps or samples instead of seconds"),
        Cause(
            "entropy",
            "a generator is seeded by the system: default_rng(), random.Random() or os.urandom without a seed",
            f"{_SEEDED}, or seed it from the configuration and save its state",
        ),
        Cause(
            "threads",
            "the result depends on how threads take turns",
            "runtime.num_threads=1, or a kernel whose sums have one order",
        ),
        Cause(
            "kernel",
            "a kernel is used whose result varies from call to call",
            "runtime.deterministic=true refuses such kernels by name; use another",
        ),
        Cause(
            "chance",
            "two undisturbed runs differ, so there is nothing that a resume could bring back; neither pid, time, "
            "seeds, threads nor torch's kernels explain it",
            "look at what this part reads from outside: files, the network, other processes, a kernel of your own",
        ),
        Cause(
            "attempts",
            "training depends on how often the run was started: nothing was resumed, and it differs all the same",
            "do not count starts, and do not read the run's own directory, in what is trained",
        ),
        Cause(
            "evaluation",
            "evaluation leaves a trace in training: without it a resumed run is equal",
            "give evaluation generators and attributes of its own, or put what it changes into a state_dict",
        ),
        Cause(
            "incomplete",
            "nothing differs, but not enough was done to prove anything",
            "look at what the attempts printed, and try again with more verify.steps or memory",
        ),
    )
}


def of_process(found: Difference) -> Cause:
    """Another number of data workers makes another result, although nothing was killed."""
    if _of_data(found.moving):  # each worker has a memory of its own
        return _data(found)
    return Cause(
        "workers",
        f"the data depends on the process that reads it: another number of workers gives another {found.part}",
        "make a sample depend on its index and on the global generators alone: no worker number, no pid",
    )


def of_part(found: Difference) -> Cause:
    """What a difference after a resume says of the part that differs first."""
    if found.restored:
        part = found.part
        return Cause(
            "restoring",
            f"{part} does not get back what it saved: {found.where} differs right after loading",
            f"make load_state_dict of {part} take over everything that its state_dict gives",
        )
    return _BY_PART.get(found.part, _other)(found)


def has_callbacks(found: Difference) -> bool:
    """Whether a callback of the user's remembers something that it did not get back."""
    return bool(_suspects(found, "callbacks."))


def of_callbacks(found: Difference) -> Cause:
    """Without the user's callbacks a resumed run is equal."""
    return Cause(
        "callback memory",
        f"a callback has a memory that is not saved{_who(found, 'callbacks.')}",
        f"for the callback: {_STATEFUL}",
    )


def _order(found: Difference) -> Cause:
    return Cause(
        "data order",
        f"the samples come in another order after a resume{_who(found, 'data.train')}",
        "an iterable must have its whole position in its state_dict; a map-style data set needs none",
    )


def _data(found: Difference) -> Cause:
    moving = _of_data(found.moving) or _of_data(found.remembered)
    told = "; ".join(f"{path} was {was or 'absent'}, then {now or 'absent'}" for path, was, now in moving[:3])
    if any(_is_generator(entry) for entry in moving):
        return Cause("hidden generator", f"the data set draws from a generator of its own: {told}", _SEEDED)
    return Cause(
        "data memory",
        f"the data set changes while training, and a new process begins anew{f': {told}' if told else ''}",
        "make a sample depend on its index and on the global generators alone; a curriculum belongs into the task, "
        "whose state is saved",
    )


def _of_data(entries: Sequence[Remembered]) -> list[Remembered]:
    """What data sets remember; generators first."""
    return sorted((entry for entry in entries if entry[0].startswith("data.")), key=lambda e: not _is_generator(e))


def _is_generator(entry: Remembered) -> bool:
    return "in state" in (entry[1] or "")


def _generators(found: Difference) -> Cause:
    return Cause(
        "generators",
        f"the global generators stand elsewhere: {found.where}. Something draws or seeds them after they were restored",
        "do not seed or draw in what is called first after a resume (dropout and noise come from these generators)",
    )


def _scheduler(found: Difference) -> Cause:
    return Cause(
        "scheduler memory",
        f"the scheduler goes on with another rate: it remembers something that its state_dict lacks"
        f"{_who(found, 'scheduler')}",
        f"for the scheduler: {_STATEFUL}",
    )


def _forward(found: Difference) -> Cause:
    model, task = _suspects(found, "model"), _suspects(found, "task")
    buffer = next((entry for entry in model if "persistent=False" in entry[0]), None)
    if buffer:
        return Cause(
            "model memory",
            f"a buffer of the model that training changes is not saved: {_told(buffer)}",
            "register it with persistent=True",
        )
    if model:
        return Cause(
            "model memory",
            f"an attribute of the model matters and is not saved{_who(found, 'model')}",
            "register_buffer it, so that it is in the model's state_dict",
        )
    if task:
        what = f"the task has a memory that is not saved{_who(found, 'task')}"
        return Cause("task memory", what, f"for the task: {_STATEFUL}")
    return _other(found)


def _optimizer(found: Difference) -> Cause:
    return Cause(
        "optimizer memory",
        f"the same gradients move the weights elsewhere: the optimizer remembers something that its state_dict lacks"
        f"{_who(found, 'optimizer')}",
        "keep it in optimizer.state or param_groups, or add it in state_dict and load_state_dict",
    )


def _other(found: Difference) -> Cause:
    return Cause(
        "memory",
        f"{found.part} differs although all before it is equal: something remembers beside the state{_who(found, '')}",
        f"for what remembers: {_STATEFUL}",
    )


_BY_PART = {
    "data order": _order,
    "augmentation": _data,
    "generators": _generators,
    "scheduler": _scheduler,
    "loss": _forward,
    "gradients": _forward,
    "model": _optimizer,
    "optimizer": _optimizer,
    "evaluation": _forward,
}


def _suspects(found: Difference, prefix: str) -> list[Remembered]:
    """What was remembered and is not any more; first what training changes."""
    among = [entry for entry in found.remembered if entry[0].startswith(prefix)]
    return sorted(among, key=lambda entry: entry[0] not in {path for path, _, _ in found.moving})


def _who(found: Difference, prefix: str) -> str:
    """Whoever may have forgotten, and what."""
    told = "; ".join(map(_told, _suspects(found, prefix)[:3]))
    return f": {told}" if told else ""


def _told(entry: Remembered) -> str:
    path, was, now = entry
    return f"{path} was {was or 'absent'} and is {now or 'absent'} after loading"


def of_refusal(said: str, moved: str) -> Cause:
    """A life that ended with an error: the runner's own say what to do, and some of torch's are known. ``moved`` is
    what was seen to change in the data set.
    """
    for word, kind, what, remedy in _REFUSALS:
        if word in said:
            if kind == "data memory" and "in state" in moved:
                kind, what = "hidden generator", "the data set draws from a generator of its own"
            return Cause(kind, f"{what}{f': {moved}' if moved else ''} (refused by the runner, above)", remedy)
    return Cause("error", "an attempt ended with an error; above is what it said", "mend that first", sure=False)


_REFUSALS = (
    ("does not have a deterministic implementation", "kernel", CAUSES["kernel"].what, "use another kernel"),
    ("when it is drawn again with the same seed", "data memory", "a sample is another one every time", _SEEDED),
    (
        "in a data worker than in this process",
        "workers",
        "a sample depends on the process that reads it",
        "make it depend on its index alone",
    ),
    (
        "draws random numbers, and data.randomness=off",
        "randomness",
        "the data set draws random numbers that nobody seeds",
        "use data.randomness=sample",
    ),
    (
        "is done again and has other samples",
        "data order",
        "the samples come in another order after a resume",
        "the order must follow from the position",
    ),
    (
        "the data is not what this run began with",
        "data memory",
        "the samples are others in another process",
        "make a sample depend on its index and on the global generators alone",
    ),
    ("cannot save", "state", "something in a state_dict cannot be saved", "keep plain values and tensors in it"),
    (
        "does not fit what step",
        "restoring",
        "a part cannot load what it saved",
        "load_state_dict must take what state_dict gives",
    ),
)

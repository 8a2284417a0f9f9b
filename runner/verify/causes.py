"""What makes runs differ, in words: the likely cause of a first difference, and what to do about it.

What is behind an attempt that ended with an error, as far as its words tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from runner.verify import memory
from runner.verify.difference import FirstDifference, Remembered

_STATEFUL = "give it state_dict and load_state_dict; both are then saved and restored with the model"
SEEDED = "draw from python's, numpy's or torch's global generators, which are seeded for every sample"


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
        Cause("time", "the time is used in training", "count steps instead of seconds; the runner has metrics of time"),
        Cause(
            "entropy",
            "a generator is seeded by the system: default_rng(), random.Random() or os.urandom without a seed",
            f"{SEEDED}, or seed it from the configuration and save its state",
        ),
        Cause(
            "threads",
            "the result depends on how threads take turns",
            "runtime.num_threads=1, or a kernel whose sums have one order",
        ),
        Cause(
            "turns",
            "two undisturbed runs differ: your code starts threads, and the result depends on which is done first",
            "use what threads give in the order in which they were started (executor.map), not as it arrives",
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
            "look at what this part reads from outside: files, the network, other processes, id() of an object, a "
            "kernel of your own",
        ),
        Cause(
            "attempts",
            "training depends on how often the run was started: nothing was resumed, and it differs all the same",
            "do not count starts, and do not read the run's own directory, in what is trained",
        ),
        Cause(
            "saving",
            "it depends on how often the state is taken: a state_dict changes something",
            "let every state_dict only look: no numbers drawn, nothing emptied, no weights swapped for the moment",
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


def of_chance(found: FirstDifference) -> Cause:
    """Nothing that can be held fast explains why two undisturbed runs differ."""
    return CAUSES["entropy" if any(map(_is_generator, found.remembered)) else "chance"]


def of_process(found: FirstDifference) -> Cause:
    """Another number of data workers makes another result, although nothing was killed."""
    if _of_data(found.moving):  # each worker has a memory of its own
        return _data(found)
    return Cause(
        "workers",
        f"the data depends on the process that reads it: another number of workers gives another {found.part}",
        "make a sample depend on its index and on the global generators alone: no worker number, no pid",
    )


def of_part(found: FirstDifference) -> Cause:
    """What a difference after a resume says of the part that differs first."""
    if found.restored:
        part = found.part
        return Cause(
            "restoring",
            f"{part} does not get back what it saved: {found.where} differs right after loading",
            f"make load_state_dict of {part} take over everything that its state_dict gives",
        )
    return _BY_PART.get(found.part, _other)(found)


def has_callbacks(found: FirstDifference) -> bool:
    """Whether a callback of the user's remembers something that it did not get back."""
    return bool(_suspects(found, "callbacks."))


def of_callbacks(found: FirstDifference) -> Cause:
    """Without the user's callbacks a resumed run is equal."""
    return Cause(
        "callback memory",
        f"a callback has a memory that is not saved{_who(found, 'callbacks.')}",
        f"for the callback: {_STATEFUL}",
    )


def _order(found: FirstDifference) -> Cause:
    return Cause(
        "data order",
        f"the samples come in another order after a resume{_who(found, 'data.train')}",
        "an iterable must have its whole position in its state_dict; a map-style data set needs none",
    )


def _data(found: FirstDifference) -> Cause:
    moving = _of_data(found.moving) or _of_data(found.remembered)
    told = "; ".join(f"{path} was {was or 'absent'}, then {now or 'absent'}" for path, was, now in moving[:3])
    if any(_is_generator(entry) for entry in moving):
        return Cause("hidden generator", f"the data set draws from a generator of its own: {told}", SEEDED)
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


def _generators(found: FirstDifference) -> Cause:
    return Cause(
        "generators",
        f"the global generators stand elsewhere: {found.where}. Something draws or seeds them after they were restored",
        "do not seed or draw in what is called first after a resume (dropout and noise come from these generators)",
    )


def _scheduler(found: FirstDifference) -> Cause:
    if not _suspects(found, "scheduler") and _culprits(found):
        return _forward(found)
    return Cause(
        "scheduler memory",
        f"the scheduler goes on with another rate: it remembers something that its state_dict lacks"
        f"{_who(found, 'scheduler')}",
        f"for the scheduler: {_STATEFUL}",
    )


def _optimizer(found: FirstDifference) -> Cause:
    if not _suspects(found, "optimizer") and _culprits(found):
        return _forward(found)
    return Cause(
        "optimizer memory",
        f"the same gradients move the weights elsewhere: the optimizer remembers something that its state_dict lacks"
        f"{_who(found, 'optimizer')}",
        "keep it in optimizer.state or param_groups, or add it in state_dict and load_state_dict",
    )


def _forward(found: FirstDifference) -> Cause:
    """The likeliest of those that remember, and whoever else does."""
    culprits = _culprits(found)
    if not culprits:
        return _other(found)
    (cause, entries), *others = culprits
    what = f"{cause.what}: {'; '.join(map(_told, entries[:3]))}"
    other = "; ".join(_told(entry) for _, more in others for entry in more[:1])
    return replace(cause, what=f"{what}. Or it is this: {other}" if other else what)


def _culprits(found: FirstDifference) -> list[tuple[Cause, list[Remembered]]]:
    """What may have been forgotten where a step is computed, the likeliest first."""
    named = [(cause, [entry for entry in _suspects(found, "model") if mark in entry[0]]) for mark, cause in _OF_MODEL]
    marked = {entry for _, entries in named for entry in entries}
    plain = [entry for entry in _suspects(found, "model") if entry not in marked]
    changed = {path for path, _, _ in found.moving}
    process = [entry for entry in _suspects(found, memory.PROCESS) if entry[0] in changed]
    every = [*named[:3], (_ATTRIBUTE, plain), (_TASK, _suspects(found, "task")), *named[3:], (_PROCESS, process)]
    return [(cause, entries) for cause, entries in every if entries]


_ANEW = "set it in every step, from a count that the task's state_dict has, and not only once"
_OF_MODEL = (
    (
        memory.LEFT_OUT,
        Cause(
            "model memory",
            "a parameter of the model is not in its state_dict",
            "have the model's state_dict give all that it trains",
        ),
    ),
    (
        memory.LOOSE,
        Cause(
            "model memory",
            "a buffer of the model that training changes is not saved",
            "register it with persistent=True",
        ),
    ),
    (
        memory.HOOKS,
        Cause(
            "hooks",
            "a hook is registered while training, and a new process begins without it",
            "register it where the model is built, and have it ask a buffer of the model whether it acts",
        ),
    ),
    (memory.FROZEN, Cause("freezing", "which parameters are trained is in no state_dict, and is changed", _ANEW)),
    (memory.RESTING, Cause("freezing", "which modules are in eval mode is in no state_dict, and is changed", _ANEW)),
    (
        memory.GRADIENTS,
        Cause(
            "gradients",
            "gradients are kept from one step to the next, and are in no state_dict",
            "accumulate them within one step: trainer.accumulate, or several backward() before each update.step",
        ),
    ),
)
_ATTRIBUTE = Cause(
    "model memory",
    "an attribute of the model matters and is not saved",
    "register_buffer it, so that it is in the model's state_dict",
)
_TASK = Cause("task memory", "the task has a memory that is not saved", f"for the task: {_STATEFUL}")
_PROCESS = Cause("process", "training changes what holds for the whole process, and a new one begins without", _ANEW)


def _other(found: FirstDifference) -> Cause:
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
    "metrics": _forward,
    "task": _forward,
    "gradients": _forward,
    "model": _optimizer,
    "optimizer": _optimizer,
    "evaluation": _forward,
}


def _suspects(found: FirstDifference, prefix: str) -> list[Remembered]:
    """What was remembered and is not any more; first what training changes."""
    among = [entry for entry in found.remembered if entry[0].startswith(prefix)]
    return sorted(among, key=lambda entry: entry[0] not in {path for path, _, _ in found.moving})


def _who(found: FirstDifference, prefix: str) -> str:
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
    ("when it is drawn again with the same seed", "data memory", "a sample is another one every time", SEEDED),
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

"""The causes of differences and errors, in words, with remedies; and the likely cause of a first difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from runner.verify import fingerprint, memory
from runner.verify.difference import FirstDifference, Remembered

_STATEFUL = "give it state_dict and load_state_dict; both are then saved and restored with the model"
_SEEDED = "draw from python's, numpy's or torch's global generators, which are seeded for every sample"
_REPLACE = (
    "let load_state_dict replace what the object has: the runner also calls it to take back what an interrupted "
    "evaluation changed"
)
_EVERY_STEP = "set it in every step, from a count in the task's state_dict, and not only once"


@dataclass(frozen=True, slots=True)
class Cause:
    """A ``kind`` for programs; ``what`` and ``remedy`` for people; whether repetitions made it ``sure``."""

    kind: str
    what: str
    remedy: str
    sure: bool = True

    def seen_in(self, part: str, names: str = "") -> "Cause":
        """The same cause, with the part in which it shows first."""
        return replace(self, what=f"{self.what}. It shows in: {part}{f' ({names})' if names else ''}")


# Causes that repetitions of the run establish: kind -> what, remedy.
_TEXTS = {
    "hash": (
        "hash() of a text or the order of a set is used in training: both differ from process to process",
        "sort a set before its elements are used, and use hashlib or zlib.crc32 instead of hash()",
    ),
    "pid": (
        "the number of the process (os.getpid) is used in training",
        "use the configuration's seed instead of the pid",
    ),
    "time": (
        "the time is used in training: seconds, an hour, a date",
        "count steps instead of seconds; take a date from the configuration; the runner has metrics of time",
    ),
    "entropy": (
        "a generator is seeded by the system: default_rng(), random.Random() or os.urandom without a seed",
        f"{_SEEDED}, or seed it from the configuration and save its state",
    ),
    "threads": (
        "the result depends on how threads take turns",
        "runtime.num_threads=1, or a kernel that adds up in a fixed order",
    ),
    "turns": (
        "two undisturbed runs differ: your code starts threads, and the result depends on which ends first",
        "use the results of threads in the order in which they were started (executor.map), not as they arrive",
    ),
    "kernel": (
        "a kernel is used whose result varies from call to call",
        "runtime.deterministic=true refuses such kernels by name; use another",
    ),
    "chance": (
        "two undisturbed runs differ, for another reason than the pid, time, seeds, threads or torch's kernels",
        "look for other inputs of this part: files, network, other processes, id() of an object, your own kernels",
    ),
    "attempts": (
        "training depends on how often the run was started: nothing was resumed, and still it differs",
        "do not count starts, and do not read the run's own directory, in training",
    ),
    "saving": (
        "the run depends on how often its state is taken: a state_dict changes something",
        "let every state_dict only look: no numbers drawn, nothing emptied, no weights swapped in the meantime",
    ),
    "evaluation": (
        "evaluation leaves a trace in training: without it a resumed run is equal",
        "give evaluation generators and attributes of its own, or put what it changes into a state_dict",
    ),
    "stopping": (
        "a stop by SIGTERM leaves a trace: after SIGKILL a resumed run is equal",
        f"{_REPLACE}; and act on no signal yourself",
    ),
    "incomplete": (
        "nothing differs, but not enough was done to prove anything",
        "read the output of the attempts, and try again with more verify.steps or memory",
    ),
}
CAUSES: Mapping[str, Cause] = {kind: Cause(kind, what, remedy) for kind, (what, remedy) in _TEXTS.items()}


def unexplained(difference: FirstDifference) -> Cause:
    """The cause of a difference between undisturbed runs that no pin takes away."""
    return CAUSES["entropy" if any(map(_is_generator, difference.remembered)) else "chance"]


def of_workers(difference: FirstDifference) -> Cause:
    """The cause of a difference between undisturbed runs with different numbers of data workers."""
    if _of_data(difference.changing):  # each worker has a memory of its own
        return _data(difference)
    return Cause(
        "workers",
        f"the data depends on the process that reads it: another number of workers gives another {difference.part}",
        "make a sample depend on its index and on the global generators alone: no worker number, no pid",
    )


def of_part(difference: FirstDifference) -> Cause:
    """The likely cause of a difference after a resume, by the part that differs first."""
    part = difference.part
    if difference.restored:
        return Cause(
            "restoring",
            f"{part} does not get back what it saved: {difference.path} differs right after loading",
            f"make load_state_dict of {part} take over everything that its state_dict gives",
        )
    match part:
        case "data order":
            return Cause(
                "data order",
                f"the samples come in another order after a resume{_entries(difference, 'data.train')}",
                "an iterable must have its whole position in its state_dict; a map-style data set needs none",
            )
        case "augmentation":
            return _data(difference)
        case "generators":
            return Cause(
                "generators",
                f"the global generators are in another state: {difference.path}. Something draws from them or seeds "
                "them after they were restored",
                "do not seed or draw in code that is called first after a resume (dropout and noise use them)",
            )
        case "scheduler" if _suspects(difference, "scheduler") or not _culprits(difference):
            return Cause(
                "scheduler memory",
                "the scheduler goes on with another rate: it remembers something that its state_dict lacks"
                f"{_entries(difference, 'scheduler')}",
                f"for the scheduler: {_STATEFUL}",
            )
        case "model" | "optimizer" if _suspects(difference, "optimizer") or not _culprits(difference):
            return Cause(
                "optimizer memory",
                "the same gradients change the weights differently: the optimizer remembers something that its "
                f"state_dict lacks{_entries(difference, 'optimizer')}",
                "keep it in optimizer.state or param_groups, or add it in state_dict and load_state_dict",
            )
        case "scheduler" | "model" | "optimizer" | "loss" | "metrics" | "task" | "gradients" | "evaluation":
            return _memory(difference)
    return _any_memory(difference)


def has_callbacks(difference: FirstDifference) -> bool:
    """Whether a callback of the user remembers something that was gone after loading."""
    return bool(_suspects(difference, "callbacks."))


def of_callbacks(difference: FirstDifference) -> Cause:
    """The cause where a resumed run is equal without the user's callbacks."""
    what = f"a callback has a memory that is not saved{_entries(difference, 'callbacks.')}"
    return Cause("callback memory", what, f"for the callback: {_STATEFUL}")


def _data(difference: FirstDifference) -> Cause:
    entries = _of_data(difference.changing) or _of_data(difference.remembered)
    text = "; ".join(f"{path} was {was or 'absent'}, then {now or 'absent'}" for path, was, now in entries[:3])
    if any(map(_is_generator, entries)):
        return Cause("hidden generator", f"the data set draws from a generator of its own: {text}", _SEEDED)
    return Cause(
        "data memory",
        f"the data set changes while training, and a new process begins without it{f': {text}' if text else ''}",
        "make a sample depend on its index and on the global generators alone; a curriculum belongs into the task, "
        "whose state is saved",
    )


def _of_data(entries: Sequence[Remembered]) -> list[Remembered]:
    """The memory of data sets; generators first."""
    return sorted((entry for entry in entries if entry[0].startswith("data.")), key=lambda e: not _is_generator(e))


def _is_generator(entry: Remembered) -> bool:
    return fingerprint.IN_STATE in (entry[1] or "")


def _memory(difference: FirstDifference) -> Cause:
    """The likeliest of the memories outside the state, and the others as a second guess."""
    culprits = _culprits(difference)
    if not culprits:
        return _any_memory(difference)
    (cause, entries), *others = culprits
    what = f"{cause.what}: {'; '.join(map(_described, entries[:3]))}"
    other = "; ".join(_described(entry) for _, more in others for entry in more[:1])
    return replace(cause, what=f"{what}. Or it is this: {other}" if other else what)


def _any_memory(difference: FirstDifference) -> Cause:
    what = f"{difference.part} differs although all before it is equal: something remembers outside the state"
    return Cause("memory", f"{what}{_entries(difference, '')}", f"for the object that remembers: {_STATEFUL}")


def _culprits(difference: FirstDifference) -> list[tuple[Cause, list[Remembered]]]:
    """Memory outside the state that may change a step, by cause, the likeliest first."""
    of_model = _suspects(difference, "model")
    named = [(cause, [entry for entry in of_model if mark in entry[0]]) for mark, cause in _OF_MODEL.items()]
    marked = {entry for _, entries in named for entry in entries}
    attributes = [entry for entry in of_model if entry not in marked]
    changed = {path for path, _, _ in difference.changing}
    process = [entry for entry in _suspects(difference, memory.PROCESS) if entry[0] in changed]
    task = _suspects(difference, "task")
    culprits = [*named[:3], (_ATTRIBUTE, attributes), (_TASK, task), *named[3:], (_PROCESS, process)]
    return [(cause, entries) for cause, entries in culprits if entries]


# How ``memory`` marks what a model has beside its state, and the cause that it is; the first three are the likeliest.
_OF_MODEL = {
    memory.LEFT_OUT: Cause(
        "model memory",
        "a parameter of the model is not in its state_dict",
        "make the model's state_dict contain all parameters that are trained",
    ),
    memory.NOT_PERSISTENT: Cause(
        "model memory",
        "a buffer of the model that training changes is not saved",
        "register it with persistent=True",
    ),
    memory.HOOKS: Cause(
        "hooks",
        "a hook is registered while training, and a new process begins without it",
        "register it where the model is built, and let a buffer of the model decide whether it acts",
    ),
    memory.FROZEN: Cause(
        "freezing", "training changes which parameters are trained, and no state_dict has that", _EVERY_STEP
    ),
    memory.EVALUATING: Cause(
        "freezing", "training changes which modules are in eval mode, and no state_dict has that", _EVERY_STEP
    ),
    memory.GRADIENTS: Cause(
        "gradients",
        "gradients are kept from one step to the next, and are in no state_dict",
        "accumulate them within one step: trainer.accumulate, or several backward() before each update.step",
    ),
}
_ATTRIBUTE = Cause(
    "model memory",
    "an attribute of the model matters and is not saved",
    "register_buffer it, so that it is in the model's state_dict",
)
_TASK = Cause("task memory", "the task has a memory that is not saved", f"for the task: {_STATEFUL}")
_PROCESS = Cause(
    "process", "training changes a setting of the whole process, and a new one begins without", _EVERY_STEP
)


def _suspects(difference: FirstDifference, prefix: str) -> list[Remembered]:
    """Memory that was gone after loading; first the memory that training changes."""
    entries = [entry for entry in difference.remembered if entry[0].startswith(prefix)]
    return sorted(entries, key=lambda entry: entry[0] not in {path for path, _, _ in difference.changing})


def _entries(difference: FirstDifference, prefix: str) -> str:
    text = "; ".join(map(_described, _suspects(difference, prefix)[:3]))
    return f": {text}" if text else ""


def _described(entry: Remembered) -> str:
    path, was, now = entry
    return f"{path} was {was or 'absent'} and is {now or 'absent'} after loading"


def of_error(kind: str, changes: str) -> Cause:
    """The cause of an error, by its kind. ``changes`` is what was seen to change in the data set."""
    if kind not in _OF_ERRORS:
        return Cause("error", "an attempt ended with the error above", "mend that first", sure=False)
    cause = _OF_ERRORS[kind]
    if cause.kind == "data memory" and fingerprint.IN_STATE in changes:
        cause = replace(cause, kind="hidden generator", what="the data set draws from a generator of its own")
    return replace(cause, what=f"{cause.what}{f': {changes}' if changes else ''} (refused by the runner, above)")


_OF_ERRORS = {
    "time-limit": Cause(
        "hang",
        "an attempt does not come to its end, which may be of your code or of a machine that was busy",
        "look at the places above: at locks and waits without a limit, at files and processes of an earlier attempt",
        sure=False,
    ),
    "kernel": Cause("kernel", CAUSES["kernel"].what, "use another kernel"),
    "sample-changed": Cause("data memory", "a sample changes every time it is drawn", _SEEDED),
    "sample-per-process": Cause(
        "workers", "a sample depends on the process that reads it", "make it depend on its index alone"
    ),
    "randomness-off": Cause(
        "randomness", "the data set draws random numbers that nobody seeds", "use data.randomness=sample"
    ),
    "order-changed": Cause(
        "data order", "the samples come in another order after a resume", "the order must follow from the position"
    ),
    "data-changed": Cause(
        "data memory",
        "the samples differ in another process",
        "make a sample depend on its index and on the global generators alone",
    ),
    "state": Cause("state", "something in a state_dict cannot be saved", "keep plain values and tensors in it"),
    "restore": Cause(
        "restoring", "a part cannot load what it saved", "load_state_dict must take what state_dict gives"
    ),
}

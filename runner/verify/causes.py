"""The causes of differences and errors, in words, with remedies; and the likely cause of a first difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from runner.verify import fingerprint, memory
from runner.verify.difference import FirstDifference, Remembered, in_words


@dataclass(frozen=True, slots=True)
class Cause:
    """A ``kind`` for programs; ``description`` and ``remedy`` for people; whether repetitions made it ``sure``; and
    ``where`` it is in the user's code, as ``file:line``, if anywhere.
    """

    kind: str
    description: str
    remedy: str
    sure: bool = True
    where: str = ""

    def seen_in(self, part: str, names: str = "") -> "Cause":
        """The same cause, with the part in which it shows first."""
        return replace(self, description=f"{self.description}. It shows in: {part}{f' ({names})' if names else ''}")

    def reaching(self, reached: Mapping[str, str]) -> "Cause":
        """The same cause, with what the user's code reaches outside of the process: ``what -> file:line``."""
        if not reached:
            return self
        named = "; ".join(f"{thing} ({place})" for thing, place in [*reached.items()][:3])
        more = f"; and {len(reached) - 3} more" if len(reached) > 3 else ""
        return replace(
            self, description=f"{self.description}. Your code reaches {named}{more}", where=next(iter(reached.values()))
        )

    def with_memory(self, words: str) -> "Cause":
        """The same cause, with the memory that shows it."""
        return replace(self, description=f"{self.description}: {words}") if words else self


_STATEFUL = "give it state_dict and load_state_dict; both are then saved and restored with the model"
_SEEDED = "draw from python's, numpy's or torch's global generators, which are seeded for every sample"
_BY_INDEX = "make a sample depend on its index and on the global generators alone"
_EVERY_STEP = "set it in every step, from a count in the task's state_dict, and not only once"
_KERNEL = "a kernel is used whose result varies from call to call"
_HIDDEN = "the data set draws from a generator of its own"
_OTHER_ORDER = "the samples come in another order after a resume"

# Causes that repetitions of the run establish.
CAUSES: Mapping[str, Cause] = {
    cause.kind: cause
    for cause in (
        Cause(
            "hash",
            "hash() of a text or the order of a set is used in training: both differ from process to process",
            "sort a set before its elements are used, and use hashlib or zlib.crc32 instead of hash()",
        ),
        Cause(
            "pid",
            "the number of the process (os.getpid) is used in training",
            "use the configuration's seed instead of the pid",
        ),
        Cause(
            "time",
            "the time is used in training: seconds, an hour, a date",
            "count steps instead of seconds; take a date from the configuration; the runner has metrics of time",
        ),
        Cause(
            "entropy",
            "a generator is seeded by the system: default_rng(), random.Random() or os.urandom without a seed",
            f"{_SEEDED}, or seed it from the configuration and save its state",
        ),
        Cause(
            "threads",
            "the result depends on how threads take turns",
            "runtime.num_threads=1, or a kernel that adds up in a fixed order",
        ),
        Cause(
            "turns",
            "two undisturbed runs differ: your code starts threads, and the result depends on which ends first",
            "use the results of threads in the order in which they were started (executor.map), not as they arrive",
        ),
        Cause("kernel", _KERNEL, "runtime.deterministic=true refuses such kernels by name; use another"),
        Cause(
            "chance",
            "two undisturbed runs differ, for another reason than the pid, time, seeds, threads or torch's kernels",
            "look for other inputs of this part: files, network, other processes, id() of an object, your own kernels",
        ),
        Cause(
            "length",
            "training depends on the number of steps of the whole run: a longer run differs in the same steps",
            "do not read the limit of steps in training, or let the configuration fix it",
        ),
        Cause(
            "attempts",
            "training depends on how often the run was started: nothing was resumed, and still it differs",
            "do not count starts, and do not read the run's own directory, in training",
        ),
        Cause(
            "saving",
            "the run depends on how often its state is taken: a state_dict changes something",
            "let every state_dict only look: no numbers drawn, nothing emptied, no weights swapped in the meantime",
        ),
        Cause(
            "evaluation",
            "evaluation leaves a trace in training: without it a resumed run is equal",
            "give evaluation generators and attributes of its own, or put what it changes into a state_dict",
        ),
        Cause(
            "stopping",
            "a stop by SIGTERM leaves a trace: after SIGKILL a resumed run is equal",
            "let load_state_dict replace what the object has: the runner also calls it to take back what an "
            "interrupted evaluation changed; and act on no signal yourself",
        ),
        Cause(
            "incomplete",
            "nothing differs, but not enough was done to prove anything",
            "read the output of the attempts, and try again with more verify.steps or memory",
        ),
    )
}


def unexplained(difference: FirstDifference) -> Cause:
    """The cause of a difference between undisturbed runs that no pin takes away."""
    return CAUSES["entropy" if any(_is_generator(was) for _, was, _ in difference.remembered) else "chance"]


def of_workers(difference: FirstDifference) -> Cause:
    """The cause of a difference between undisturbed runs with different numbers of data workers."""
    entries = [entry for entry in difference.changing if entry[0].startswith("data.")]
    if not entries:
        return Cause(
            "workers",
            f"the data depends on the process that reads it: another number of workers gives another {difference.part}",
            "make a sample depend on its index and on the global generators alone: no worker number, no pid",
        )
    entries.sort(key=lambda entry: not _is_generator(entry[1]))  # each worker has a memory of its own
    return _more_exact(_DATA, *entries[0][:2]).with_memory(in_words(entries, ", then {}"))


def of_part(difference: FirstDifference) -> Cause:
    """The cause of a difference after a resume by the part that differs first, where no memory could be convicted."""
    part = difference.part
    if difference.restored:
        return Cause(
            "restoring",
            f"{part} does not get back what it saved: {difference.path} differs right after loading",
            f"make load_state_dict of {part} take over everything that its state_dict gives",
        )
    match part:
        case "data order":
            remedy = "an iterable must have its whole position in its state_dict; a map-style data set needs none"
            return Cause("data order", _OTHER_ORDER, remedy)
        case "generators":
            return Cause(
                "generators",
                f"the global generators are in another state: {difference.path}. Something draws from them or seeds "
                "them after they were restored",
                "do not seed or draw in code that is called first after a resume (dropout and noise use them)",
            )
        case "augmentation":
            return replace(_DATA, sure=False)
        case "scheduler":
            return replace(_SCHEDULER, sure=False)
        case "model" | "optimizer":
            return replace(_OPTIMIZER, sure=False)
    what = f"{part} differs although all before it is equal: something remembers outside the state"
    return Cause("memory", what, f"for the object that remembers: {_STATEFUL}", sure=False)


def of_memory(entries: Sequence[Remembered], *, sure: bool = True) -> Cause:
    """The cause that lost memory is. ``sure``: putting it into a resumed process made the difference go away."""
    path, was, _ = entries[0]
    cause = next((cause for mark, cause in _MARKED.items() if mark in path), None)
    if cause is None:
        cause = next((cause for root, cause in _ROOTS.items() if path.startswith(root)), _TASK)
        cause = _more_exact(cause, path, was)
    return replace(cause.with_memory(in_words(entries)), sure=sure)


def _more_exact(cause: Cause, path: str, was: str | None) -> Cause:
    """The same cause with a remedy for what the memory is."""
    was = was or ""
    root, module, inside = path.partition(" (")
    if cause is _DATA:
        return (
            replace(cause, kind="hidden generator", description=_HIDDEN, remedy=_SEEDED)
            if _is_generator(was)
            else cause
        )
    remedy = cause.remedy
    if was.startswith("the function ") and " (its " not in path:
        text = f"{cause.description}; it is a function that training exchanges"
        return replace(cause, description=text, remedy="exchange it where it is built")
    if module and not inside.startswith("its "):
        remedy = f"keep it in an attribute of the {root}, not of a class or a module: {cause.remedy}"
    elif cause is _MODEL and _is_generator(was):
        remedy = "save its get_state() in the module's get_extra_state, and restore it in set_extra_state"
    elif cause is _MODEL and "]." in path and was.startswith("torch."):
        remedy = "put modules into a ModuleList or a ModuleDict, not into a plain list or dict"
    return replace(cause, remedy=remedy)


def _is_generator(words: str | None) -> bool:
    return fingerprint.IN_STATE in (words or "")


_DATA = Cause(
    "data memory",
    "the data set changes while training, and a new process begins without it",
    f"{_BY_INDEX}; a curriculum belongs into the task, whose state is saved",
)
_OPTIMIZER = Cause(
    "optimizer memory",
    "the same gradients change the weights differently: the optimizer remembers something that its state_dict lacks",
    "keep it in optimizer.state or param_groups, or add it in state_dict and load_state_dict",
)
_SCHEDULER = Cause(
    "scheduler memory",
    "the scheduler continues with another rate: it remembers something that its state_dict lacks",
    f"for the scheduler: {_STATEFUL}",
)
_MODEL = Cause(
    "model memory",
    "an attribute of the model matters and is not saved",
    "register_buffer it, so that it is in the model's state_dict",
)
_TASK = Cause("task memory", "the task has a memory that is not saved", f"for the task: {_STATEFUL}")
_CALLBACK = Cause("callback memory", "a callback has a memory that is not saved", f"for the callback: {_STATEFUL}")
_PROCESS = Cause(
    "process", "training changes a setting of the whole process, and a new one begins without", _EVERY_STEP
)
_ROOTS = {
    "data.": _DATA,
    "optimizer": _OPTIMIZER,
    "scheduler": _SCHEDULER,
    "model": _MODEL,
    "callbacks.": _CALLBACK,
    memory.PROCESS: _PROCESS,
}
# How ``memory`` marks what a model has beside its attributes, and the cause that it is.
_MARKED = {
    memory.LEFT_OUT: Cause(
        "model memory",
        "a parameter of the model is not in its state_dict",
        "make the model's state_dict contain all parameters that are trained",
    ),
    memory.NOT_PERSISTENT: Cause(
        "model memory", "a buffer of the model that training changes is not saved", "register it with persistent=True"
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
    memory.TIED: Cause(
        "tying",
        "training makes one parameter of several, or several of one, and no state_dict has that",
        "tie weights where the model is built",
    ),
    memory.GRADIENTS: Cause(
        "gradients",
        "gradients are kept from one step to the next, and are in no state_dict",
        "accumulate them within one step: trainer.accumulate, or several backward() before each update.step",
    ),
}


def of_structure(changes: Sequence[tuple[int, str, str]]) -> Cause:
    """The cause that training changes which parameters or groups there are: step, path, and how, of each."""
    text = "; ".join(f"{path} {how} in step {step}" for step, path, how in changes[:3])
    return Cause(
        "structure",
        f"training changes the structure of the state, into which a new process cannot load it: {text}",
        "build all layers and param groups, and tie weights, where the model is built; let a buffer, a rate of 0 or "
        "requires_grad decide when each is used",
    )


def of_error(kind: str, changed: str) -> Cause:
    """The cause of an error, by its kind. ``changed`` is memory of the data set that was seen to change."""
    cause = _OF_ERRORS.get(kind)
    if cause is None:
        return Cause("error", "an attempt ended with the error above", "fix that first", sure=False)
    if cause.kind == "data memory" and _is_generator(changed):
        cause = replace(cause, kind="hidden generator", description=_HIDDEN)
    cause = cause.with_memory(changed)
    return replace(cause, description=f"{cause.description} (refused by the runner, above)")


_OF_ERRORS = {
    "time-limit": Cause(
        "hang",
        "an attempt does not come to its end, which may be of your code or of a machine that was busy",
        "look at the places above: at locks and waits without a limit, at files and processes of an earlier attempt",
        sure=False,
    ),
    "kernel": Cause("kernel", _KERNEL, "use another kernel"),
    "sample-changed": Cause("data memory", "a sample changes every time it is drawn", _SEEDED),
    "sample-per-process": Cause(
        "workers", "a sample depends on the process that reads it", "make it depend on its index alone"
    ),
    "randomness-off": Cause(
        "randomness", "the data set draws random numbers that nobody seeds", "use data.randomness=sample"
    ),
    "order-changed": Cause("data order", _OTHER_ORDER, "the order must follow from the position"),
    "rollouts-changed": Cause("task memory", "the task has a memory that is not saved", f"for the task: {_STATEFUL}"),
    "data-changed": Cause("data memory", "the samples differ in another process", _BY_INDEX),
    "state": Cause("state", "something in a state_dict cannot be saved", "keep plain values and tensors in it"),
    "restore": Cause(
        "restoring", "a part cannot load what it saved", "load_state_dict must take what state_dict gives"
    ),
}

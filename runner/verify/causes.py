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
        things = "; ".join(f"{thing} ({line})" for thing, line in [*reached.items()][:3])
        more = f"; and {len(reached) - 3} more" if len(reached) > 3 else ""
        text = f"{self.description}. Your code reaches {things}{more}"
        return replace(self, description=text, where=next((line for line in reached.values() if ":" in line), ""))

    def with_memory(self, words: str) -> "Cause":
        """The same cause, with the memory that shows it."""
        return replace(self, description=f"{self.description}: {words}") if words else self


_STATEFUL = "save it in state_dict and restore it in load_state_dict (write both where there are none)"
_SEEDED = "draw from python's, numpy's or torch's global generators, which are seeded for every sample"
_BY_INDEX = "make a sample depend on its index and on the global generators alone"
_EVERY_STEP = "set it in every step, from a count in the task's state_dict, and not only once"

# A line has the kind of a cause, in parentheses its variant, and the description; the next line has the remedy.
_TEXTS = f"""
hash: hash() of a text or the order of a set, or id() of an object, is used: they differ from process to process
    sort a set before its elements are used, by names and not by id(), and use hashlib or zlib.crc32 instead of hash()
pid: the number of the process (os.getpid) is used in training
    use the configuration's seed instead of the pid
time: the time is used in training: seconds, an hour, a date
    count steps instead of seconds; take a date from the configuration; the runner has metrics of time
entropy: a generator is seeded by the system: default_rng(), random.Random() or os.urandom without a seed
    {_SEEDED}, or seed it from the configuration and save its state
gc: training depends on when the garbage collector runs: objects that hold each other live until then
    do not count live objects or weak references, and do nothing in __del__ and in their callbacks that a step reads
threads: the result depends on how threads take turns
    runtime.num_threads=1, or a kernel that adds up in a fixed order
kernel: a kernel is used whose result varies from call to call
    runtime.deterministic=true refuses such kernels by name; use another
kernel (refused): a kernel is used whose result varies from call to call
    use another kernel
chance: two undisturbed runs differ, for another reason than the pid, time, seeds, threads or torch's kernels
    look for other inputs of this part: files, network, processes and threads (use the results of threads in the order \
in which they were started, as executor.map does), id() of an object, your own kernels
length: training depends on the number of steps of the whole run: a longer run differs in the same steps
    do not read the limit of steps in training, or let the configuration fix it
files: the first run of all differs from those after it, which find something that it left behind
    let what is read from a file or a cache be equal, to the bit, to what is computed without it
attempts: training depends on how often the run was started: nothing was resumed, and still it differs
    do not count starts (also not by SLURM_RESTART_COUNT), and read no files of earlier attempts, in training
saving: the run depends on how often its state is taken: a state_dict changes something
    let every state_dict only look: no numbers drawn, nothing emptied, no weights swapped in the meantime
evaluation: evaluation leaves a trace in training: without it a resumed run is equal
    give evaluation generators and attributes of its own, or put what it changes into a state_dict
stopping: a stop by SIGTERM leaves a trace: after SIGKILL a resumed run is equal
    let load_state_dict replace what the object has: the runner also calls it to take back what an interrupted \
evaluation changed; and act on no signal yourself
incomplete: nothing differs, but not enough was done to prove anything
    read the output of the attempts, and try again with more verify.steps or memory
data order: the samples come in another order after a resume
    an iterable must have its whole position in its state_dict; a map-style data set needs none
data order (refused): the samples come in another order after a resume
    the order must follow from the position
workers: a sample depends on the process that reads it
    make it depend on its index alone
hidden generator: the data set draws from a generator of its own
    {_SEEDED}
data memory: the data set changes while training, and a new process begins without it
    {_BY_INDEX}; a curriculum belongs into the task, whose state is saved
data memory (again): a sample changes every time it is drawn
    {_SEEDED}
data memory (elsewhere): the samples differ in another process
    {_BY_INDEX}
randomness: the data set draws random numbers that nobody seeds
    use data.randomness=sample
optimizer memory: the same gradients change the weights differently: the optimizer remembers something that its \
state_dict lacks
    keep it in optimizer.state or param_groups, or add it in state_dict and load_state_dict
scheduler memory: the scheduler continues with another rate: it remembers something that its state_dict lacks
    for the scheduler: {_STATEFUL}
model memory: an attribute of the model matters and is not saved
    register_buffer it, so that it is in the model's state_dict
model memory (left out): a parameter of the model is not in its state_dict
    make the model's state_dict contain all parameters that are trained
model memory (not persistent): a buffer of the model that training changes is not saved
    register it with persistent=True
task memory: the task has a memory that is not saved
    for the task: {_STATEFUL}
callback memory: a callback has a memory that is not saved
    for the callback: {_STATEFUL}
process: training changes a setting of the whole process, and a new one begins without
    {_EVERY_STEP}
hooks: a hook is registered while training, and a new process begins without it
    register it where the model is built, and let a buffer of the model decide whether it acts
freezing (parameters): training changes which parameters are trained, and no state_dict has that
    {_EVERY_STEP}
freezing (modules): training changes which modules are in eval mode, and no state_dict has that
    {_EVERY_STEP}
tying: training makes one parameter of several, or several of one, and no state_dict has that
    tie weights where the model is built
gradients: gradients are kept from one step to the next, and are in no state_dict
    accumulate them within one step: trainer.accumulate, or several backward() before each update.step
structure: training changes the structure of the state, into which a new process cannot load it
    build all layers and param groups, and tie weights, where the model is built; let a buffer, a rate of 0 or \
requires_grad decide when each is used
hang: an attempt does not come to its end, which may be of your code or of a machine that was busy
    look at the lines above: at locks and waits without a limit, at files and processes of an earlier attempt
state: something in a state_dict cannot be saved
    keep plain values and tensors in it
restoring: a part cannot load what it saved
    load_state_dict must take what state_dict gives
"""
_LINES = _TEXTS.strip().splitlines()
CAUSES: Mapping[str, Cause] = {
    key: Cause(key.partition(" (")[0], description, remedy.strip())
    for (key, _, description), remedy in zip((line.partition(": ") for line in _LINES[::2]), _LINES[1::2], strict=True)
}

# Causes of memory by the beginning of its path, or by the label that ``memory`` gives what a model has in no attribute.
_BY_ROOT = {
    "data.": "data memory",
    "optimizer": "optimizer memory",
    "scheduler": "scheduler memory",
    "model": "model memory",
    "callbacks.": "callback memory",
    memory.PROCESS: "process",
}
_BY_LABEL = {
    memory.LEFT_OUT: "model memory (left out)",
    memory.NOT_PERSISTENT: "model memory (not persistent)",
    memory.HOOKS: "hooks",
    memory.FROZEN: "freezing (parameters)",
    memory.EVALUATING: "freezing (modules)",
    memory.TIED: "tying",
    memory.GRADIENTS: "gradients",
}
_BY_PART = {"augmentation": "data memory", "scheduler": "scheduler memory"}
_BY_PART |= dict.fromkeys(("model", "optimizer"), "optimizer memory")
_BY_ERROR = {
    "time-limit": "hang",
    "kernel": "kernel (refused)",
    "sample-changed": "data memory (again)",
    "collate-changed": "data memory (again)",
    "sample-per-process": "workers",
    "randomness-off": "randomness",
    "order-changed": "data order (refused)",
    "rollouts-changed": "task memory",
    "data-changed": "data memory (elsewhere)",
    "state": "state",
    "restore": "restoring",
    "structure": "structure",
}


def unexplained(difference: FirstDifference) -> Cause:
    """The cause of a difference between undisturbed runs that no pin takes away."""
    return CAUSES["entropy" if any(_is_generator(was) for _, was, _ in difference.remembered) else "chance"]


def of_workers(difference: FirstDifference) -> Cause:
    """The cause of a difference between undisturbed runs with different numbers of data workers."""
    entries = [entry for entry in difference.changing if entry[0].startswith("data.")]
    if not entries:
        text = f"another number of workers gives another {difference.part}"
        text = f"the data depends on the process that reads it: {text}"
        return Cause("workers", text, f"{_BY_INDEX}: no worker number, no pid")
    entries.sort(key=lambda entry: not _is_generator(entry[1]))  # each worker has a memory of its own
    return _more_exact(CAUSES["data memory"], *entries[0][:2]).with_memory(in_words(entries, ", then {}"))


def of_part(difference: FirstDifference) -> Cause:
    """The cause of a difference after a resume by the part that differs first, where no memory could be convicted."""
    part = difference.part
    if difference.restored:
        text = f"{part} does not get back what it saved: {difference.path} differs right after loading"
        remedy = f"make load_state_dict of {part} take over everything that its state_dict gives"
        return Cause("restoring", text, remedy)
    if part == "data order":
        return CAUSES["data order"]
    if part == "generators":
        text = f"the global generators are in another state: {difference.path}. Something draws from them or seeds"
        remedy = "do not seed or draw in code that is called first after a resume (dropout and noise use them)"
        return Cause("generators", f"{text} them after they were restored", remedy)
    if part in _BY_PART:
        return replace(CAUSES[_BY_PART[part]], sure=False)
    text = f"{part} differs although all before it is equal: something remembers outside the state"
    return Cause("memory", text, f"for the object that remembers: {_STATEFUL}", sure=False)


def of_memory(entries: Sequence[Remembered], *, sure: bool = True) -> Cause:
    """The cause for lost memory. ``sure``: with it, a resumed process goes on like the undisturbed run."""
    path, was, _ = entries[0]
    key = next((key for label, key in _BY_LABEL.items() if label in path), None)
    if key is None:
        key = next((key for root, key in _BY_ROOT.items() if path.startswith(root)), "task memory")
        return replace(_more_exact(CAUSES[key], path, was).with_memory(in_words(entries)), sure=sure)
    return replace(CAUSES[key].with_memory(in_words(entries)), sure=sure)


def of_error(kind: str, changed: str) -> Cause:
    """The cause of an error, by its kind. ``changed``: memory of the data set that changes, in words."""
    if kind not in _BY_ERROR:
        return Cause("error", "an attempt ended with the error above", "fix that first", sure=False)
    cause = replace(CAUSES[_BY_ERROR[kind]], sure=kind != "time-limit")
    if cause.kind == "data memory" and _is_generator(changed):
        hidden = CAUSES["hidden generator"]
        cause = replace(cause, kind=hidden.kind, description=hidden.description)
    cause = cause.with_memory(changed)
    return replace(cause, description=f"{cause.description} (refused by the runner, above)")


def _more_exact(cause: Cause, path: str, was: str | None) -> Cause:
    """The same cause with a remedy for this memory."""
    was = was or ""
    root, module, inside = path.partition(" (")
    if cause.kind == "data memory":
        return CAUSES["hidden generator"] if _is_generator(was) else cause
    if was.startswith("the function ") and " (its " not in path:
        text = f"{cause.description}; it is a function that training exchanges"
        return replace(cause, description=text, remedy="exchange it where it is built")
    remedy, of_model = cause.remedy, cause.kind == "model memory"
    if module and not inside.startswith("its "):
        remedy = f"keep it in an attribute of the {root}, not of a class or a module: {cause.remedy}"
    elif of_model and _is_generator(was):
        remedy = "save its get_state() in the module's get_extra_state, and restore it in set_extra_state"
    elif of_model and "]." in path and was.startswith("torch."):
        remedy = "put modules into a ModuleList or a ModuleDict, not into a plain list or dict"
    return replace(cause, remedy=remedy)


def _is_generator(words: str | None) -> bool:
    return fingerprint.IN_STATE in (words or "")

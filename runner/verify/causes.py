"""What makes runs differ, in words: the likely cause of a first difference, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from runner.verify.difference import Difference

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
    )
}


def of_process(found: Difference) -> Cause:
    """Another number of data workers makes another result."""
    return Cause(
        "workers",
        f"the data depends on the process that reads it: another number of workers gives another {found.part}",
        "make a sample depend on its index and on the global generators alone: no worker number, pid, or memory "
        "from sample to sample",
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


def _order(found: Difference) -> Cause:
    return Cause(
        "data order",
        f"the samples come in another order after a resume{_who(found, 'data.train')}",
        "an iterable must have its whole position in its state_dict; a map-style data set needs none",
    )


def _data(found: Difference) -> Cause:
    generators = [entry for entry in _suspects(found, "data.") if "in state" in entry[1]]
    if generators:
        path, _, _ = generators[0]
        return Cause("hidden generator", f"the data set draws from a generator of its own: {path}", _SEEDED)
    return Cause(
        "data memory",
        f"the data set changes while training, and a new process begins anew{_who(found, 'data.')}",
        "make a sample depend on its index and on the global generators alone; a curriculum belongs into the task, "
        "whose state is saved",
    )


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
    for prefix, kind in (("model", "model memory"), ("task", "task memory"), ("", "memory")):
        suspects = _suspects(found, prefix)
        if suspects:
            break
    buffer = next((path for path, _, _ in suspects if "persistent=False" in path), None)
    if buffer:
        return Cause(
            "model memory",
            f"a buffer of the model that training changes is not saved: {buffer}{_values(suspects, buffer)}",
            "register it with persistent=True",
        )
    if suspects and suspects[0][0].startswith("model"):
        return Cause(
            kind,
            f"an attribute of the model matters and is not saved{_who(found, 'model')}",
            "register_buffer it, so that it is in the model's state_dict",
        )
    if suspects and kind == "task memory":
        return Cause(
            kind, f"the task has a memory that is not saved{_who(found, 'task')}", f"for the task: {_STATEFUL}"
        )
    return Cause(
        "memory",
        f"the same weights, samples and generators give another {found.part}: something remembers beside the state"
        f"{_who(found, '')}",
        f"for what remembers: {_STATEFUL}",
    )


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
        f"{found.part} differs although all before it is equal{_who(found, '')}",
        f"for {found.part}: {_STATEFUL}",
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


def _suspects(found: Difference, prefix: str) -> list[tuple[str, str, str]]:
    """What was remembered and is not any more; first what training changes."""
    among = [entry for entry in found.remembered if entry[0].startswith(prefix)]
    return sorted(among, key=lambda entry: entry[0] not in found.moving)


def _who(found: Difference, prefix: str) -> str:
    told = [f"{path} was {was} and is {now}" for path, was, now in _suspects(found, prefix)[:3]]
    return f": {', '.join(told)} after loading" if told else ""


def _values(suspects: list[tuple[str, str, str]], path: str) -> str:
    return next((f", {was} before and {now} after loading" for name, was, now in suspects if name == path), "")


def of_refusal(said: str) -> Cause:
    """A life that ended with an error: the runner's own say what to do, and some of torch's are known."""
    for word, kind, remedy in _REFUSALS:
        if word in said:
            return Cause(kind, f"refused: {_sentence(said, word)}", remedy)
    return Cause("error", "an attempt ended with an error; above is what it said", "mend that first", sure=False)


_REFUSALS = (
    (
        "does not have a deterministic implementation",
        "kernel",
        "use another kernel, or CPU and GPU as torch's text says",
    ),
    ("when it is drawn again with the same seed", "data memory", _SEEDED),
    ("in a data worker than in this process", "workers", "make a sample depend on its index alone"),
    ("draws random numbers, and data.randomness=off", "randomness", "use data.randomness=sample"),
    ("is done again and has other samples", "data order", "the order of the samples must follow from the position"),
    ("the data is not what this run began with", "data memory", "samples must be the same in every process"),
    ("cannot save", "state", "keep plain values and tensors in state_dict"),
    ("does not fit what step", "restoring", "load_state_dict must take what state_dict gives"),
)


def _sentence(said: str, word: str) -> str:
    line = next(line for line in said.splitlines() if word in line)
    return line if len(line) <= 300 else f"{line[:297]}..."

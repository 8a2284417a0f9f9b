"""What is behind an attempt that ended with an error, as far as its words tell."""

from runner.verify.causes import CAUSES, SEEDED, Cause


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

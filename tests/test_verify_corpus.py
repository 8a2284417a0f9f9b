"""``python -m runner.verify`` on a corpus: broken experiments are named, mended and right ones pass."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from judge import SMALL, Judge, node, variant

from runner.verify.proof import Verdict

HERE, STATE = "mine.corpus", "mine.corpus_state"
PROCESS, PARTS, OUTSIDE, RARE = (f"mine.corpus_{name}" for name in ("process", "parts", "outside", "rare"))
COMMON, CULPRITS = "mine.broken", "mine.culprits"


def task(name: str, module: str = HERE, **values: object) -> tuple[str, ...]:
    return node("task", f"{module}.{name}", **values)


def process(name: str, **values: object) -> tuple[str, ...]:
    return task(name, PROCESS, **values)


def model(name: str, module: str = PARTS) -> tuple[str, ...]:
    return f"model._target_={module}.{name}", "+model.mended=MENDED"


def data(name: str, module: str = PARTS) -> tuple[str, ...]:
    return f"data.train._target_={module}.{name}", "+data.train.mended=MENDED"


def callback(name: str, module: str = PARTS) -> tuple[str, ...]:
    return (f"+callbacks.mine={{_target_:{module}.{name},mended:MENDED}}",)


def part(key: str, name: str, **values: object) -> tuple[str, ...]:
    return node(key, f"{PARTS}.{name}", **values)


UNCHECKED = "runtime.audit=false"
OFTEN = "trainer.evaluate_every_steps=2"
Case = tuple[Any, ...]  # the overrides, the kind of cause, and words of the report
# What users most often get wrong, with more steps and kills.
COMMONLY_BROKEN: dict[str, Case] = {
    "a curriculum in the data set": (data("Harder", COMMON), "data memory", "data.train.drawn was "),
    "a date in a data set": (data("Daily", COMMON), "time", "the time is used", "from the configuration"),
    "a hidden generator, refused": (data("Hidden", COMMON), "hidden generator", "drawn again", "data.train.generator"),
    "hash()": (task("Noisy", COMMON, source="hash"), "hash", "hash() of a text or the order of a set"),
    "a kernel without an order": (task("Scatters", COMMON), "kernel", "put_", "deterministic"),
    "a cache of augmentations": (data("Cached", COMMON), "data memory", "data.train.cache"),
    "a cache of a function": (data("Memoized", COMMON), "data memory", "mine.broken.noise", "a cache of "),
    "a hidden generator": ((*data("Hidden", COMMON), UNCHECKED), "hidden generator", "data.train.generator"),
    "an unseeded generator": ((*data("Unseeded", COMMON), UNCHECKED), "entropy", "seeded by the system"),
    "a task without a state": (task("Remembers", COMMON), "task memory", "task.seen was ", "is 0 after loading"),
    "a scheduler that forgets": (
        node("scheduler", f"{COMMON}.Decays"),
        "scheduler memory",
        "part     scheduler",
        "scheduler.factor",
    ),
    "an hour of the day": (task("Dated", COMMON), "time", "an hour, a date", "count steps"),
    "the order of a set": (task("Noisy", COMMON, source="set"), "hash", "the order of a set"),
    "threads that race": (task("Arrives", COMMON), "chance", "two undisturbed runs differ", "executor.map"),
    "an environment that changes": (task("Declares", COMMON), "process", "os.environ['LOUDER']"),
    "gradients kept between steps": (task("Gathers", COMMON), "gradients", "part     gradients"),
    "an average of weights": (task("Teaches", COMMON), "task memory", "task.teacher.layers"),
    "memory that begins late": (task("Anchors", COMMON), "task memory", "task.anchor was "),
    "a hook that comes late": (task("Hooks", COMMON), "hooks", "model._forward_hooks[0] was "),
    "an optimizer beside the runner's": (task("Rivals", COMMON), "task memory", "task.optimizer.state"),
    "a patience that forgets": (
        (*callback("Loses", COMMON), OFTEN),
        "callback memory",
        "part     end: the last step",
        "callbacks.mine.seen",
    ),
}
BROKEN: dict[str, Case] = {
    "a sum beside decoys": (task("Decoys", CULPRITS), "task memory", "cause    ", "task.total was "),
    "a cycle": (task("Turns", CULPRITS), "task memory", "cause    ", "task.scales was a cycle"),
    "a class of nobody": (model("Sharpens", CULPRITS), "model memory", "(mine.culprits.Sharpen.strength) was "),
    "layers in a list": (model("Listed", CULPRITS), "model memory", "model.extra[0].weight was ", "ModuleList"),
    "a generator of a model": (
        model("Rustles", CULPRITS),
        "model memory",
        "model.source was torch.Generator",
        "get_extra_state",
    ),
    "another function": (task("Exchanges", CULPRITS), "task memory", "the function doubled", "exchange it where"),
    "what numpy does with errors": (task("Quiets", CULPRITS), "process", "numpy.geterr() was {'divide': 'ignore'"),
    "tied weights": (
        (*task("Ties", CULPRITS), "model.hidden=[16,16]"),
        "structure",
        "model/layers.4.bias was replaced",
    ),
    "a late layer": (task("Grows", CULPRITS), "structure", "model/late.weight is a torch.float32 tensor"),
    "a file that outlives runs": (task("Leaves", CULPRITS, folder="FOLDER"), "chance", "leaves.txt", "culprits.py:"),
    "the pid": (task("Pids", CULPRITS), "pid", "os.getpid"),
    "a global": (task("Tallies"), "task memory", "(mine.corpus.tally) was "),
    "a dict of a class": (task("Registers"), "task memory", "(mine.corpus.Registers.registry)['seen'] was "),
    "a closure": (task("Encloses"), "task memory", "(its rung) was "),
    "a default": (task("Defaults"), "task memory", "(its visits)"),
    "an attribute of a function": (task("Annotates"), "task memory", "(its calls) was "),
    "a singleton": (task("Shares"), "task memory", "Singleton.only).level was "),
    "a context variable": (task("Contextual"), "task memory", "LEVEL) (its value) was "),
    "a variable of a thread": (task("Local"), "task memory", "here).depth was "),
    "weak keys": (task("Ages"), "task memory", "task.ages"),
    "a shared value": (task("SharedValue"), "task memory", "task.total"),
    "a partial function": (task("Binds"), "task memory", "task.shrink"),
    "a python generator": (task("Yields"), "task memory", "task.rates"),
    "a database": (task("Databases"), "memory", "task.table (cannot be looked into"),
    "a mean": (task("Averages"), "task memory", "task.mean was "),
    "dice": (task("Rolls"), "task memory", "task.dice was random.Random in state"),
    "seeds that are set late": (task("Seeds"), "task memory", "task.ready was True"),
    "a set in a state": (task("Unsaved", STATE), "state", "task/sums"),
    "another name in a state": (task("Renames", STATE), "restoring", "task/number"),
    "a name that no state has": (task("Misses", STATE), "restoring", "a part cannot load"),
    "a state that is rounded": (task("Rounds", STATE), "task memory", "task.mean was "),
    "a state that empties": (task("Empties", STATE), "saving", "state_dict only look"),
    "a state that draws": (task("Stirs", STATE), "saving", "state_dict only look"),
    "a load that extends": (
        (*task("Extends", STATE), "trainer.evaluate_every_steps=2"),
        "stopping",
        "let load_state_dict replace",
    ),
    "looks of an evaluation": (task("Watches", STATE), "evaluation", "evaluation leaves"),
    "a uuid": (process("Asks", source="uuid"), "entropy", "seeded by the system"),
    "a secret": (process("Asks", source="secret"), "entropy", "seeded by the system"),
    "numpy without a seed": (process("Asks", source="numpy"), "entropy", "seeded by the system"),
    "a timer": (process("Asks", source="timer"), "time", "the time is used"),
    "numpy's clock": (process("Asks", source="'numpy clock'"), "time", "the time is used"),
    "pandas' clock": (process("Asks", source="'pandas clock'"), "time", "the time is used"),
    "a program": (process("Asks", source="process"), "chance", "the process "),
    "a file of the kernel": (process("Asks", source="kernel"), "chance", "the file /proc/uptime"),
    "minutes since the start": (process("Ticks"), "time", "the time is used"),
    "a timer since the start": (process("Runs"), "time", "the time is used"),
    "the precision of products": (process("Hurries"), "process", "torch.get_float32_matmul_precision()"),
    "the working directory": (process("Walks"), "process", "os.getcwd()"),
    "a frozen bias": (process("Freezes"), "freezing", "requires_grad=False"),
    "a layer in eval mode": (process("Rests"), "freezing", "eval mode"),
    "more dropout": (process("Drops"), "model memory", "model.layers.3.p was 0.5"),
    "another activation": (process("Swaps"), "model memory", "model.layers.2"),
    "an attribute of a parameter": (process("Marks"), "model memory", ".bias.factor was 1.0"),
    "a hook of a parameter": (process("Hooks"), "hooks", "_backward_hooks[0]"),
    "a parametrization": (process("Normalizes"), "structure", "model/layers.1.weight is absent"),
    "a centre": (model("Centres"), "model memory", "model.centre was ", "register_buffer"),
    "a code book": (model("Codes"), "model memory", "model.codes was "),
    "a hidden state": (model("Recalls"), "model memory", "model.hidden (a buffer, persistent=False) was "),
    "dice in a model": (model("Skips"), "model memory", "get_extra_state"),
    "a parameter that is left out": (model("Omits"), "model memory", "model.gain (a parameter, not in its state_dict)"),
    "a bias that is not taken over": (model("Keeps"), "restoring", "model/layers.4.bias"),
    "turns of an optimizer": (part("optimizer", "Looks", lr=0.05), "optimizer memory", "optimizer.turn was "),
    "norms of all optimizers": (part("optimizer", "Clips", lr=0.05), "optimizer memory", "Clips.norms)"),
    "calls of a schedule": (part("scheduler", "staircase"), "scheduler memory", "(its calls) was "),
    "a schedule that begins again": (part("scheduler", "Begins"), "restoring", "scheduler/last_epoch"),
    "a patience": ((*callback("Cools"), "trainer.evaluate_every_steps=2"), "callback memory", "callbacks.mine.lows"),
    "an average in a callback": (callback("Pulls"), "callback memory", "callbacks.mine.average was "),
    "a generator in a callback": (callback("Jitters"), "callback memory", "callbacks.mine.source was "),
    "a draw at the start": (callback("Greets"), "generators", "global generators"),
    "a late group": (callback("Folds"), "structure", "group 1 of the optimizer"),
    "sums of samples": (data("Sums"), "data memory", "data.train.sums was "),
    "rows that are altered": (data("Alters"), "data memory", "data.train.rows was "),
    "a generator of a module": ((*data("Global"), "runtime.audit=false"), "hidden generator", "RANDOM"),
    "the worker": ((*data("Workers"), "runtime.audit=false"), "workers", "another number of workers"),
    "the pid of a worker": (data("Pids"), "pid", "os.getpid"),
    "a temporary file": (task("Cold", OUTSIDE), "attempts", "mean-False.npy"),
    "a file of an earlier run": (task("Cold", OUTSIDE, folder="FOLDER"), "files", "mean-False.npy"),
    "a cache of a method": (task("Memoizes", OUTSIDE), "task memory", "Memoizes.first) was a cache of 1 results"),
    "another start": (task("Restarted", OUTSIDE), "attempts", "how often the run was started"),
    "a clock of a number": (task("Late", OUTSIDE, clock="number"), "time", "the time is used"),
    "a clock of timeit": (task("Late", OUTSIDE, clock="timeit"), "time", "the time is used"),
    "an attribute of a torch class": (task("Labelled", RARE), "process", "linear.Linear.calls was "),
    "a second loader": (task("Loads", RARE), "task memory", "task.batches."),
    "a hook of all modules": (task("Overhears", RARE), "hooks", "_global_forward_hooks["),
    "denormal numbers": (task("Flushes", RARE), "process", "torch.set_flush_denormal() was True"),
    "gradients of a net of the task": (task("Judges", RARE), "task memory", "weight.grad was torch.float32"),
    "the order of a dict": (task("Recents", RARE), "task memory", "task.recent (its order) was "),
    "the class of a layer": (task("Becomes", RARE), "model memory", "model.layers.2 (its class) was the class torch"),
    "an attribute of sys": (task("Flags", RARE), "process", "sys.loud was 1"),
    "a count in a file": (task("Stores", RARE), "memory", "the state in the file "),
    "the runner's clock": ((f"+callbacks.mine={{_target_:{RARE}.Slows,mended:MENDED}}",), "time", "the time is used"),
    "a count of collate": (
        (f"+data.collate={{_target_:{RARE}.Collates,mended:MENDED}}", "runtime.audit=false"),
        "data memory",
        ".batches was ",
    ),
    "live objects": (task("Counts", RARE), "gc", "when the garbage collector runs"),
    "work of the garbage collector": (task("Collects", RARE), "gc", "when the garbage collector runs"),
}
LONGER = {**SMALL, "steps": 8, "kills": 3}
MORE: dict[str, dict[str, Any]] = {  # options where the small ones do not do
    **dict.fromkeys(("gradients of a net of the task", "the order of a dict", "live objects"), LONGER),
    **dict.fromkeys(("a hook of all modules", "a count in a file", "the runner's clock"), LONGER),
    "files of each process": {**SMALL, "workers": (0, 2)},
    "a load that extends": {**SMALL, "kills": 2, "moments": ("evaluating",)},
    "the worker": {**SMALL, "workers": (0, 2)},
    "caches in workers": {**SMALL, "workers": (0, 2)},
    "a temporary file": {**SMALL, "kills": 2},
    "data for one process": {**SMALL, "workers": (0, 2)},
}


# Broken where no line of the user's does it, or none is found; in mine.broken none is marked.
WITHOUT_LINE = (
    *COMMONLY_BROKEN,
    "what numpy does with errors",
    "tied weights",
    "a late layer",
    "a draw at the start",
    "calls of a schedule",
    "the worker",
    "a set in a state",
    "a late group",
    "another start",
    "the runner's clock",
    "a hook of all modules",
    "gradients of a net of the task",
)


# Memory in mine.culprits that has no effect.
DECOYS = ("task.calls", "task.history", "task.zones", "task.taken", "task.done")


def good(key: str, name: str) -> tuple[str, ...]:
    return f"~{key}", f"+{key}={{_target_:mine.corpus_right.{name}}}"


RIGHT: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "reports": good("task", "Reports"),
    "files and programs": good("task", "Files"),
    "threads in order": good("task", "Threads"),
    "sets in order": good("task", "Sets"),
    "generators of a step": good("task", "Steps"),
    "global generators": (*good("task", "Draws"), OFTEN),
    "meters": (*good("task", "Meters"), OFTEN),
    "norms and masks": ("model._target_=mine.corpus_right.Norms",),
    "caches": ("data.train._target_=mine.corpus_right.Caches",),
    "caches in workers": ("data.train._target_=mine.corpus_right.Caches",),
    "data for one process": ("data.train._target_=mine.corpus_right.Alone",),
    "a callback with a state": ("+callbacks.mine={_target_:mine.corpus_right.Saves}",),
    "accumulation": ("trainer.accumulate=2",),
    "clipping": ("trainer.clip_norm=0.1",),
    "low precision": ("trainer.precision=bf16",),
    "an average of weights": ("trainer.ema_decay=0.9",),
    "one cycle": ("~scheduler", "+scheduler={_target_:torch.optim.lr_scheduler.OneCycleLR,max_lr:0.1,total_steps:200}"),
    "a plateau": ("~scheduler", "+scheduler={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau,patience:1}", OFTEN),
    "momentum": ("~optimizer", "+optimizer={_target_:torch.optim.SGD,lr:0.1,momentum:0.9,nesterov:true}"),
    "early stopping": ("trainer.early_stopping.patience=2", OFTEN),
    "transformers": ("model._target_=mine.corpus_right.Transformer",),
    "torchmetrics": (*good("task", "Metrics"), OFTEN),
    "lightning": ("model._target_=mine.corpus_right.Module",),
    "a first batch in buffers": ("model._target_=mine.corpus_right.Standardizes",),
    "a second loader": good("task", "Streams"),
    "the age of a file": good("task", "Checks"),
    "a collector that is called": good("task", "Collects"),
    "processes of its own": good("task", "Pools"),
    "files of each process": ("data.train._target_=mine.corpus_right.Opens",),
    "an average by torch": ("+callbacks.mine={_target_:mine.corpus_right.Follows}",),
}


def late(name: str) -> tuple[str, ...]:
    return "~task", f"+task={{_target_:{RARE}.{name},mended:false}}"


# What passes with a note: the overrides, and words of the note.
NOTED: dict[str, tuple[tuple[str, ...], str]] = {
    "a count of data workers": ((f"data.train._target_={RARE}.Grows",), "within these steps: data.train.read was "),
    "an attribute of a torch class": (late("LabelledLate"), "Linear.calls was "),
    "a count in a file": (late("StoresLate"), "what depends on the state in the file "),
    "a listing": (late("Reads"), "what depends on the order of the folder "),
    "seconds as a metric": (good("task", "Seconds"), "not compared: the metric rows_per_second, which depends on the"),
    "memory as a metric": (
        (*good("task", "Occupies"), "verify.ignore=[memory]"),
        "not compared: the metrics memory of",
    ),
}


def broken(name: str) -> list[str]:
    """The overrides of a broken experiment."""
    return variant(CASES[name][0], mended=False)


def judged(judge: Judge, name: str, overrides: Iterable[str]) -> Verdict:
    if name in COMMONLY_BROKEN:
        return judge(*overrides)
    return judge("trainer.evaluate_every_steps=100", *overrides, **MORE.get(name, SMALL))


def marked(where: str) -> list[str]:
    """The source lines that a cause names."""
    places = [place.rpartition(":") for place in where.split(", ") if place]
    return [Path(file).read_text().splitlines()[int(line) - 1] for file, _, line in places]


# Each case takes about ten seconds: every third one is enough for each commit.
CASES = COMMONLY_BROKEN | BROKEN
CHOSEN = [*CASES] if os.environ.get("RUNNER_CORPUS") == "all" else [*COMMONLY_BROKEN, *[*BROKEN][::3]]
ALWAYS = {name: [] for name in [*COMMONLY_BROKEN][:2]} | dict.fromkeys(
    [*COMMONLY_BROKEN][2:5] + [*BROKEN][:1], pytest.mark.slow
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=ALWAYS.get(n, pytest.mark.campaign)) for n in CHOSEN])
def test_a_broken_experiment_is_named(name: str, judge: Judge) -> None:
    overrides, kind, *words = CASES[name]
    verdict = judged(judge, name, broken(name))
    text = verdict.text()
    report = "\n".join([text, *verdict.tried])
    assert verdict.cause, report
    assert verdict.cause.kind == kind, report
    assert [word for word in words if word not in text] == [], report
    assert CULPRITS not in str(overrides) or [decoy for decoy in DECOYS if decoy in text] == [], report
    if name not in WITHOUT_LINE:
        assert any("# culprit" in line for line in marked(verdict.cause.where)), report


@pytest.mark.campaign
@pytest.mark.parametrize("name", CHOSEN)
def test_a_mended_experiment_passes(name: str, judge: Judge) -> None:
    verdict = judged(judge, name, variant(CASES[name][0], mended=True))
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])


@pytest.mark.campaign
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_experiment_passes(name: str, judge: Judge) -> None:
    if name in ("transformers", "torchmetrics", "lightning"):
        pytest.importorskip(name)
    verdict = judged(judge, name, RIGHT[name])
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])


@pytest.mark.campaign
@pytest.mark.parametrize("name", NOTED)
def test_a_proof_that_cannot_see_says_so(name: str, judge: Judge) -> None:
    overrides, words = NOTED[name]
    workers = (2,) if "workers" in name else (0,)
    verdict = judge("trainer.evaluate_every_steps=100", *overrides, **{**SMALL, "workers": workers})
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])
    assert [note for note in verdict.notes if words in note], verdict.text()

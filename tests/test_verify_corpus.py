"""``python -m runner.verify`` on a corpus: broken experiments are named, mended and right ones pass."""

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_verify import CASES
from test_verify_culprits import CULPRITS

from runner.verify.execution import Servers, fork_servers
from runner.verify.options import Options, parse
from runner.verify.proof import Verdict, prove

USER = Path(__file__).parent / "user"
HERE, STATE = "mine.corpus", "mine.corpus_state"
PROCESS, PARTS, OUTSIDE, RARE = (f"mine.corpus_{name}" for name in ("process", "parts", "outside", "rare"))
SMALL = Options(steps=6, kills=1, workers=(0,))


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with fork_servers(USER) as both:
        yield both


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Data workers have sockets in the temporary folder, whose paths must be short."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield


def judged(servers: Servers, *overrides: str, options: Options = SMALL) -> Verdict:
    command = ("--config-dir", "conf", "experiment=broken", "trainer.evaluate_every_steps=100", *overrides)
    return prove(command, options, progress=print, servers=servers)


def node(key: str, target: str, **values: object) -> tuple[str, ...]:
    inner = "".join(f",{name}:{value}" for name, value in values.items())
    return f"~{key}", f"+{key}={{_target_:{target},mended:MENDED{inner}}}"


def task(name: str, module: str = HERE, **values: object) -> tuple[str, ...]:
    return node("task", f"{module}.{name}", **values)


def process(name: str, **values: object) -> tuple[str, ...]:
    return task(name, PROCESS, **values)


def model(name: str) -> tuple[str, ...]:
    return f"model._target_={PARTS}.{name}", "+model.mended=MENDED"


def data(name: str) -> tuple[str, ...]:
    return f"data.train._target_={PARTS}.{name}", "+data.train.mended=MENDED"


def callback(name: str) -> tuple[str, ...]:
    return (f"+callbacks.mine={{_target_:{PARTS}.{name},mended:MENDED}}",)


def part(key: str, name: str, **values: object) -> tuple[str, ...]:
    return node(key, f"{PARTS}.{name}", **values)


# The overrides, the kind of cause, and words of the report.
Case = tuple[tuple[str, ...], str, str]
BROKEN: dict[str, Case] = {
    "a global": (task("Tallies"), "task memory", "(mine.corpus.tally) was "),
    "a dict of a class": (task("Registers"), "task memory", "(mine.corpus.Registers.registry)['seen'] was "),
    "a closure": (task("Encloses"), "task memory", "(its rung) was "),
    "a default": (task("Defaults"), "task memory", "(its visits)"),
    "an attribute of a function": (task("Annotates"), "task memory", "(its calls) was "),
    "a singleton": (task("Shares"), "task memory", "Singleton.only).level was "),
    "a context variable": (task("Contextual"), "task memory", "LEVEL) (its value) was "),
    "a variable of a thread": (task("Local"), "task memory", "here).depth was "),
    "weak keys": (task("Ages"), "task memory", "task.ages"),
    "a value of C": (task("Native"), "task memory", "task.cell was "),
    "a shared value": (task("SharedValue"), "task memory", "task.total"),
    "an array": (task("Packs"), "task memory", "task.numbers was "),
    "a partial function": (task("Binds"), "task memory", "task.shrink"),
    "a python generator": (task("Yields"), "task memory", "task.rates"),
    "a counter of itertools": (task("Numbers"), "task memory", "task.ordinals was a count"),
    "the position in a stream": (task("Tapes"), "task memory", "task.tape was a BytesIO at 1"),
    "a database": (task("Databases"), "memory", "task.table (cannot be looked into"),
    "a window": (task("Windows"), "task memory", "task.window"),
    "a mean": (task("Averages"), "task memory", "task.mean was "),
    "a bank": (task("Banks"), "task memory", "task.row was "),
    "a histogram": (task("Histograms"), "task memory", "task.histogram was "),
    "a large table": (task("Tables"), "task memory", "task.losses was a dict of 3000"),
    "a linked list": (task("Links"), "task memory", "task.head"),
    "a meter with slots": (task("Meters"), "task memory", "task.meter.total was "),
    "a set": (task("Labels"), "task memory", "task.sums was a set of"),
    "a text": (task("Logs"), "task memory", "task.text was "),
    "the first batch": (task("First"), "task memory", "task.centre was "),
    "the last batch": (task("Mixes"), "task memory", "task.previous was "),
    "dice": (task("Rolls"), "task memory", "task.dice was random.Random in state"),
    "a generator of numpy": (task("Shakes"), "task memory", "task.noise was numpy.random.Generator"),
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
    "the depth of recursion": (process("Recurses"), "process", "sys.getrecursionlimit()"),
    "digits of decimals": (process("Decimals"), "process", "decimal"),
    "a frozen bias": (process("Freezes"), "freezing", "requires_grad=False"),
    "a layer in eval mode": (process("Rests"), "freezing", "eval mode"),
    "more dropout": (process("Drops"), "model memory", "model.layers.3.p was 0.5"),
    "another activation": (process("Swaps"), "model memory", "model.layers.2"),
    "an attribute of a parameter": (process("Marks"), "model memory", ".bias.factor was 1.0"),
    "a hook of a parameter": (process("Hooks"), "hooks", "_backward_hooks[0]"),
    "a parametrization": (process("Normalizes"), "structure", "model/layers.1.weight is absent"),
    "a centre": (model("Centres"), "model memory", "model.centre was "),
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
        (f"+data.collate={{_target_:{RARE}.Collates,mended:MENDED}}",),
        "data memory",
        ".batches was ",
    ),
    "live objects": (task("Counts", RARE), "gc", "when the garbage collector runs"),
    "work of the garbage collector": (task("Collects", RARE), "gc", "when the garbage collector runs"),
}
LONGER = replace(SMALL, steps=8, kills=3)
MORE = {  # options where the small ones do not do
    **dict.fromkeys(("gradients of a net of the task", "the order of a dict", "live objects"), LONGER),
    **dict.fromkeys(("a hook of all modules", "a count in a file", "the runner's clock"), LONGER),
    "files of each process": replace(SMALL, workers=(0, 2)),
    "a load that extends": replace(SMALL, kills=2, moments=("evaluating",)),
    "the worker": replace(SMALL, workers=(0, 2)),
    "caches in workers": replace(SMALL, workers=(0, 2)),
    "a temporary file": replace(SMALL, kills=2),
    "data for one process": replace(SMALL, workers=(0, 2)),
}


# Broken where no line of the user's does it, or none is found.
WITHOUT_LINE = (
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


def good(key: str, name: str) -> tuple[str, ...]:
    return f"~{key}", f"+{key}={{_target_:mine.corpus_right.{name}}}"


OFTEN = "trainer.evaluate_every_steps=2"
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
    "one cycle": (
        "~scheduler",
        "+scheduler={_target_:torch.optim.lr_scheduler.OneCycleLR,max_lr:0.1,total_steps:200}",
    ),
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


def reads(source: str) -> tuple[str, ...]:
    return "~task", f"+task={{_target_:{RARE}.Reads,source:{source}}}"


# What passes with a note: the overrides, and words of the note.
NOTED: dict[str, tuple[tuple[str, ...], str]] = {
    "a count of data workers": ((f"data.train._target_={RARE}.Grows",), "within these steps: data.train.read was "),
    "an attribute of a torch class": (late("LabelledLate"), "Linear.calls was "),
    "a count in a file": (late("StoresLate"), "what depends on the state in the file "),
    "the processor": (reads("processor"), "what depends on the time and memory of the process "),
    "times": (reads("times"), "what depends on the time and memory of the process "),
    "the age of a file": (reads("age"), "what depends on the times of a file "),
    "a listing": (reads("listing"), "what depends on the order of the folder "),
    "uuid1": (reads("uuid1"), "what depends on uuid1"),
    "the host": (reads("host"), "what depends on the host name "),
    "the job": (reads("job"), "what depends on the environment variable SLURM_JOB_ID "),
    "the pid": (reads("pid"), "what depends on the pid "),
    "a file of the kernel": (reads("kernel"), "what depends on the file /proc/uptime "),
    "free space": (reads("space"), "what depends on the free space of a disk "),
    "seconds as a metric": (good("task", "Seconds"), "not compared: the metric rows_per_second, which depends on the"),
    "memory as a metric": (
        (*good("task", "Occupies"), "verify.ignore=[memory]"),
        "not compared: the metrics memory of",
    ),
}


def variant(name: str, *, mended: bool) -> tuple[str, ...]:
    values = {"MENDED": str(mended).lower(), "FOLDER": tempfile.gettempdir()}
    return tuple(re.sub("MENDED|FOLDER", lambda match: values[match[0]], each) for each in BROKEN[name][0])


def marked(where: str) -> list[str]:
    """The source lines that a cause names."""
    places = [place.rpartition(":") for place in where.split(", ") if place]
    return [Path(file).read_text().splitlines()[int(line) - 1] for file, _, line in places]


# Each case takes about ten seconds: every third one is enough for each commit.
@pytest.mark.campaign
@pytest.mark.parametrize("name", BROKEN if os.environ.get("RUNNER_CORPUS") == "all" else [*BROKEN][::3])
def test_a_broken_experiment_is_named_and_passes_once_mended(name: str, servers: Servers) -> None:
    _, kind, words = BROKEN[name]
    options = MORE.get(name, SMALL)
    verdict = judged(servers, *variant(name, mended=False), options=options)
    report = "\n".join([verdict.text(), *verdict.tried])
    assert verdict.cause, report
    assert verdict.cause.kind == kind, report
    assert words in verdict.text(), report
    if name not in WITHOUT_LINE:
        assert any("# culprit" in line for line in marked(verdict.cause.where)), report
    mended = judged(servers, *variant(name, mended=True), options=options)
    assert mended.holds, "\n".join([mended.text(), *mended.tried])


@pytest.mark.campaign
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_experiment_passes(name: str, servers: Servers) -> None:
    if name in ("transformers", "torchmetrics", "lightning"):
        pytest.importorskip(name)
    verdict = judged(servers, *RIGHT[name], options=MORE.get(name, SMALL))
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])


@pytest.mark.campaign
@pytest.mark.parametrize("name", NOTED)
def test_a_proof_that_cannot_see_says_so(name: str, servers: Servers) -> None:
    overrides, words = NOTED[name]
    more, overrides, _ = parse(overrides)
    options = replace(SMALL, ignore=more.ignore, workers=(2,) if "workers" in name else (0,))
    verdict = judged(servers, *overrides, options=options)
    assert verdict.holds, "\n".join([verdict.text(), *verdict.tried])
    assert [note for note in verdict.notes if words in note], verdict.text()


def test_the_corpus_has_its_size() -> None:
    assert len([*BROKEN, *CASES, *CULPRITS]) >= 60
    assert len(RIGHT) >= 20

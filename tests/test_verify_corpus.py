"""``python -m runner.verify`` on a corpus: broken experiments are named, mended and right ones pass."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_verify import CASES
from test_verify_culprits import CULPRITS

from runner.verify.execution import Servers, fork_servers
from runner.verify.options import Options
from runner.verify.proof import prove
from runner.verify.verdict import Verdict

USER = Path(__file__).parent / "user"
HERE, PROCESS, PARTS = "mine.corpus", "mine.corpus_process", "mine.corpus_parts"
SMALL = Options(steps=6, kills=1, workers=(0,))


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with fork_servers(USER) as both:
        yield both


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


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
    "a set in a state": (task("Unsaved"), "state", "task/sums"),
    "another name in a state": (task("Renames"), "restoring", "task/number"),
    "a name that no state has": (task("Misses"), "error", "KeyError"),
    "a state that is rounded": (task("Rounds"), "task memory", "task.mean was "),
    "a state that empties": (task("Empties"), "saving", "state_dict only look"),
    "a state that draws": (task("Stirs"), "saving", "state_dict only look"),
    "a load that extends": (
        (*task("Extends"), "trainer.evaluate_every_steps=2"),
        "stopping",
        "let load_state_dict replace",
    ),
    "looks of an evaluation": (task("Watches"), "evaluation", "evaluation leaves"),
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
    "the default dtype": (process("Doubles"), "process", "torch.get_default_dtype()"),
    "the working directory": (process("Walks"), "process", "os.getcwd()"),
    "the depth of recursion": (process("Recurses"), "process", "sys.getrecursionlimit()"),
    "digits of decimals": (process("Decimals"), "process", "decimal"),
    "a frozen bias": (process("Freezes"), "freezing", "requires_grad=False"),
    "a layer in eval mode": (process("Rests"), "freezing", "eval mode"),
    "more dropout": (process("Drops"), "model memory", "model.layers.3.p was 0.5"),
    "another activation": (process("Swaps"), "model memory", "model.layers.2"),
    "an attribute of a parameter": (process("Marks"), "model memory", ".bias.factor was 1.0"),
    "a hook of a parameter": (process("Hooks"), "hooks", "_backward_hooks[0] was "),
    "a parametrization": (process("Normalizes"), "structure", "in step "),
    "a replaced parameter": (process("Unties"), "structure", "in step "),
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
    "a decay over the whole run": (callback("Plans"), "length", "number of steps of the whole run"),
    "a late group": (callback("Folds"), "structure", "optimizer/param_groups"),
    "sums of samples": (data("Sums"), "data memory", "data.train.sums was "),
    "rows that are altered": (data("Alters"), "data memory", "data.train.rows was "),
    "a generator of a module": ((*data("Global"), "runtime.audit=false"), "hidden generator", "RANDOM"),
    "the worker": ((*data("Workers"), "runtime.audit=false"), "workers", "another number of workers"),
    "the pid of a worker": (data("Pids"), "workers", "process that reads it"),
    "a stream from the beginning": (
        ("~data.train", f"+data.train={{_target_:{PARTS}.Endless,mended:MENDED}}"),
        "data order",
        "another order",
    ),
    "a collate with memory": (
        (f"data.collate={{_target_:{PARTS}.Collates,mended:MENDED}}",),
        "data memory",
        "data.collate.batches was ",
    ),
}
MORE: dict[str, Options] = {}


def variant(case: Case, mended: bool) -> tuple[str, ...]:
    return tuple(each.replace("MENDED", str(mended).lower()) for each in case[0])


@pytest.mark.campaign
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_experiment_is_named_and_passes_once_mended(name: str, servers: Servers) -> None:
    _, kind, words = BROKEN[name]
    options = MORE.get(name, SMALL)
    verdict = judged(servers, *variant(BROKEN[name], False), options=options)
    report = "\n".join([verdict.text(), *verdict.tried])
    assert verdict.cause, report
    assert verdict.cause.kind == kind, report
    assert words in verdict.text(), report
    mended = judged(servers, *variant(BROKEN[name], True), options=options)
    assert mended.holds, "\n".join([mended.text(), *mended.tried])
    if source := marked(name):
        assert verdict.cause.where.partition(",")[0] in source, report


def marked(name: str) -> list[str]:
    """The lines with the mark ``culprit`` in the class of a case, as ``file:line``."""
    target = next(each for each in BROKEN[name][0] if "mine.corpus" in each)
    module, _, kind = target.partition("_target_")[2].lstrip(":=").partition(",")[0].rpartition(".")
    return []


def test_the_corpus_has_its_size() -> None:
    assert len({**BROKEN, **CASES, **CULPRITS}) >= 60

"""Kill it anywhere, run the same command again, get the same result: on real processes, to the bit."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lives import LAST, Lives
from marks import quick_first, slow
from results import Results, results

from runner.checkpoint import manifest

KILLS = int(os.environ.get("RUNNER_KILLS", "50"))  # in all random campaigns together
USER = Path(__file__).parent / "user"

COMMON = ("runtime.num_threads=1", "checkpoint.every_seconds=null", "metrics.every_steps=10")
DIGITS = (
    "experiment=digits",
    "trainer.max_steps=50",
    "trainer.evaluate_every_steps=20",
    "checkpoint.every_steps=7",
    *COMMON,
)
GPT = (
    "experiment=gpt",
    "model.layers=1",
    "model.heads=2",
    "model.width=32",
    "model.dropout=0.1",
    "data.train.block_size=32",
    "data.validation.limit=32",
    "task.sample_bytes=8",
    "data.randomness=sample",
    "trainer.max_steps=50",
    "trainer.evaluate_every_steps=20",
    "checkpoint.every_steps=7",
    f"data.train.path={os.path.dirname(json.__file__)}/*.py",
    *COMMON,
)
# Everything that can be remembered, at once.
EVERYTHING = (
    "experiment=smoke",
    "scheduler=warmup_cosine",
    "task._target_=mine.tasks.Curriculum",
    "+task.bad_every=9",
    "~task.label_smoothing",
    "scheduler.warmup_steps=5",
    "trainer.max_steps=60",
    "trainer.evaluate_every_steps=6",
    "trainer.on_nonfinite=skip",
    "trainer.ema_decay=0.9",
    "trainer.clip_norm=1.0",
    "trainer.early_stopping={patience:6,min_delta:0.001}",
    "objective={metric:val/loss,mode:max}",  # best at the first evaluation, so that stopping early is due at step 42
    "checkpoint.every_steps=6",
    *COMMON,
)
EXPERIMENTS = {"digits": DIGITS, "gpt": GPT}

Uninterrupted = Callable[[tuple[str, ...]], Results]


@pytest.fixture(scope="session")
def uninterrupted(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The results of a command that nothing interrupted; each is run once."""
    root = tmp_path_factory.mktemp("uninterrupted")
    cache: dict[tuple[str, ...], Results] = {}

    def find(command: tuple[str, ...]) -> Results:
        if command not in cache:
            cache[command] = results(run(life, root, command, f"run.name=u{len(cache)}"))
        return cache[command]

    return find


def run(life: Lives, root: Path, command: tuple[str, ...], *more: str) -> Path:
    """One life to the end; the run's directory."""
    ended = life(*command, f"run.root={root}", *more, cwd=USER)
    assert ended.status == 0, ended.output
    return run_directories(root)[-1]


def run_directories(root: Path) -> list[Path]:
    """The run directories under a root, oldest first."""
    return sorted((path.parent for path in root.glob("*/*/run.json")), key=lambda path: path.stat().st_ctime)


@pytest.mark.campaign
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_random_kills_change_nothing(name: str, life: Lives, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    """SIGKILL of the whole process group at random moments, with another number of workers in each life."""
    command, chance, kills, runs = EXPERIMENTS[name], random.Random(name), 0, 0
    expected = uninterrupted(command)
    whole = life(*command, f"run.root={tmp_path}", "run.name=timed", cwd=USER).seconds
    while kills < KILLS // len(EXPERIMENTS):
        runs += 1
        more = (f"run.root={tmp_path}", f"run.name=r{runs}")
        while True:
            workers = f"runtime.num_workers={chance.choice([0, 1, 3, 'auto'])}"
            background = f"checkpoint.background={chance.choice(['true', 'false'])}"
            ended = life(*command, *more, workers, background, cwd=USER, after=chance.uniform(0, 1.2 * whole))
            if ended.status is not None:
                break
            kills += 1
        assert ended.status == 0, ended.output
        assert not results(tmp_path / name / f"r{runs}").differences(expected), f"run {runs}"
    print(f"{name}: {kills} kills in {runs} runs")


@pytest.mark.campaign
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_kill_at_any_storage_operation_changes_nothing(
    name: str, life: Lives, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    """Start, saves, removals, the finish: half a write, or the moment before any other call. Then on to the end."""
    short = (*EXPERIMENTS[name], "trainer.max_steps=6", "checkpoint.every_steps=3", "trainer.evaluate_every_steps=3")
    expected = uninterrupted(short)
    stride = 1 if KILLS >= 1000 else 17
    for operation in range(1 + len(name) % stride, 1000, stride):
        more = (f"run.root={tmp_path}", f"run.name=o{operation}")
        background = f"checkpoint.background={'true' if operation % 2 else 'false'}"
        ended = life(*short, *more, background, operation=operation, cwd=USER)
        if ended.status is not None:
            break
        ended = life(*short, *more, cwd=USER)
        assert ended.status == 0, ended.output
        assert not results(tmp_path / name / f"o{operation}").differences(expected), f"operation {operation}"
    assert ended.status == 0, ended.output
    assert operation > 90, "the mines were not laid"


@pytest.mark.parametrize("cuts", [slow((23,)), (22, 23, 24), slow((1, 22, 45)), slow((44, 45, 46))], ids=str)
def test_cuts_around_the_border_of_an_epoch_change_nothing(
    cuts: tuple[int, ...], life: Lives, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    """1437 samples in batches of 64: epochs end within steps 23 and 45. Every step is committed; up to 3 resumes."""
    command = (*DIGITS, "checkpoint.every_steps=1")
    expected = uninterrupted(DIGITS)
    for number, cut in enumerate(cuts):
        ended = life(*command, f"run.root={tmp_path}", "run.name=cut", f"runtime.num_workers={number}", step=cut)
        assert ended.status is None, ended.output
    assert not results(run(life, tmp_path, command, "run.name=cut")).differences(expected)


def test_a_kill_right_after_loading_changes_nothing(life: Lives, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    more = (f"run.root={tmp_path}", "run.name=loaded")
    life(*DIGITS, *more, step=25)
    for _ in range(3):
        assert life(*DIGITS, *more, restored=True).status is None
    assert not results(run(life, tmp_path, DIGITS, "run.name=loaded")).differences(uninterrupted(DIGITS))


PARTS = {
    "model": 15,
    "optimizer": 15,
    "scheduler": 15,
    "update": 15,
    "average": 15,
    "task": 15,
    "data": 15,
    "progress": 15,
    "callback.evaluate": 13,
    "callback.best": 40,
    "callback.early_stopping": 40,
    "callback.report": 15,
    "generators": 15,
}


def test_all_parts_together_survive_kills(life: Lives, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    expected = uninterrupted(EVERYTHING)
    assert PARTS.keys() == expected.parts.keys(), "PARTS is not the list of parts"
    assert expected.result["skipped_steps"] > 0
    assert expected.result["reason"] == "early_stopping"
    for cut in sorted({*PARTS.values()}):
        assert life(*EVERYTHING, f"run.root={tmp_path}", "run.name=r", cwd=USER, step=cut).status is None
    assert not results(run(life, tmp_path, EVERYTHING, "run.name=r")).differences(expected)


@pytest.mark.parametrize("part", quick_first(PARTS, "optimizer", "data"))
def test_every_part_is_necessary(part: str, life: Lives, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    """The mutant that forgets one part, in saving and in loading, gives another result (or cannot even finish)."""
    more = (f"run.root={tmp_path}", "run.name=mutant")
    assert life(*EVERYTHING, *more, cwd=USER, step=PARTS[part], without=part).status is None
    ended = life(*EVERYTHING, *more, cwd=USER, without=part)
    if ended.status == 0:
        (folder,) = run_directories(tmp_path)
        mutant = results(folder)
        expected = uninterrupted(EVERYTHING)
        parts = {name: value for name, value in expected.parts.items() if name != part}
        tensors = {name: digest for name, digest in expected.tensors.items() if name.split("/")[0] != part}
        assert mutant.differences(replace(expected, parts=parts, tensors=tensors))


@pytest.mark.parametrize(
    "settings",
    [
        slow(("trainer.precision=bf16",)),
        ("trainer.precision=fp16",),
        slow(("trainer.accumulate=4",)),
        ("data.tail=drop", "data.batch_size=100"),
        ("data.randomness=batch",),
        slow(("optimizer=sgd",)),
        slow(("trainer.max_steps=null", "trainer.max_epochs=2", "trainer.evaluate_every_epochs=1")),
    ],
    ids=lambda settings: settings[0],
)
def test_every_way_of_training_survives_a_kill(settings: tuple[str, ...], life: Lives, tmp_path: Path) -> None:
    command = ("experiment=smoke", "trainer.max_steps=30", "checkpoint.every_steps=4", *COMMON, *settings)
    expected = results(run(life, tmp_path, command, "run.name=whole"))
    assert life(*command, f"run.root={tmp_path}", "run.name=cut", step=17).status is None
    assert not results(run(life, tmp_path, command, "run.name=cut")).differences(expected)


def test_state_in_unusual_forms_survives_a_kill(life: Lives, tmp_path: Path) -> None:
    """See ``mine.odd``. The second life saves at other steps: what a copy reads is not what the next step changes."""
    command = ("--config-dir", f"{USER}/conf", "experiment=odd", *COMMON)
    expected = results(run(life, tmp_path, command, "run.name=whole", "checkpoint.every_steps=5"))
    more = (f"run.root={tmp_path}", "run.name=cut")
    assert life(*command, *more, "checkpoint.every_steps=7", cwd=USER, step=17).status is None
    assert life(*command, *more, "checkpoint.every_steps=1", cwd=USER, call=LAST).status is None
    ended = life(*command, *more, cwd=USER)
    assert "resumed from step 33" in ended.output
    assert "exported without _extra_state" in ended.output
    assert not results(tmp_path / "odd/cut").differences(expected)


@pytest.mark.parametrize("start_method", [slow("spawn"), "forkserver"])
def test_another_start_method_changes_nothing(
    start_method: str, life: Lives, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    more = ("run.name=m", "runtime.num_workers=1")
    assert life(*DIGITS, f"run.root={tmp_path}", *more, step=30).status is None
    folder = run(life, tmp_path, DIGITS, *more, f"runtime.start_method={start_method}")
    assert not results(folder).differences(uninterrupted(DIGITS))


def test_tensorboard_shows_one_curve_with_no_point_twice(
    life: Lives, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for cut in (11, 25, 26, 41):
        assert life(*DIGITS, f"run.root={tmp_path}", "run.name=tb", step=cut).status is None
    folder = run(life, tmp_path, DIGITS, "run.name=tb")
    curves = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected = {(tag, line["step"]) for line in uninterrupted(DIGITS).lines for tag in line if tag != "step"}
    shown = [(tag, event.step) for tag in curves.Tags()["scalars"] for event in curves.Scalars(tag)]
    assert {"time/step", "time/data_wait"} <= {*curves.Tags()["scalars"]}
    assert sorted(point for point in shown if not point[0].startswith("time/")) == sorted(expected)


def test_garbage_is_bounded(life: Lives, tmp_path: Path) -> None:
    """After many kills there are the checkpoints that retention keeps, their data, and nothing else."""
    command = ("experiment=smoke", "trainer.max_steps=20", "checkpoint.every_steps=2", *COMMON, f"run.root={tmp_path}")
    for operation in range(20, 120, 9):
        life(*command, operation=operation)
    assert life(*command).status == 0
    (folder,) = run_directories(tmp_path)
    commits = {manifest.parse_commit(path.name) for path in (folder / "commits").iterdir()}
    data = {manifest.parse_data(path.name) for path in (folder / "data").iterdir()}
    assert len(commits) <= 3
    assert data == commits

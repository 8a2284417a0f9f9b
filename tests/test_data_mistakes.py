"""What a user may do wrong with data: each has a message that says what, where and what to do about it."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from lives import Ended, Lives
from mine.data import write_shards

from runner.data.ledger import read_segments
from runner.runs.__main__ import main as runs
from runner.storage import LocalLocation

USER = Path(__file__).parent / "user"

Live = Callable[..., Ended]


def lived(life: Lives, root: Path, *more: str, experiment: str = "rows", step: int | None = None) -> Ended:
    """One life of a user's experiment."""
    common = (f"experiment={experiment}", f"run.root={root}", "run.name=r", "trainer.max_steps=8")
    return life("--config-dir", "conf", *common, *more, cwd=USER, step=step)


@pytest.fixture
def live(life: Lives, tmp_path: Path) -> Live:
    """Lives in a root of this test."""
    return partial(lived, life, tmp_path)


@pytest.fixture(scope="module")
def killed(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 4."""
    root = tmp_path_factory.mktemp("killed")
    assert lived(life, root, step=4).status is None
    return root / "rows/r"


def using(name: str) -> str:
    return f"data.train._target_=mine.data.{name}"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((using("Unsized"),), ["data.train is of class Unsized without __len__; both are needed"]),
        (("data.train.size=0",), ["data.train is empty: Rows of length 0"]),
        (("data.validation.size=0",), ["data.validation is empty"]),
        ((using("Stateless"),), ["Stateless", "state_dict", "data.replay=true", "__getitem__"]),
        (
            ("data.validation._target_=mine.data.Iterable",),
            ["data.validation is of class Iterable without __len__ and __getitem__"],
        ),
        ((using("Hidden"),), ["sample 0 of Hidden", "drawn again", "np.random.default_rng()", "runtime.audit=false"]),
        (("data.validation._target_=mine.data.Hidden",), ["of Hidden", "drawn again with the same seed"]),
        ((using("Counter"),), ["of Counter", "a counter, cache or buffer that changes from call to call"]),
        (
            (using("ByProcess"), "runtime.num_workers=1"),
            ["of ByProcess", "is different in a data worker than in this process", "the pid"],
        ),
        (("data.randomness='off'",), ["of Rows draws random numbers", "data.randomness=sample"]),
        (
            (using("WithLambda"), "runtime.num_workers=1", "runtime.start_method=spawn"),
            ["data workers", "spawn", "lambda", "runtime.start_method=fork"],
        ),
        (
            (using("Broken"),),
            ["of Broken cannot be read (position", "KeyError: 'label'", "data.py", "data.on_bad_record=substitute"],
        ),
        ((using("Broken"), "runtime.num_workers=2"), ["of Broken cannot be read", 'raise KeyError("label")']),
        (
            ("data.collate={_target_:json.dumps}", "runtime.num_workers=1", "runtime.check_batches=0"),
            [
                "data.train: the ",
                " samples from position 0 on cannot be collated",
                "TypeError",
                "data.collate raised it",
            ],
        ),
        (
            ("data.validation._target_=mine.data.Unreadable",),
            ["sample 0 of Unreadable cannot be read", "take it out of data.validation"],
        ),
        (("data.max_tokens=100",), ["data.max_tokens needs the length of every sample", "(Rows) has no lengths"]),
        ((using("Sentences"), "data.max_tokens=5"), ["tokens, more than data.max_tokens=5"]),
        ((using("Sentences"), "data.max_tokens=50", "data.tail=drop"), ["data.tail=drop", "data.max_tokens"]),
        (("data.tail=pad",), ["data.tail", "pad", "carry", "drop"]),
        (("data.on_bad_record=ignore",), ["on_bad_record", "stop", "substitute"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_mistake_is_reported(more: tuple[str, ...], told: list[str], live: Live) -> None:
    ended = live(*more)
    assert ended.status in (1, 2), ended.output
    assert "most recent call" not in ended.output
    assert [word for word in told if word not in ended.output] == [], ended.output


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("data.train.size=99",), ["samples: 100 then, 99 now"]),
        (("data.shuffle=false",), ["shuffle: True then, False now"]),
        (("data.randomness=batch",), ["randomness: sample then, batch now"]),
        (("seed=2",), ["seed: 0 then, 2 now"]),
        ((using("Hidden"), "runtime.audit=false"), ["sample 0[0]: float32[8] of magnitude"]),
        ((using("Iterable"),), ["data.train is an iterable now (Iterable) and was map-style"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_other_data_under_an_accepted_drift_is_refused(
    change: tuple[str, ...], told: list[str], killed: Path, live: Live, tmp_path: Path
) -> None:
    """Nobody can accept that samples are repeated or missed."""
    shutil.copytree(killed, tmp_path / "rows/r")
    ended = live(*change, "run.on_drift=accept")
    assert ended.status == 1, ended.output
    assert "run.name=" in ended.output
    assert [word for word in told if word not in ended.output] == [], ended.output


def test_a_changed_file_under_the_same_name_is_refused(live: Live, tmp_path: Path) -> None:
    def write(scale: float) -> None:
        (tmp_path / "rows.txt").write_text("".join(f"{' '.join([str(scale * n)] * 8)}\n" for n in range(100)))

    command = (using("File"), f"+data.train.path={tmp_path}/rows.txt")
    write(1.0)
    assert live(*command, step=4).status is None
    write(1.5)
    ended = live(*command)
    assert ended.status == 1, ended.output
    assert "sample 33[0]: float32[8] of magnitude 33 +- 0 then, float32[8] of magnitude 49.5 +- 0 now" in ended.output
    write(1.0)
    assert live(*command).status == 0


def test_changed_validation_data_is_reported(live: Live, tmp_path: Path) -> None:
    command = ("data.validation._target_=mine.data.File", f"+data.validation.path={tmp_path}/rows.txt")
    (tmp_path / "rows.txt").write_text("1 2 3 4 5 6 7 8\n" * 30)
    assert live(*command, step=4).status is None
    (tmp_path / "rows.txt").write_text("1 2 3 4 5 6 7 9\n" * 31)
    ended = live(*command)
    assert ended.status == 0, ended.output
    assert "changed  data.validation is not what it was" in ended.output
    assert "30 samples then, 31 now; sample 0[0]: float32[8] of magnitude" in ended.output


def test_changed_shards_are_refused(live: Live, tmp_path: Path) -> None:
    command = (f"data.train.path={tmp_path}/shards",)
    write_shards(str(tmp_path / "shards"), [30, 70])
    assert live(*command, experiment="sharded", step=4).status is None
    write_shards(str(tmp_path / "shards"), [31, 69])
    ended = live(*command, experiment="sharded")
    assert ended.status == 1
    assert "fingerprint: " in ended.output


def test_a_bad_record_of_a_shard_is_named_with_shard_and_offset(live: Live, tmp_path: Path) -> None:
    write_shards(str(tmp_path / "shards"), [30, 70])
    with (tmp_path / "shards" / "000.jsonl").open("a") as file:
        file.write("{broken\n")
    ended = live(f"data.train.path={tmp_path}/shards", experiment="sharded")
    assert ended.status == 1
    assert f"{tmp_path}/shards/000.jsonl, record 30, in the block at byte 0 of Records cannot be read" in ended.output


def test_substitutes_are_reported_and_counted(live: Live, tmp_path: Path) -> None:
    ended = live(using("Broken"), "data.on_bad_record=substitute")
    assert ended.status == 0
    assert "bad      sample 7: KeyError: 'label'; sample " in ended.output
    assert '"substituted_samples": 1' in (tmp_path / "rows" / "r" / "result.json").read_text()


def test_a_step_done_again_takes_the_substitutes_it_had(live: Live, tmp_path: Path) -> None:
    """A file that was out of reach in the first life is there again in the second."""
    gone = tmp_path / "gone"
    more = (using("Remote"), f"+data.train.gone={gone}", "data.on_bad_record=substitute", "checkpoint.every_steps=3")
    gone.touch()
    assert live(*more, step=6).status is None
    gone.unlink()
    ended = live(*more, "runtime.num_workers=1")
    assert ended.status == 0, ended.output
    first, again = read_segments(LocalLocation(tmp_path / "rows" / "r"))
    assert first.lines[3:5] == again.lines[:2]
    assert any(line.substitutions for line in again.lines[:2])
    assert not any(line.substitutions for line in again.lines[2:]), "what was not read before is read now"
    assert runs(["audit", str(tmp_path / "rows" / "r")]) == 0


def test_a_sample_that_is_lost_later_can_be_accepted(live: Live, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    more = (using("Remote"), f"+data.train.gone={gone}", "data.on_bad_record=substitute", "checkpoint.every_steps=3")
    assert live(*more, step=6).status is None
    gone.touch()
    ended = live(*more)
    assert ended.status == 1
    assert "step 4 is done again and has other samples" in ended.output
    assert "run.on_drift=accept" in ended.output
    ended = live(*more, "run.on_drift=accept")
    assert ended.status == 0, ended.output
    assert "changed  step 4 is done again" in ended.output
    assert runs(["audit", str(tmp_path / "rows" / "r")]) == 1


def test_none_in_place_of_a_sample_is_reported(live: Live) -> None:
    ended = live(using("Holes"))
    assert ended.status == 1
    for told in ("of Holes cannot be read", "__getitem__ returned None", "data.on_bad_record=substitute"):
        assert told in ended.output
    ended = live(using("Holes"), "data.on_bad_record=substitute", "run.name=another")
    assert ended.status == 0, ended.output


def test_a_data_set_without_one_good_sample_ends_the_run(live: Live) -> None:
    ended = live(using("Unreadable"), "data.on_bad_record=substitute")
    assert ended.status == 1
    assert "8 others in its place could not be read either" in ended.output

"""TensorBoard reads one curve, however many attempts wrote it."""

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runner.errors import StorageError
from runner.metrics.tensorboard import TensorBoardWriter
from runner.metrics.writer import WriterContext
from runner.storage import local
from runner.storage.local import LocalLocation

FOLDER = "tensorboard"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts lie at least a second apart: TensorBoard orders files by the second in their names."""
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))


def writer(folder: Path, *, attempt: int = 1, after: int = 0) -> TensorBoardWriter:
    return TensorBoardWriter(WriterContext(LocalLocation(folder), "e", "e/r", {}, attempt, after))


def attempt(folder: Path, number: int, first: int, steps: Iterable[int]) -> None:
    """Attempt ``number``, which resumed from the step before ``first``."""
    curves = writer(folder, attempt=number, after=first - 1)
    for step in steps:
        curves.add(step, {"loss": number + step / 100, "sample": f"{step} by {number}"})
    curves.close("finished")


def scalars(folder: Path) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / FOLDER), size_guidance={"scalars": 0})
    found.Reload()
    return [(event.step, round(event.value, 2)) for event in found.Scalars("loss")]


def texts(folder: Path) -> list[tuple[int, bytes]]:
    """As TensorBoard's own pages read them; the class above is for people's scripts and keeps texts taken back."""
    found = plugin_event_accumulator.EventAccumulator(str(folder / FOLDER), tensor_size_guidance={"text": 0})
    found.Reload()
    return [(event.step, event.tensor_proto.string_val[0]) for event in found.Tensors("sample/text_summary")]


def test_each_step_is_there_once_from_the_attempt_that_counts(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 1, range(1, 6))
    attempt(tmp_path, 2, 4, range(4, 8))  # resumed from step 3
    attempt(tmp_path, 3, 8, range(8, 9))  # resumed from step 7
    attempt(tmp_path, 4, 6, range(6, 10))  # from step 5, because the commit of step 7 was damaged
    assert scalars(tmp_path) == [
        *((step, 1 + step / 100) for step in (1, 2, 3)),
        *((step, 2 + step / 100) for step in (4, 5)),
        *((step, 4 + step / 100) for step in (6, 7, 8, 9)),
    ]


def test_a_step_reported_again_replaces_its_first_report(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 1, [1, 2])
    attempt(tmp_path, 2, 3, [2, 3])
    assert scalars(tmp_path) == [(1, 1.01), (2, 2.02), (3, 2.03)]


def test_an_attempt_without_a_point_hides_discarded_ones(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 1, [1, 2, 3])
    attempt(tmp_path, 2, 3, [])
    assert scalars(tmp_path) == [(1, 1.01), (2, 1.02)]


def test_a_fresh_start_takes_everything_back(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 1, range(1, 6))
    attempt(tmp_path, 2, 1, [1])
    assert scalars(tmp_path) == [(1, 2.01)]


def test_a_clock_that_went_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(tmp_path, 1, 1, range(1, 4))
    monkeypatch.setattr(time, "time", lambda: 1_600_000_000.0)
    attempt(tmp_path, 2, 3, range(3, 6))
    attempt(tmp_path, 3, 5, [5])
    assert scalars(tmp_path) == [(1, 1.01), (2, 1.02), (3, 2.03), (4, 2.04), (5, 3.05)]


def test_texts_are_there_as_they_are(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 1, [1, 2])
    attempt(tmp_path, 2, 2, [2])
    assert texts(tmp_path) == [(1, b"```\n1 by 1\n```"), (2, b"```\n2 by 2\n```")]


def test_flushed_curves_are_readable_while_the_writer_lives(tmp_path: Path) -> None:
    curves = writer(tmp_path)
    curves.add(1, {"loss": 1.0})
    curves.flush()
    assert scalars(tmp_path) == [(1, 1.0)]
    curves.close("finished")


def test_files_say_which_attempt_wrote_them(tmp_path: Path) -> None:
    attempt(tmp_path, 7, 1, [1])
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert [name.rpartition("tfevents.")[2].partition(".")[2] for name in names] == ["hparams", "a000007.0001"]


def test_a_disk_that_is_full_for_a_while_costs_no_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = writer(tmp_path)
    curves.add(1, {"loss": 1.0})
    room = iter([20])  # bytes: the next record is torn

    def write(to: int, data: bytes, write: Callable[[int, bytes], int] = os.write) -> int:
        if left := next(room, 0):
            return write(to, data[:left])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(local.os, "write", write)
        curves.add(2, {"loss": 2.0})
        with pytest.raises(StorageError, match="No space left on device"):
            curves.flush()
    curves.add(3, {"loss": 3.0})
    curves.close("finished")
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]

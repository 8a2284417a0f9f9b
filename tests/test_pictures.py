"""Images, histograms, figures and texts: in TensorBoard once for each step, over any number of attempts."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from lives import Lives
from results import results
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.util.tensor_util import make_ndarray

from runner.callbacks.base import Loop
from runner.callbacks.reporting import Report, ShowProgress
from runner.errors import TaskError
from runner.metrics.tensorboard import summary
from runner.metrics.writer import MetricWriter, MetricWriters

USER = Path(__file__).parent / "user"
COMMAND = (
    "experiment=smoke",
    "+callbacks.pictures._target_=mine.callbacks.Pictures",
    "trainer.max_steps=12",
    "trainer.evaluate_every_steps=4",
    "checkpoint.every_steps=5",
    "runtime.num_threads=1",
)


def shown(run: Path) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard shows of each tag: steps, and the last bytes."""
    events = EventMultiplexer(tensor_size_guidance={"images": 0, "histograms": 0, "text": 0})
    events.AddRunsFromDirectory(str(run / "tensorboard")).Reload()
    tensors = {tag: events.Tensors(".", tag) for tag in ("image", "histogram", "text/text_summary")}
    return {tag: [(e.step, repr(make_ndarray(e.tensor_proto))) for e in each] for tag, each in tensors.items()}


def test_pictures_are_there_once_after_kills(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}")
    assert life(*command, "run.name=whole", cwd=USER).status == 0
    for step in (4, 9, 11):
        assert life(*command, "run.name=cut", cwd=USER, step=step).status is None
    assert life(*command, "run.name=cut", cwd=USER).status == 0
    whole, cut = tmp_path / "smoke/whole", tmp_path / "smoke/cut"
    assert not results(cut).differences(results(whole))
    assert shown(cut) == shown(whole)
    assert [step for step, _ in shown(cut)["image"]] == [3, 6, 9, 12]
    assert [step for step, _ in shown(cut)["text/text_summary"]] == [4, 8, 12]


def test_every_kind_of_value_is_encoded() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure(figsize=(1, 1))
    values = [figure, torch.rand(4, 5), np.zeros((3, 4, 5), np.uint8), torch.rand(2, 3, 4, 5).bfloat16()]
    heights = [Summary.FromString(summary("x", value)).value[0].image.height for value in values]
    assert heights[:3] == [100, 4, 4]
    assert Summary.FromString(summary("x", torch.arange(9))).value[0].histo.num == 9
    assert Summary.FromString(summary("x", torch.tensor([1.0, float("nan")]))).value[0].histo.num == 1
    assert b"finite" in summary("x", torch.tensor([float("inf")]))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.tensor(1.0), "Tensor of shape []"),
        (torch.rand(0, 3), "Tensor of shape [0, 3]"),
        (np.zeros((32, 30, 3), np.float32), "ndarray of shape [32, 30, 3]"),
        (torch.zeros(2, 5, 8, 8), "Tensor of shape [2, 5, 8, 8]"),
        (torch.zeros(4, dtype=torch.complex64), "Tensor of shape [4]"),
        (object(), "object"),
        (["a"], "list"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(value: object, kind: str) -> None:
    with pytest.raises(TaskError, match=re.escape(f"log('x') got a {kind}; expected a text, a figure")):
        summary("x", value)


def test_what_waits_for_its_evaluation_is_saved() -> None:
    """A step whose evaluation is interrupted is reported by the next attempt."""
    keeper = Keeper()
    writers = MetricWriters({"kept": keeper})
    report = Report(10, writers, None, None)  # type: ignore[arg-type]
    loop = Loop(None, None, step=3, evaluation_due=True)  # type: ignore[arg-type]
    report._log("note", "of step 3")
    report._report(loop)
    again = Report(10, writers, None, None)  # type: ignore[arg-type]
    again.load_state_dict(report.state_dict())
    loop.evaluation_due = False
    again._report(loop)
    assert keeper.items == [(3, "note", b"of step 3")]
    assert "logged" not in again.state_dict()


class Keeper(MetricWriter):
    """A writer that keeps what is logged."""

    def __init__(self) -> None:
        self.items: list[tuple[int, str, bytes]] = []

    def log(self, step: int, summaries: Mapping[str, bytes]) -> None:
        for name, each in summaries.items():
            self.items.append((step, name, Summary.FromString(each).value[0].tensor.string_val[0]))


def test_progress_shows_what_fits_or_what_is_asked_for() -> None:
    metrics = {"accuracy": torch.tensor(0.5), "loss": torch.tensor(2.0), "x" * 100: torch.tensor(1.0)}
    loop = Loop(None, None, metrics=metrics)  # type: ignore[arg-type]
    assert ShowProgress()._metrics(loop) == "loss 2, accuracy 0.5"
    assert ShowProgress(["accuracy", "gone"])._metrics(loop) == "accuracy 0.5"
    assert ShowProgress(["x" * 100])._metrics(loop) == f"{'x' * 100} 1"

"""TensorBoard's HParams tab: one row per run, with what it computes and its objective. Read as the tab itself does."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from results import metric_lines
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from runner.metrics import tensorboard
from runner.storage.local import LocalLocation

COMMAND = ("experiment=smoke", "trainer.max_steps=8", "trainer.evaluate_every_steps=2", "checkpoint.every_steps=2")
LAST = "trainer.evaluate_every_steps=2,trainer.max_steps=8"


@dataclass(frozen=True)
class Row:
    """What the table says of a run."""

    status: str
    hparams: dict[str, float | str]
    metrics: dict[str, float]


def table(folder: Path) -> tuple[dict[str, Row], list[str]]:
    """The rows of a log directory by their names, and the columns whose values differ."""
    events = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(events, str(folder))))
    request = api_pb2.ListSessionGroupsRequest(allowed_statuses=api_pb2.Status.values(), slice_size=100)
    rows = {}
    for group in list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups:
        (session,) = group.sessions
        values = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        metrics = {metric.name.tag: metric.value for metric in session.metric_values}
        rows[group.name.removesuffix("/tensorboard")] = Row(api_pb2.Status.Name(session.status), values, metrics)
    experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
    return rows, [column.name for column in experiment.hparam_infos if column.differs]


def test_a_sweep_is_a_table_of_settings_and_objectives(life: Lives, tmp_path: Path) -> None:
    """A run with a default shows it like one to which it was said, so that no cell of a swept column is empty."""
    assert life("-m", *COMMAND, f"run.root={tmp_path}", "optimizer.lr=0.1,0.003").status == 0
    assert life(*COMMAND, f"run.root={tmp_path}", "trainer.clip_norm=1").status == 0
    rows, differing = table(tmp_path / "smoke")
    assert differing == ["optimizer.lr", "trainer.clip_norm"]
    assert {(row.hparams["optimizer.lr"], row.hparams["trainer.clip_norm"]) for row in rows.values()} == {
        *((0.1, "null"), (0.003, "null"), (0.001, 1.0))
    }
    for name, row in rows.items():
        result = json.loads((tmp_path / "smoke" / name / "result.json").read_text())
        assert row.metrics["best/val/accuracy"] == pytest.approx(result["objective"]["value"])
        assert (row.status, row.hparams["experiment"], row.hparams["seed"]) == ("STATUS_SUCCESS", "smoke", 0.0)
        assert all(path.is_file() for path in (tmp_path / "smoke" / name / "tensorboard").iterdir())


def test_a_killed_run_shows_its_best_and_resumes_in_its_row(life: Lives, tmp_path: Path) -> None:
    found = []
    for step in (3, 5, None):
        ended = life(*COMMAND, f"run.root={tmp_path}", **({} if step is None else {"step": step}))
        assert ended.status == (None if step else 0)
        ((name, row),) = table(tmp_path / "smoke")[0].items()
        assert (name, row.hparams["optimizer.lr"]) == (LAST, 0.001)
        found.append((row.status, row.metrics["best/val/accuracy"]))
    reached = {line["step"]: line["val/accuracy"] for line in metric_lines(tmp_path / "smoke" / LAST)}
    best = [max(reached[step] for step in reached if step <= last) for last in (2, 4, 8)]
    assert [status for status, _ in found] == ["STATUS_UNKNOWN", "STATUS_UNKNOWN", "STATUS_SUCCESS"]
    assert [value for _, value in found] == pytest.approx(best)


def test_the_row_shows_the_accepted_drift(life: Lives, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}", "run.name=r")
    assert life(*command).status == 0
    assert life(*command, "trainer.max_steps=12", "run.on_drift=accept", step=9).status is None
    row = table(tmp_path / "smoke")[0]["r"]
    assert (row.status, row.hparams["trainer.max_steps"]) == ("STATUS_UNKNOWN", 12.0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((3, 3.0), (1e-3, 1e-3), (2**53 + 1, "9007199254740993"), (math.inf, "Infinity")),
        *((True, "true"), (None, "null"), ([0.9, 0.95], "[0.9, 0.95]"), ({}, "{}")),
        *(("bf16", "bf16"), ("a\x1b[2J", "a\\x1b[2J"), ("\udc80", "\\udc80")),
    ],
)
def test_numbers_are_numbers_and_all_else_is_text(value: Any, shown: float | str, tmp_path: Path) -> None:
    tensorboard.write_hparams(LocalLocation(tmp_path), "e", {"model": {"x": value}}, finished=False)
    assert table(tmp_path)[0]["tensorboard"].hparams == {"experiment": "e", "model.x": shown}

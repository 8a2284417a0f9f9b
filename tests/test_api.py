"""``import runner`` in notebooks and scripts: training in another process, opened runs, the table."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from lives import USER, Lives
from marks import slow
from safetensors.torch import load_file
from waiting import until

import runner
from runner.api import _literal
from runner.errors import ConfigError, DriftRefused, StateError

SMOKE = ("experiment=smoke", "trainer.max_steps=30", "trainer.evaluate_every_steps=10", "run.name=r")


@pytest.fixture(scope="module")
def folder(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run whose last weights are not its best, by an objective that falls."""
    folder = tmp_path_factory.mktemp("runs")
    worse = ("objective.mode=min", "objective.metric=val/accuracy", "checkpoint.keep_every_steps=20")
    ended = life(*SMOKE, *worse, f"run.root={folder}/outputs")
    assert ended.status == 0, ended.output
    return folder


@pytest.fixture
def run(folder: Path) -> runner.Run:
    return runner.open(folder / "outputs/smoke/r")


def script(text: str, folder: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(Path(runner.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", text], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_the_import_is_cheap(tmp_path: Path) -> None:
    text = "import runner, sys; print(len(dir(runner)), {'torch', 'hydra', 'yaml', 'runner.api'} & {*sys.modules})"
    with script(text, tmp_path) as process:
        assert process.communicate()[0].split()[-1] == "set()"
    assert {"open", "table", "train", "Run"} <= {*dir(runner)}
    with pytest.raises(AttributeError, match="no attribute 'tabel'"):
        runner.tabel  # type: ignore[attr-defined]  # noqa: B018


def test_a_run_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own; under the name and with the errors of the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings: dict[str, Any] = {"optimizer": {"lr": 0.02}, "trainer": {"max_steps": 20}}
    first = runner.train("smoke", "checkpoint.keep_last=3", **settings)
    assert "finished step 20" in capsys.readouterr().out
    assert (Path(first.url).name, first.status) == ("optimizer.lr=0.02,trainer.max_steps=20", "complete")
    again = runner.train("smoke", quiet=True, **settings)
    assert (again.url, again.result, len([*Path(first.url).glob("attempts/*.end.json")])) == (
        first.url,
        first.result,
        1,
    )
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"optimizer\.lrr"):
        runner.train("smoke", quiet=True, optimizer={"lrr": 1})
    with pytest.raises(DriftRefused, match=r"trainer\.max_steps +20 +40"):
        runner.train(
            "smoke", quiet=True, run={"name": Path(first.url).name}, trainer={"max_steps": 40}, optimizer={"lr": 0.02}
        )


@pytest.mark.parametrize("end", [signal.SIGINT, slow(signal.SIGKILL)])
def test_an_interrupted_notebook_saves_its_run(end: int, tmp_path: Path) -> None:
    """By its stop button, or because its process is killed."""
    text = "import runner; runner.train('smoke', trainer={'max_steps': 10**7}, checkpoint={'every_steps': 10**6})"
    with script(text, tmp_path) as process:
        beats = "outputs/*/*/attempts/*.beat"
        until(lambda: any(re.search(r'"step": [1-9]', path.read_text()) for path in tmp_path.glob(beats)))
        process.send_signal(end)
        ended = tmp_path.glob("outputs/*/*/attempts/*.end.json")
        until(lambda: [*tmp_path.glob("outputs/*/*/attempts/*.end.json")] != [])
        assert json.loads(next(ended).read_text())["outcome"] == "interrupted"
        process.communicate()
        assert process.returncode in (1, -end)
    assert [*tmp_path.glob("outputs/*/*/commits/*.json")]


def test_an_opened_run_has_its_config_and_metrics(run: runner.Run) -> None:
    assert (run.config.optimizer.lr, run.config.data.batch_size) == (0.001, 64)
    assert run.result
    assert run.result["metrics"]["val/loss"] == run.metrics[-1]["val/loss"]
    assert (run.step, repr(run)) == (30, f"Run({run.url!r}, complete, step 30)")


@pytest.mark.parametrize(
    ("which", "file"), [(None, "best"), ("best", "best"), ("last", "model"), (30, "model"), (20, "")]
)
def test_a_model_has_the_weights_of_a_checkpoint(which: Any, file: str, run: runner.Run) -> None:
    state = torch.get_rng_state()
    model = run.model(which)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    files = {name: load_file(f"{run.url}/{name}.safetensors") for name in ("best", "model")}
    same = {
        name: all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        for name, weights in files.items()
    }
    assert same == {"best": file == "best", "model": file == "model"}


def test_a_model_computes_what_the_run_reported(run: runner.Run) -> None:
    data = run.data("validation")
    batch = torch.utils.data.default_collate([data[n] for n in range(len(data))])
    with torch.no_grad():
        loss = run.task().evaluation_step(run.model("last"), batch)["loss"]
    assert run.result
    assert abs(float(loss) - run.result["metrics"]["val/loss"]) < 1e-5


def test_several_data_sets_are_opened_by_name(run: runner.Run, tmp_path: Path) -> None:
    shutil.copytree(run.url, tmp_path / "several")
    config = yaml.safe_load((tmp_path / "several/config.yaml").read_text())
    config["data"]["validation"] = {"a": config["data"]["validation"], "b": config["data"]["train"]}
    (tmp_path / "several/config.yaml").write_text(json.dumps(config))  # YAML, too, and without aliases
    several = runner.open(tmp_path / "several")
    both, sizes = several.data(), [len(run.data(name)) for name in ("validation", "train")]
    assert [*both] == ["a", "b"]
    assert [len(each) for each in both.values()] == sizes
    assert len(several.data("validation.b")) == sizes[1]
    with pytest.raises(ConfigError, match="has no data set valid: expected train, validation"):
        several.data("valid")


def test_what_cannot_be_opened_is_explained(run: runner.Run, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        runner.open(folder)
    with pytest.raises(ConfigError, match="no checkpoint of step 7; it has checkpoints of steps"):
        run.model(7)
    other = tmp_path / "other"
    shutil.copytree(run.url, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["hidden"] = [3]
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(StateError, match="do not fit the model as it is built now"):
        runner.open(other).model()


def test_average_and_memory_of_the_task_are_loaded(life: Lives, tmp_path: Path) -> None:
    own = ("--config-dir", f"{USER}/conf", "experiment=exact", f"run.root={tmp_path}", "run.name=r")
    assert life(*own, "trainer.ema_decay=0.9", cwd=USER).status == 0
    run = runner.open(tmp_path / "exact/r")
    weights = load_file(f"{run.url}/model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in run.model("last").state_dict().items())
    assert run.task("last") is not None


def test_the_table_has_parameters_and_metrics(life: Lives, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    assert life(*SMOKE[:-1], "optimizer.lr=0.05", f"run.root={folder}/outputs", "run.name=faster").status == 0
    table = runner.table(folder / "outputs")
    assert sorted(table.index) == ["smoke/faster", "smoke/r"]
    assert table.loc["smoke/faster", "optimizer.lr"] == 0.05
    assert table["val/loss"].notna().all()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="needs pandas"):
        runner.table(folder / "outputs")


@pytest.mark.parametrize(
    "value",
    [
        "a",
        "a b",
        'say "x"',
        "back\\",
        "true",
        "1",
        "",
        None,
        True,
        0.1,
        1e-20,
        float("inf"),
        [1, "a,b"],
        {"a": {"b": [None]}},
    ],
)
def test_values_are_those_of_the_command_line(value: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={_literal(value)}"])
    assert override.value() == value


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor([1, 2])])
def test_values_of_numpy_and_torch_are_numbers(value: Any) -> None:
    """``for lr in np.logspace(-4, -1, 4)`` is what a notebook has."""
    (override,) = OverridesParser.create().parse_overrides([f"key={_literal(value)}"])
    assert override.value() == value.tolist()


def test_a_value_that_no_command_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a builtin_function_or_method; expected a number, a text"):
        _literal([print])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Every cell in order, without Jupyter."""
    pytest.importorskip("pandas")
    notebook = json.loads((Path(__file__).parent.parent / "docs/howto/notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with script("\n".join(cells), tmp_path) as process:
        process.communicate()
        assert process.returncode == 0

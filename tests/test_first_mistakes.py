"""What a newcomer gets wrong in files of their own is named, with the remedy."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lives import Lives
from marks import slow
from omegaconf import OmegaConf

from runner.build import instance
from runner.errors import ConfigError, import_hint
from runner.optimizers import takes_metric

MODULE = """
from torch.nn import functional as F

from runner.task import Task


class Bare(Task):
    def training_step(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])


def net():
    try:
        [][0]
    except IndexError as error:
        raise ValueError("no weights") from error
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``own_file`` of the user."""
    (tmp_path / "own_file.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_file", raising=False)
    return tmp_path


def mistake(target: str) -> str:
    with pytest.raises(ConfigError) as caught:
        instance(OmegaConf.create({"_target_": target}), "model")
    return str(caught.value)


def test_a_similar_name_of_the_module_is_offered(own: Path) -> None:
    assert f"Did you mean own_file.net? own_file is {own}/own_file.py" in mistake("own_file.nett")
    assert "Did you mean torch.optim.Adam?" in mistake("torch.optim.Adm")


def test_the_extra_of_a_missing_package_is_named() -> None:
    missing = ModuleNotFoundError("No module named 'trackio.api'", name="trackio.api")
    assert import_hint(missing) == " Install it: pip install 'hydra-runner[trackio]'"


@pytest.mark.parametrize("plugin", ["launcher=joblib", slow("launcher=slurm"), slow("sweeper=optuna")])
def test_the_extra_of_a_missing_plugin_is_named(plugin: str, tmp_path: Path) -> None:
    """Without any plugin of Hydra, as where only the package itself is installed."""
    code = "import sys; sys.modules['hydra_plugins'] = None; from runner.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "-m", "experiment=smoke", f"hydra/{plugin}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    extra = plugin.partition("=")[2]
    assert done.stderr.endswith(f": pip install 'hydra-runner[{extra}]'\n"), done.stderr


def test_a_target_needs_its_module() -> None:
    assert mistake("Net") == "model._target_: Net needs its module and a dot, as in my_module.Net"
    assert mistake("mine:Net") == "model._target_: mine:Net needs its module and a dot, as in mine.Net"


def test_an_error_of_a_constructor_comes_with_its_cause(own: Path) -> None:
    said = mistake("own_file.net")
    assert said.startswith("model: own_file.net raised\n")
    assert said.index("IndexError: list index out of range") < said.index("ValueError: no weights")
    assert "[][0]" in said
    assert "instantiate" not in said


@pytest.mark.parametrize(("file", "option"), [("experiment/smoke", "experiment=smoke"), ("config", "config.yaml")])
def test_a_file_of_a_package_name_is_refused(file: str, option: str, life: Lives, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / f"{file}.yaml").write_text("# @package _global_\nseed: 3\n")
    ended = life("--config-dir", str(tmp_path), "experiment=smoke", f"run.root={tmp_path}/runs")
    assert (ended.status, f"{option} is an option of the package" in ended.output) == (2, True), ended.output
    assert f"rename your own, {tmp_path}/{file}.yaml" in ended.output


def test_a_removed_working_directory_is_named(tmp_path: Path) -> None:
    code = "import sys; from runner.__main__ import console; sys.exit(console())"
    words = [sys.executable, "-c", code, "experiment=smoke", "run.name=r"]
    script = f'cd {tmp_path} && rmdir {tmp_path} && exec "$@"'
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, text=True, check=False, env=path)
    assert (ended.returncode, ended.stderr.partition(":")[0]) == (1, "the working directory was removed"), ended.stderr


def test_an_evaluation_by_the_training_step_names_it(life: Lives, own: Path) -> None:
    task = ("task._target_=own_file.Bare", "~task.label_smoothing")
    ended = life("experiment=smoke", *task, f"run.root={own}/runs", cwd=own)
    assert "the evaluation failed: Bare.training_step returned a tensor of shape []" in ended.output, ended.output


class Plateau:
    def step(self, metrics: Any, epoch: int | None = None) -> None: ...


class ByEpoch:
    def step(self, epoch: int, metric: Any = None) -> None: ...


def test_the_number_of_an_epoch_is_no_metric() -> None:
    assert takes_metric(Plateau())
    assert not takes_metric(ByEpoch())

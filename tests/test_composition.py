"""A new ``_target_`` starts clean, and ``imports`` come before everything else."""

import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from lives import Lives
from omegaconf import DictConfig, OmegaConf

from runner import app
from runner.config import composition
from runner.config.identity import RENAMED, compare
from runner.errors import ConfigError

SGD = "optimizer._target_=torch.optim.SGD"


@pytest.fixture
def experiment(tmp_path: Path) -> Any:
    """Compose with files of a user's folder: ``name=text``."""

    def compose_with(*overrides: str, **files: str) -> DictConfig:
        for name, text in files.items():
            path = tmp_path / "experiment" / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text("# @package _global_\n" + dedent(text))
        with initialize_config_dir(str(app.CONFIGS), version_base="1.3"):
            return compose("config", overrides=[f"hydra.searchpath=[{tmp_path}]", *overrides])

    return compose_with


def optimizer(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config.optimizer)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "_target_"}


ADAMW = {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ((), ADAMW),
        (("optimizer.lr=2",), {**ADAMW, "lr": 2}),
        (("optimizer._target_=torch.optim.AdamW",), ADAMW),
        ((SGD,), {}),
        ((SGD, "optimizer.lr=2"), {"lr": 2}),
        (("optimizer.lr=2", SGD), {"lr": 2}),
        (("optimizer.lr=0.001", SGD), {"lr": 0.001}),  # given, though it is the default
        ((SGD, "+optimizer.momentum=0.5", "~optimizer.betas"), {"momentum": 0.5}),
        (("+optimizer={_target_:torch.optim.SGD,momentum:0.5}",), {"momentum": 0.5}),
        (("optimizer=adamw", SGD), ADAMW),  # chosen
        (("~optimizer", f"+{SGD}"), {}),
    ],
)
def test_keys_of_the_default_go_with_its_target(experiment: Any, overrides: tuple[str, ...], keys: Any) -> None:
    assert optimizer(experiment("experiment=smoke", *overrides)) == keys


FILES = {
    "own": "optimizer: {_target_: torch.optim.SGD, momentum: 0.5}",
    "rate": "optimizer: {lr: 0.5}",
    "chosen": "defaults: [override /optimizer: adamw]\noptimizer: {_target_: mine.Adam}",
    "child": "defaults: [own]\noptimizer: {lr: 0.5}",
    "target": "defaults: [rate]\noptimizer: {_target_: torch.optim.SGD}",
    "several": "optimizer: {one: {_target_: torch.optim.SGD, lr: 1}, two: {_target_: torch.optim.Adam}}",
    "schedule": "scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 2}",
}


@pytest.mark.parametrize(
    ("name", "overrides", "keys"),
    [
        ("own", (), {"momentum": 0.5}),
        ("own", ("optimizer.lr=3",), {"momentum": 0.5, "lr": 3}),
        ("own", ("optimizer.momentum=0.9",), {"momentum": 0.9}),
        ("own", ("optimizer=adamw",), {**ADAMW, "momentum": 0.5}),
        ("rate", (SGD,), {"lr": 0.5}),
        ("rate", (), {**ADAMW, "lr": 0.5}),
        ("chosen", (), ADAMW),
        ("child", (), {"momentum": 0.5, "lr": 0.5}),
        ("target", (), {"lr": 0.5}),
        ("several", (), {"one": {"_target_": "torch.optim.SGD", "lr": 1}, "two": {"_target_": "torch.optim.Adam"}}),
    ],
)
def test_so_they_do_in_files(experiment: Any, name: str, overrides: tuple[str, ...], keys: Any) -> None:
    config = experiment(f"experiment={name}", *overrides, **FILES)
    assert optimizer(config) == keys
    assert ("_target_" in config.optimizer) == (name != "several")


def test_of_the_scheduler_too(experiment: Any) -> None:
    config = experiment("experiment=schedule", **FILES)
    assert set(config.scheduler) == {"_target_", "step_size"}


TWO = "{clean: {_target_: mine.data.Rows}, noisy: {_target_: mine.data.Rows, noise: 1}}"
SETS = {
    "option": "defaults: [override /data: digits]",
    "file": f"defaults: [override /data: digits]\ndata: {{validation: {TWO}, test: {TWO}}}",
    "fold": "data: {validation: {_target_: runner.datasets.folds.Fold, split: validation, folds: 4}}",
    "grandchild": f"defaults: [fold]\ndata: {{validation: {TWO}}}",
    "back": "defaults: [grandchild]\ndata: {validation: {_target_: mine.data.Rows, size: 3}}",
    "source": "defaults: [fold]\ndata: {validation: {source: {_target_: mine.data.Rows}}}",
    "size": "defaults: [grandchild]\ndata: {validation: {noisy: {size: 3}}}",
}
CLEAN = "{clean:{_target_:mine.data.Rows},noisy:{_target_:mine.data.Rows}}"


@pytest.mark.parametrize(
    ("name", "overrides", "keys"),
    [
        ("option", (), {"_target_", "split"}),
        ("option", ("+data.validation.size=3",), {"_target_", "split", "size"}),
        ("option", (f"data.validation={CLEAN}",), {"clean", "noisy"}),
        ("option", ("+data.validation.clean._target_=mine.data.Rows",), {"clean"}),
        ("file", (), {"clean", "noisy"}),
        ("grandchild", (), {"clean", "noisy"}),
        ("grandchild", ("+data.validation.other={_target_:mine.data.Rows}",), {"clean", "noisy", "other"}),
        ("grandchild", ("+data.validation._target_=mine.data.Rows",), {"_target_"}),
        ("back", (), {"_target_", "size"}),
        ("source", (), {"_target_", "split", "folds", "source"}),  # an argument of Fold, no name
        ("size", (), {"clean", "noisy"}),
    ],
)
def test_one_set_and_several_are_not_merged(
    experiment: Any, name: str, overrides: tuple[str, ...], keys: set[str]
) -> None:
    config = experiment(f"experiment={name}", *overrides, **SETS)
    assert set(config.data.validation) == keys
    assert name != "file" or set(config.data.test) == keys


@pytest.mark.parametrize(
    "old", [{"file": "trainer: {most_steps: 7}"}, {"file": "", "word": "trainer.most_steps=7"}], ids=["file", "command"]
)
def test_an_old_name_of_a_key_is_read_with_a_warning(
    experiment: Any, old: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run that was made with it has not changed."""
    monkeypatch.setitem(RENAMED, "trainer.most_steps", "trainer.max_steps")
    words = [f"+{old['word']}"] if "word" in old else []
    config = experiment("experiment=renamed", *words, renamed=old["file"])
    assert config.trainer.max_steps == 7
    expected = "trainer.most_steps is now trainer.max_steps: the old name will not be read by the next version\n"
    assert capsys.readouterr().err == expected
    assert compare({"trainer": {"most_steps": 7}}, {"trainer": {"max_steps": 7}}) == []


REGISTERS = """
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

ConfigStore.instance().store(group="optimizer", name="registered", node={"_target_": "mine.Adam", "lr": 7})
OmegaConf.register_new_resolver("mine.double", lambda x: 2 * x, replace=True)
"""
IMPORTS = {
    "imports": """
        imports: [registrations]
        defaults: [override /optimizer: registered]
        optimizer: {decay: "${mine.double:4}"}
        """,
    "grandchild": "defaults: [imports]",
    "resolver": 'seed: "${mine.double:4}"',
    "missing": "imports: [nowhere.to_be]",
    "failing": "imports: [failing]",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "registrations.py").write_text(REGISTERS)
    (tmp_path / "failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "registrations", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["imports", "grandchild"])
def test_imports_come_before_composing(experiment: Any, modules: Path, name: str) -> None:
    config = experiment(f"experiment={name}", **IMPORTS)
    assert (config.optimizer.lr, config.optimizer.decay) == (7, 8)


def test_a_command_may_import(experiment: Any, modules: Path) -> None:
    assert experiment("experiment=resolver", "imports=[registrations]", **IMPORTS).seed == 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "imports: nowhere.to_be: ModuleNotFoundError: No module named 'nowhere' Python looked in "),
        ("failing", 'imports: failing: ZeroDivisionError: division by zero\n  File ".*failing.py", line 1'),
    ],
)
def test_an_import_that_fails_names_the_key(experiment: Any, modules: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        experiment(f"experiment={name}", **IMPORTS)


def test_a_module_that_fails_is_not_called_missing(life: Lives, tmp_path: Path, modules: Path) -> None:
    ended = life("experiment=smoke", "model._target_=failing.Net", f"run.root={tmp_path}/runs", cwd=modules)
    assert ended.status == 2
    assert "ZeroDivisionError" in ended.output
    assert "Are you sure" not in ended.output


def test_a_run_with_imports_is_resumed_without_drift(life: Lives, tmp_path: Path, modules: Path) -> None:
    """``imports`` may change between attempts: the values that the configuration has in the end are its identity."""
    command = ("experiment=smoke", "trainer.max_steps=8", f"run.root={tmp_path}/runs", "run.name=r")
    own = ('+params.wide="${mine.double:4}"', "imports=[registrations]")
    assert life(*command, *own, cwd=modules).status == 0
    ended = life(*command, "+params.wide=8", cwd=modules)
    assert ended.status == 0, ended.output
    assert "finished step 8" in ended.output


def test_a_run_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words, as_run, composed = ["experiment=smoke", "seed=3"], "hydra.mode=RUN", list[Any]()
    original = composition.create_defaults_list

    def counted(**options: Any) -> Any:
        composed.append(options)
        return original(**options)

    with initialize_config_dir(str(app.CONFIGS), version_base="1.3"):
        hydra: Any = GlobalHydra.instance().hydra
        expected = hydra.compose_config("config", [*words, as_run], RunMode.RUN)
        monkeypatch.setattr(composition, "create_defaults_list", counted)
        assert hydra.get_mode("config", words) is None
        assert hydra.compose_config("config", [*words, as_run], RunMode.RUN) == expected
        assert len(composed) == 1
        assert hydra.compose_config("config", [*words, as_run], RunMode.RUN) == expected, "only the first is kept"
        assert len(composed) == 2


@pytest.mark.parametrize("seeds", ["3", "3,4"])
def test_the_mode_of_a_sweep_is_found(seeds: str) -> None:
    with initialize_config_dir(str(app.CONFIGS), version_base="1.3"):
        hydra: Any = GlobalHydra.instance().hydra
        words = ["experiment=smoke", f"seed={seeds}"]
        sweep = [*words, "hydra.mode=MULTIRUN"]
        assert hydra.get_mode("config", [*words, "hydra.mode=RUN"]) is RunMode.RUN
        assert hydra.get_mode("config", sweep) is RunMode.MULTIRUN
        config = hydra.compose_config("config", sweep, RunMode.MULTIRUN)
        assert config.hydra.mode is RunMode.MULTIRUN
        assert config.hydra.overrides.hydra == sweep[-1:]

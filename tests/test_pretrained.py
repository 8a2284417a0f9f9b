"""``runs export --hf``: folders for ``from_pretrained``; adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lives import USER, Lives
from results import results

import runner
from runner.runs.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that are tried


@pytest.fixture
def trained(life: Lives, tmp_path: Path) -> Any:
    pytest.importorskip("transformers")

    def train(**model: bool) -> runner.Run:
        options = [f"model.{name}=true" for name in model]
        command = ("--config-dir", f"{USER}/conf", "experiment=pretrained", f"run.root={tmp_path}", "run.name=r")
        ended = life(*command, *options, cwd=USER)
        assert ended.status == 0, ended.output
        assert ("of them trained" in ended.output) == ("adapters" in model)
        return runner.open(tmp_path / "pretrained/r")

    return train


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_exported_model_is_loaded_by_transformers(
    wrapped: bool, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, folder = trained(**{"wrapped": True} if wrapped else {}), tmp_path / "folder"
    assert main(["export", f"{run.url}@best", str(folder), "--hf"]) == 0
    assert f"step {run.result['objective']['step']} of {run.url}: " in capsys.readouterr().out
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(8)[None]
    assert torch.equal(model(ids).logits, run.model("best")(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["c", "a"]) == [2, 0]
    assert main(["export", run.url, str(folder), "--hf"]) == 2
    assert "has files already" in capsys.readouterr().err
    assert main(["export", run.url, str(folder), "--hf", "--force"]) == 0


def test_of_a_model_with_adapters_they_alone_are_exported(trained: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from mine.pretrained import gpt2

    run, folder = trained(adapters=True), tmp_path / "folder"
    assert main(["export", run.url, str(folder), "--hf"]) == 0
    assert (folder / "adapter_model.safetensors").stat().st_size < 10_000
    assert not (folder / "model.safetensors").exists()
    base = run.model("last").get_base_model()
    state = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora" not in name}
    again = gpt2()
    again.load_state_dict(state)
    model, ids = peft.PeftModel.from_pretrained(again, folder).eval(), torch.arange(8)[None]
    assert torch.equal(model(ids).logits, run.model("last")(ids).logits)


def test_another_model_is_refused(life: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert life("experiment=smoke", "trainer.max_steps=2", f"run.root={tmp_path}", "run.name=r").status == 0
    assert main(["export", str(tmp_path / "smoke/r"), str(tmp_path / "folder"), "--hf"]) == 2
    assert "runner.models.mlp.MLP has no save_pretrained" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_adapters_resume_exactly_and_are_saved_alone(life: Lives, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = [f"model.model.config.{key}" for key in ("n_embd=16", "n_layer=1", "n_head=2")]
    small = (
        *config,
        "data.train.block_size=16",
        "data.validation.limit=8",
        "task.sample_bytes=4",
        "runtime.num_threads=1",
    )
    often = ("trainer.max_steps=8", "trainer.evaluate_every_steps=4", "checkpoint.every_steps=3")
    command = ("experiment=lora", *small, *often, f"run.root={tmp_path}")
    ended = life(*command, "run.name=whole")
    assert (ended.status, " of them trained" in ended.output) == (0, True), ended.output
    assert life(*command, "run.name=cut", step=5).status is None
    assert life(*command, "run.name=cut").status == 0
    cut = tmp_path / "lora/cut"
    assert not results(cut).differences(results(tmp_path / "lora/whole"))
    assert main(["export", str(cut), str(tmp_path / "adapters"), "--hf"]) == 0
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names

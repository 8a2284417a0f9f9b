"""Models of transformers and PEFT out of a run, for their ``from_pretrained``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lives import USER, Lives
from results import results

import runner

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
def test_a_trained_model_is_loaded_by_transformers(wrapped: bool, trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, ids = trained(**{"wrapped": True} if wrapped else {}), torch.arange(8)[None]
    model = run.model("best")
    next(part for part in model.modules() if hasattr(part, "save_pretrained")).save_pretrained(tmp_path / "folder")
    run.task().tokenizer.save_pretrained(tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "folder").convert_tokens_to_ids(["c", "a"]) == [2, 0]


def test_adapters_are_saved_alone_and_loaded_by_peft(trained: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from mine.pretrained import gpt2

    model, folder, ids = trained(adapters=True).model("last"), tmp_path / "folder", torch.arange(8)[None]
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").stat().st_size < 10_000
    assert not (folder / "model.safetensors").exists()
    base = model.get_base_model()
    state = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora" not in name}
    again = gpt2()
    again.load_state_dict(state)
    assert torch.equal(peft.PeftModel.from_pretrained(again, folder).eval()(ids).logits, model(ids).logits)


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
    runner.open(cut).model("last").save_pretrained(tmp_path / "adapters")
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names

"""Runs that begin from weights of another program: safetensors files and folders of Hugging Face."""

import json
from pathlib import Path

import pytest
import torch
from crews import Crews
from lives import USER, Lives
from marks import slow
from results import results
from safetensors.torch import load_file, save_file

from runner.models.mlp import MLP
from runner.runs.__main__ import main

FEW = ("trainer.max_steps=12", "trainer.evaluate_every_steps=6", "checkpoint.every_steps=4")
COMMAND = ("experiment=smoke", *FEW, "runtime.num_threads=1")
STILL = ("optimizer.lr=0", "optimizer.weight_decay=0")


def weights(seed: int = 1, prefix: str = "", outputs: int = 10) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = MLP(inputs=64, hidden=[64], outputs=outputs)
    return {f"{prefix}{name}": tensor.clone() for name, tensor in model.state_dict().items()}


def folder(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """As save_pretrained writes a large model: several files and an index."""
    path.mkdir()
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path


@pytest.mark.parametrize("kind", ["folder", *(slow(n) for n in ("file", "wrapped", "half"))])
def test_a_run_begins_with_the_weights_of_a_file(kind: str, life: Lives, tmp_path: Path) -> None:
    """Whatever torch.compile and DDP put before the names."""
    expected = weights()
    if kind == "half":
        expected = {name: tensor.bfloat16() for name, tensor in expected.items()}
    file = folder(tmp_path / "hf", expected) if kind == "folder" else tmp_path / "w.safetensors"
    if kind != "folder":
        prefix = "module._orig_mod." if kind == "wrapped" else ""
        save_file({f"{prefix}{name}": tensor for name, tensor in expected.items()}, file)
    ended = life(*COMMAND, *STILL, f"run.root={tmp_path}/o", "run.name=c", "run.load=strict", f"run.parent={file}")
    assert ended.status == 0, ended.output
    assert f"attempt  1, weights of {file}" in ended.output
    found = load_file(tmp_path / "o/smoke/c/model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())
    assert main(["show", str(tmp_path / "o/smoke/c")]) == 0


def test_a_killed_child_of_weights_is_the_undisturbed_one(life: Lives, tmp_path: Path) -> None:
    """Also without the file, once a step is saved."""
    save_file(weights(), tmp_path / "w.safetensors")
    command = (*COMMAND, f"run.root={tmp_path}", f"run.parent={tmp_path}/w.safetensors")
    assert life(*command, "run.name=whole").status == 0
    assert life(*command, "run.name=cut", restored=True).status is None
    assert life(*command, "run.name=cut", step=6).status is None
    (tmp_path / "w.safetensors").unlink()
    ended = life(*command, "run.name=cut")
    assert (ended.status, "resumed from step 4" in ended.output) == (0, True), ended.output
    assert not results(tmp_path / "smoke/cut").differences(results(tmp_path / "smoke/whole"))
    assert main(["audit", str(tmp_path / "smoke/cut")]) == 0


def test_changed_weights_are_drift(life: Lives, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(weights(), file)
    command = (*COMMAND, f"run.root={tmp_path}", f"run.parent={file}", "run.name=c")
    assert life(*command, step=6).status is None
    before = file.read_bytes()
    save_file(weights(seed=2), file)
    ended = life(*command)
    assert (ended.status, "is not what the run started from: its digest was xxh3:" in ended.output) == (3, True)
    file.write_bytes(before)
    assert life(*command).status == 0
    ended = life(*COMMAND, f"run.root={tmp_path}", "run.name=c")
    assert (ended.status, "this command starts without run.parent" in ended.output) == (3, True), ended.output


def test_weights_of_another_head_are_left_out(life: Lives, tmp_path: Path) -> None:
    save_file(weights(outputs=3), tmp_path / "w.safetensors")
    command = (*COMMAND, *STILL, f"run.root={tmp_path}", f"run.parent={tmp_path}/w.safetensors")
    ended = life(*command, "run.name=c", "trainer.ema_decay=0.9")
    assert ended.status == 0, ended.output
    assert "not used, of the parent: layers.4.bias [3], layers.4.weight [3, 64]" in ended.output
    assert "not in the parent, as they were built: layers.4.weight [10, 64], layers.4.bias [10]" in ended.output
    found = load_file(tmp_path / "smoke/c/model.safetensors")
    assert torch.equal(found["layers.1.weight"], weights()["layers.1.weight"])
    ended = life(*command, "run.name=s", "run.load=strict")
    assert (ended.status, "size mismatch for layers.4.weight" in ended.output) == (1, True), ended.output
    save_file({**weights(), "extra.bias": torch.zeros(3)}, tmp_path / "larger.safetensors")
    ended = life(*COMMAND, f"run.root={tmp_path}", "run.name=l", f"run.parent={tmp_path}/larger.safetensors")
    assert (ended.status, "not used, of the parent: extra.bias [3]\n" in ended.output) == (0, True), ended.output


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int32, "integers"), slow(torch.complex64, "complex")])
def test_numbers_of_another_kind_are_not_converted(dtype: torch.dtype, kind: str, life: Lives, tmp_path: Path) -> None:
    name = "layers.4.bias"
    save_file({**weights(), name: weights()[name].to(dtype)}, tmp_path / "w.safetensors")
    command = (*COMMAND, *STILL, f"run.root={tmp_path}", f"run.parent={tmp_path}/w.safetensors")
    ended = life(*command, "run.name=c")
    assert (ended.status, f"not used, of the parent: {name} [10] ({kind})" in ended.output) == (0, True), ended.output
    ended = life(*command, "run.name=s", "run.load=strict")
    message = f"{name} is [10] ({kind}) in the parent and [10] in this model"
    assert (ended.status, message in ended.output) == (1, True), ended.output


def test_integers_are_not_converted_to_complex_numbers(life: Lives, tmp_path: Path) -> None:
    save_file({**weights(), "turns": torch.ones(4, dtype=torch.int64)}, tmp_path / "w.safetensors")
    parent = f"run.parent={tmp_path}/w.safetensors"
    command = (*COMMAND, "model._target_=mine.odd.Rotates", f"run.root={tmp_path}", parent, "run.load=strict")
    ended = life(*command, cwd=USER)
    message = "turns is [4] (integers) in the parent and [4] (complex) in this model"
    assert (ended.status, message in ended.output) == (1, True), ended.output


def test_a_weight_that_is_used_twice_may_be_saved_once(life: Lives, tmp_path: Path) -> None:
    """As save_pretrained does with tied embeddings."""
    small = ("model.layers=1", "model.width=16", "data.validation.limit=8", "task.sample_bytes=0")
    command = ("experiment=gpt", *FEW, *small, *STILL, f"run.root={tmp_path}", "runtime.num_threads=1")
    assert life(*command, "run.name=p", "trainer.max_steps=1").status == 0
    saved = load_file(tmp_path / "gpt/p/model.safetensors")
    del saved["head.weight"]
    save_file(saved, tmp_path / "w.safetensors")
    ended = life(*command, "run.name=c", f"run.parent={tmp_path}/w.safetensors", "run.load=strict", "seed=5")
    assert (ended.status, "not in the parent" in ended.output) == (0, False), ended.output
    found = load_file(tmp_path / "gpt/c/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    assert torch.equal(found["head.weight"], saved["tokens.weight"])


@pytest.mark.parametrize("layout", [slow("ddp"), "fsdp"])
def test_several_processes_begin_with_the_weights(layout: str, crew: Crews, tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", weights(outputs=3))
    command = (*COMMAND, *STILL, f"run.root={tmp_path}", f"runtime.parallel={layout}", "run.name=c")
    ended = crew(2, *command, f"run.parent={path}")
    assert not any(ended.statuses), ended.output
    found = load_file(tmp_path / "smoke/c/model.safetensors")
    assert torch.equal(found["layers.1.weight"], weights()["layers.1.weight"])


def test_mistakes_about_weights_are_reported(life: Lives, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    save_file(weights(), tmp_path / "w.safetensors")
    save_file(weights(prefix="other."), tmp_path / "other.safetensors")
    (tmp_path / "index").mkdir()
    (tmp_path / "index/model.safetensors.index.json").write_text('{"weight_map": {"a": "../w.safetensors"}}')
    for number, (parent, message) in enumerate(
        {
            "torn.safetensors": "cannot be read as safetensors",
            "hf": "has a config.json and no model.safetensors. Save it with save_pretrained",
            "w.safetensors run.inherit=all": "has weights only; leave run.inherit out",
            "other.safetensors": "has a name and shape of this model: the first are other.",
            "index": "names ../w.safetensors, which is not beside it",
            "missing.safetensors": "is not a run directory",
        }.items()
    ):
        file, *more = parent.split()
        ended = life(*COMMAND, f"run.root={tmp_path}/o", f"run.name=r{number}", f"run.parent={tmp_path}/{file}", *more)
        assert (ended.status in (1, 2), message in ended.output) == (True, True), ended.output
        assert "Traceback" not in ended.output

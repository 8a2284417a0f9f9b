"""Secrets of the environment: the objects get them; names, records, messages and Hydra's files do not."""

import json
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from lives import Ended, Lives
from marks import slow

from runner.config.secrets import find_secrets
from runner.errors import RunnerError
from runner.runs.__main__ import main

USER = Path(__file__).parent / "user"
CANARY = "hunter2-canary-7f3a"
GIVEN = "+data.train.secrets.given=${oc.env:CANARY}"
COPIES = ("+run.storage_options.password=${oc.env:CANARY}", "+hydra.job.env_set.COPY=${oc.env:CANARY}")

WRITTEN_OUT: list[Any] = [
    {"password": "x"},
    {"passwd": "x"},
    {"pwd": "swordfish"},
    {"password": 20240131},
    {"password": "20240131"},
    {"apikey": "x"},
    {"apiKey": "x"},
    {"api_key": "x"},
    {"bearer": "x"},
    {"bearer_token": "x"},
    {"client_secret": "x"},
    {"SECRET_KEY": "x"},
    {"secretAccessKey": "x"},
    {"aws_secret_access_key": "x"},
    {"hf_token": "hf_abc"},
    {"access_token": "x"},
    {"connection_string": "x"},
    {"credentials": {"user": "me", "passphrase": "x"}},
    {"token": "hunter2secret"},
    {"token": "Zq8Lm2Xv"},
    {"token": "mysecretword"},
    {"session_key": "hunter2secret"},
    {"secrets": {"hub": "x"}},
    {"password": {"value": "x"}},
    {"cookies": {"session": "x"}},
    {"db_pass": "swordfish"},
    {"args": ["--api-key=x"]},
    {"x": "host=h user=me password=swordfish"},
    {"x": "curl -H 'Authorization: Bearer hunter2' https://host"},
    {"x": "sk-proj-0123456789abcdefghij"},
    {"x": "https://hooks.slack.com/services/T0/B0/x"},
    {"token": "${oc.env:TOKEN,hunter2secret}"},
    {"token": "${oc.decode:${oc.env:TOKEN,'hunter2secret'}}"},
    {"key": "9f86d081884c7d659a2feaa0c55ad015"},
    {"auth": ["me", "swordfish"]},
    {"auth": "me:hunter2"},
    {"tokens": ["9f86d081884c7d659a2feaa0c55ad015"]},
    {"headers": {"Authorization": "x"}},
    {"headers": {"X-Api-Key": "x"}},
    {"headers": {"Cookie": "x"}},
    {"headers": {"Ocp-Apim-Subscription-Key": "x"}},
    {"headers": [["Authorization", "x"]]},
    {"headers": ["Authorization: Bearer x"]},
    {"headers": ["X-Api-Key: hunter2"]},
    {"args": ["--token", "hunter2secret"]},
    {"args": ["--password=x"]},
    {"storage_options": {"key": "x"}},
    {"storage_options": {"token": "x"}},
    {"storage_options": {"sas": "x"}},
    {"storage_options": {"tokens": ["x"]}},
    {"storage_options": [{"deep": [{"key": "x"}]}]},
    {"client_kwargs": {"auth": "x"}},
    {"env_set": {"WANDB_API_KEY": "x"}},
    {"x": "Bearer 9f86d081884c"},
    {"x": "s3://key:secret@bucket/x"},
    {"x": "s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtnFEMI+K7@bucket/x"},
    {"x": "https://user:pw@host/x"},
    {"x": "simplecache::https://user:pw@host/x"},
    {"x": ["zip://a.txt::https://user:pw@host/x.zip"]},
    {"x": "https://host/c/x?sv=2022&sig=abcd%3D"},
    {"x": "https://host/x?X-Amz-Signature=abcd&X-Amz-Date=1"},
    {"x": "https://host/x?X-Amz-Security-Token=abcd"},
    {"x": "https://host/x?a=1&token=abcd"},
    {"x": "https://host/x?api_key=abcd"},
    {"x": "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=abcd"},
    {"x": "sv=2022&sig=abcd"},
    {"x": "ghp_0123456789abcdefghijABCDEFGHIJ012345"},
    {"x": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"},
    {"x": "AKIAIOSFODNN7EXAMPLE"},
    {"x": "-----BEGIN RSA PRIVATE KEY-----\nabc"},
]
# Of language models, of tables, of addresses.
HARMLESS: list[Any] = [
    {"max_tokens": 1000, "max_new_tokens": "1024", "token_dim": 64, "num_tokens": 1_000_000, "secret_size": 16},
    {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "mask_token": "[MASK]",
        "bos_token": "<|endoftext|>",
        "unk_token": "unk",
    },
    {"pad_token_id": 50256, "image_token": "<image>", "stop_tokens": ["\n\n", "###", "<|reserved_special_token_250|>"]},
    {"tokenizer": "gpt2", "tokenizer_name": "meta-llama/Llama-2-7b-hf", "tokenization": "byte_level_bpe_50257"},
    {"tokenizer": {"_target_": "mine.Tokenizer", "path": "/data/tokenizer.json", "special_tokens": ["[CLS]", "[SEP]"]}},
    {"placeholder_token": "image_token_placeholder_1", "trigger_token": "sks123", "token_type": "word"},
    {
        "key": "text",
        "label_key": "cifar100_fine_labels",
        "sort_key": "length",
        "keys": ["image_224x224", "a/imagenet1k/ImageClassification2D"],
    },
    {"key": "layer4.conv2.weight_1", "monitor_key": "val/top5", "query_key_norm": "rms", "public_key": "x"},
    {"auth": None, "password": "", "secret": True, "token": "none", "signature": "serving_default", "bypass": "x"},
    {"token": "wordpiece", "tokenizer": {"token": "byte_level"}, "session_key": "session_id", "shared_key": "embed"},
    {"id": "sk-learn-logistic-regression-baseline", "name": "hf_internal_testing_tiny_random_llama"},
    {"prompt": "Authorization: what does it mean?", "template": "user={user} password={password}"},
    {"tokens": {"pad": "<pad>", "unknown": "unk"}, "keys": {"image": "pixel_values"}, "secret": {"_target_": "mine.S"}},
    {"token": "word", "tokens": "/data/tokens.bin", "hf_token": "~/.cache/huggingface/token"},
    {"credentials": "/home/me/key.json", "credentials_file": "prod", "secret_name": "prod/db", "password_env": "PW"},
    {"token": "gs://bucket/token.json", "auth_url": "https://host/login", "private_key": "keys/deploy.pem"},
    {"token": "${oc.env:TOKEN}", "secret": "${oc.env:TOKEN,null}", "password": "${oc.env:TOKEN,''}"},
    {"token": "${data.validation.token}", "x": "https://${oc.env:USER}:x@host", "y": "https://me:${oc.env:PW}@host/x"},
    {"x": "https://host/x?sig=${oc.env:SIG}", "y": "Bearer ${oc.env:TOKEN}", "z": "Authorization: Bearer ${oc.env:T}"},
    {"x": "sftp://me@host:22/a@b", "y": "s3://bucket/a:b@c", "z": "zip://*.txt::s3://bucket/all@1.zip"},
    {"x": "https://host/x?max_tokens=1000&tokenizer=gpt2", "y": "hdfs://namenode:8020/a@b", "z": "host:80/x@best"},
    {
        "columns": ["password", "email"],
        "prompt": "The secret key: what is the token?",
        "storage_options": {"anon": True},
    },
    {"headers": {"Accept": "text/html"}, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9000"}},
    {"_target_": "mine.Keys", "hidden": [64, 64], "betas": [0.9, 0.999], "name": None},
]


@pytest.mark.parametrize("value", WRITTEN_OUT, ids=str)
def test_a_secret_that_is_written_out_is_noticed(value: Any) -> None:
    assert [*find_secrets({"train": value}, "data")]


@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: ",".join(value))
def test_values_that_sound_like_secrets_are_accepted(value: Any) -> None:
    assert [*find_secrets({"train": value}, "data")] == []


class Nest:
    """An empty folder in which commands are run with the canary in their environment, and which it must not enter."""

    def __init__(self, life: Lives, folder: Path) -> None:
        self._life, self.folder, self.root = life, folder, folder / "o"
        shutil.copytree(USER / "mine", folder / "mine")

    def __call__(
        self,
        *arguments: str,
        canary: str = CANARY,
        environment: Mapping[str, str] = MappingProxyType({}),
        step: int | None = None,
    ) -> Ended:
        sweep = arguments[:1] if arguments[0] == "-m" else ()
        command = (*sweep, "--config-dir", str(USER / "conf"), "experiment=secret", f"run.root={self.root}")
        own = {"CANARY": canary, "OTHER": canary, "API_KEY": CANARY, "TMPDIR": str(self.folder), **environment}
        return self._life(*command, *arguments[len(sweep) :], cwd=self.folder, environment=own, step=step)

    def leaks(self) -> list[str]:
        """The files with the canary in name or content."""
        files = [path for folder in (self.folder, Path(tempfile.gettempdir())) for path in folder.rglob("*")]
        return [str(p) for p in files if CANARY in str(p) or (p.is_file() and CANARY.encode() in p.read_bytes())]

    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.root.rglob("run.json"))


@pytest.fixture
def nest(life: Lives, tmp_path: Path) -> Nest:
    return Nest(life, tmp_path)


def test_a_secret_reaches_the_objects_and_nothing_else(nest: Nest, capsys: pytest.CaptureFixture[str]) -> None:
    alone = nest(GIVEN, *COPIES, "checkpoint.every_steps=2")
    assert alone.status == 0, alone.output
    swept = nest("-m", GIVEN, *COPIES, "seed=0,1")
    assert swept.status == 0, swept.output
    runs = nest.runs()
    assert len(runs) == 3
    for command in ("list", "compare"):
        assert main([command, str(nest.root)]) == 0
    for command in (["show", *runs[:1]], ["diff", *runs[:2]], ["show", *runs[:1], "--json"]):
        assert main([*map(str, command)]) == 0
    assert CANARY not in alone.output + swept.output + "".join(capsys.readouterr())
    assert nest.leaks() == []
    config = (runs[0] / "config.yaml").read_text()
    assert "https://${oc.env:CANARY}:x@host/x?sig=${oc.env:SIGNATURE,none}" in config


@pytest.mark.parametrize("where", ["constructor", slow("sample")])
def test_a_failure_that_repeats_a_secret_does_not_show_it(where: str, nest: Nest) -> None:
    broken = (GIVEN, f"data.train.broken={where}", "sweep.max_retries=0")
    for arguments in (broken, (*broken, "runtime.num_workers=1"), ("-m", *broken, "seed=1,2")):
        ended = nest(*arguments)
        assert ended.status not in (0, None)
        assert "403 for" in ended.output
        assert CANARY not in ended.output
    assert nest.leaks() == []


def test_lines_added_to_an_error_have_no_secrets() -> None:
    error = RunnerError("failed")
    error.extend("at https://user:hunter22@example.org")
    assert error.args == ("failed\nat https://***@example.org",)


def test_a_rotated_secret_is_no_drift(nest: Nest) -> None:
    assert nest("-m", GIVEN, "seed=1,2").status == 0
    for seed in (1, 2):
        ended = nest(f"seed={seed}", GIVEN, canary="swordfish-canary")
        assert (ended.status, ended.output.startswith("finished step 4")) == (0, True), ended.output
    assert len(nest.runs()) == 2
    ended = nest("seed=2", GIVEN.replace("CANARY", "OTHER"), f"run.name='{nest.runs()[1].name}'")
    assert (ended.status, "'${oc.env:CANARY}'  '${oc.env:OTHER}'" in ended.output) == (3, True), ended.output


def test_a_computed_value_is_no_secret(nest: Nest) -> None:
    """Numbers and choices of the environment are compared by what they are, whatever the name of the run."""
    overrides = ("seed=${oc.env:SEED}", "trainer.precision=${oc.env:KIND}")
    assert nest(*overrides, environment={"SEED": "1", "KIND": "fp32"}).status == 0
    ended = nest(*overrides, environment={"SEED": "2", "KIND": "bf16"})
    assert ended.status == 3
    for row in (r"seed +1 +2", r"trainer\.precision +'fp32' +'bf16'"):
        assert re.search(row, ended.output)


WRITTEN = {
    "key": ("+data.train.password={canary}",),
    "list": ("+data.train.headers=[['Authorization','{canary}']]",),
    "URL": ("+data.train.url='s3://key:{canary}@bucket/x'",),
    "query": ("+data.train.url='https://host/x?sig={canary}'",),
    "root": ("run.root='s3://key:{canary}@bucket/x'",),
    "parent": ("run.parent='s3://key:{canary}@bucket/x'",),
    "default": ("+data.train.token=${{oc.env:NO,{canary}}}",),
    "options": ("+run.storage_options.tokens=[{canary}]",),
    "environment": ("+hydra.job.env_set.API_KEY={canary}",),
    "copied": ("+hydra.job.env_copy=[API_KEY]",),
}


@pytest.mark.parametrize("sweep", [False, slow(True)])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_secret_written_out_is_refused_before_a_file_is_made(name: str, sweep: bool, nest: Nest) -> None:
    overrides = tuple(argument.format(canary=CANARY) for argument in WRITTEN[name])
    ended = nest(*(("-m", "seed=1,2") if sweep else ()), *overrides)
    assert (ended.status, "looks like a secret and is written out" in ended.output) == (2, True), ended.output
    assert CANARY not in ended.output
    assert nest.leaks() == []
    assert not nest.root.exists()


def test_a_secret_among_the_values_of_a_sweep_is_refused(nest: Nest) -> None:
    for values in (f"+data.train.token={CANARY},none", f"+data.train=choice({{token:{CANARY}}},{{token:none}})"):
        ended = nest("-m", "seed=1", values)
        assert (ended.status, "looks like a secret and is written out" in ended.output) == (2, True), ended.output
        assert not nest.root.exists()


@pytest.mark.parametrize("asked", [slow(True), False])
def test_a_record_does_not_choose_whom_a_command_calls(asked: bool, life: Lives, tmp_path: Path) -> None:
    """A store is called with the user's keys: the parent that the command names is taken, or none."""
    command = ("experiment=smoke", f"run.root={tmp_path}", "trainer.max_steps=4", "checkpoint.every_steps=2")
    assert life(*command, "run.name=p").status == 0
    parent = (f"run.parent={tmp_path}/smoke/p",) if asked else ()
    child = (*command, "run.name=c", *parent)
    assert life(*child, restored=True).status is None  # before the child has a checkpoint of its own
    record = json.loads((tmp_path / "smoke/c/run.json").read_text())
    origin = {"step": 4, "commit": "commits/a000001-s000000004-0123456789ab", "inherit": "all", "asked": None}
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        record["parent"] = (record["parent"] or origin) | {"run": f"sftp://127.0.0.1:{stranger.getsockname()[1]}/x"}
        (tmp_path / "smoke/c/run.json").write_text(json.dumps(record))
        ended = life(*child)
        stranger.settimeout(0)
        with pytest.raises(BlockingIOError):
            stranger.accept()
    if asked:
        assert (ended.status, f"weights from step 4 of {tmp_path}" in ended.output) == (0, True), ended.output
    else:
        assert (ended.status, "a store that this command does not name" in ended.output) == (2, True), ended.output


def test_a_secret_of_the_environment_names_no_folder_or_study(nest: Nest) -> None:
    experiment = nest.folder / "own/experiment/space.yaml"
    experiment.parent.mkdir(parents=True)
    space = '{+data.train.harmless: "${oc.env:CANARY}", seed: "1,2"}'
    experiment.write_text(f"# @package _global_\ndefaults: [secret, _self_]\nhydra: {{sweeper: {{params: {space}}}}}")
    path = f"hydra.searchpath=[file://{experiment.parent.parent}]"
    for overrides in (
        ("run.name='x-${oc.env:API_KEY}'",),
        ("run.root='o/x-${oc.env:API_KEY}'",),
        ("-m", "experiment=space", path),
        ("-m", "experiment=space", path, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1"),
    ):
        ended = nest(*overrides)
        assert (ended.status, "has a secret" in ended.output) == (2, True), ended.output
        assert CANARY not in ended.output
    assert nest.leaks() == []
    assert not nest.root.exists()

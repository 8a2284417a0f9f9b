"""Every option of every group composes, every experiment runs, and mistakes are reported with a remedy."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lives import Lives
from marks import slow
from omegaconf import OmegaConf
from results import results

from runner import app
from runner.config import schema
from runner.config.identity import IDENTITY, identity

OPTIONS = sorted(
    f"{path.parent.relative_to(app.CONFIGS)}={path.stem}"
    for path in app.CONFIGS.glob("*/*.yaml")
    if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(path.stem for path in (app.CONFIGS / "experiment").glob("*.yaml"))
LONG = ("arithmetic_grpo", "fashion_mnist", "gpt", "gpt_muon", "lora")
HAS_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist").is_dir()


def composed(*overrides: str):
    app.register()
    with initialize_config_dir(str(app.CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str) -> None:
    assert set(identity(composed("experiment=digits", option))) == {*IDENTITY} - {"params"}


@pytest.mark.parametrize("experiment", [slow(name) if name in LONG else name for name in EXPERIMENTS])
def test_every_experiment_runs_a_few_steps(experiment: str, life: Lives, tmp_path: Path) -> None:
    if experiment == "fashion_mnist" and not HAS_FASHION_MNIST:
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    few = ("trainer.max_steps=3", "trainer.evaluate_every_steps=3", "trainer.evaluate_every_epochs=null")
    if experiment == "gpt_muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9")
    if experiment == "lora":
        pytest.importorskip("peft")
    text = experiment.startswith(("gpt", "lora"))
    small = ("data.validation.limit=32", "task.sample_bytes=16") if text else ()
    ended = life(f"experiment={experiment}", *few, *small, f"run.root={tmp_path}")
    assert ended.status == 0, ended.output
    assert "finished step 3 (max_steps), val/loss" in ended.output


def test_the_split_covers_every_key() -> None:
    """A new key must be given a side: what is computed, or how."""
    execution = {"observers", "imports", "checkpoint", "metrics", "runtime", "run", "sweep"}
    assert set(OmegaConf.structured(schema.Config)) == set(IDENTITY) | execution


Mistake = tuple[tuple[str, ...], int, tuple[str, ...]]  # overrides, exit status, what is said


def command(message: str, *overrides: str, also: str = "", status: int = 2) -> Mistake:
    return overrides, status, (message, also)


def smoke(message: str, *overrides: str, also: str = "", status: int = 2) -> Mistake:
    return command(message, "experiment=smoke", *overrides, also=also, status=status)


ALL = "".join(f"\t{name}\n" for name in EXPERIMENTS).rstrip()
MISTAKES = {
    "no experiment": command("You must specify 'experiment'", also=ALL),
    "two experiments": command("experiment is the name of one experiment; a sweep", "experiment=[smoke,digits]"),
    "unknown experiment": command("Could not find 'experiment/nope'", "experiment=nope", also=ALL),
    "misspelt key": smoke("Did you mean trainer.max_steps?", "trainer.max_step=3"),
    "added key": smoke("no key trainer.max_step. Did you mean trainer.max_steps", "+trainer.max_step=3"),
    "group of null": smoke("Leave a group out with ~GROUP", "optimizer=null"),
    "no callbacks": smoke("the key callbacks cannot be removed. Give its keys other values", "~callbacks"),
    "unknown key": smoke("There are: sweep.max_retries, sweep.retry_failed", "sweep.many=3"),
    "misspelt free key": smoke("Key 'lrr' is not in struct", "optimizer.lrr=3"),
    "wrong type": smoke("could not be converted to Integer", "trainer.max_steps=many"),
    "wrong choice": smoke("expected one of [refuse, accept, fork]", "run.on_drift=maybe"),
    "unknown option": smoke("Available options in 'optimizer':\n\tadamw\n\tsgd", "optimizer=adamm"),
    "a class for an option": smoke("A class or function of any module: model._target_=mine.Net\n", "model=mine.Net"),
    "an option that is not there": smoke("optimizer._target_=my_module.MyClass\n", "optimizer=adam"),
    "too small": smoke("checkpoint.keep_last=1 is too small: at least 2", "checkpoint.keep_last=1"),
    "no root": smoke("run.root is empty; is the variable for it empty?", "run.root="),
    "no end": smoke("the training has no end: set trainer.max_steps", "trainer.max_steps=null"),
    "no such class": smoke("Are you sure that module 'mine' is inst", "model._target_=mine.Net"),
    "no value": smoke("data.batch_size not set: give a value in the experiment", "data.batch_size=???"),
    "no model": smoke("model is a collections.Counter; expec", "model._target_=collections.Counter"),
    "no task": smoke("an object of a subclass of runner.task.Task", "task._target_=collections.Counter"),
    "no total": smoke(
        "the steps of the run are unknown; set trainer.max_steps, or scheduler.total_steps",
        "scheduler=warmup_cosine",
        "trainer.max_steps=null",
        "trainer.max_seconds=9",
    ),
    "a weight of no optimizer": smoke(
        "layers.4.weight, layers.4.bias would be trained by no optimizer",
        "~optimizer",
        "+optimizer={a:{_target_:torch.optim.SGD,params:layers.1}}",
    ),
    "a group of nothing": smoke(
        "optimizer.groups.head: no weight of the model matches 'head'", "+optimizer.groups.head.lr=1"
    ),
    "an average of nothing": smoke(
        "trainer.ema_params: no weight of the model matches", "trainer.ema_params=[nothing]"
    ),
    "a schedule of no optimizer": smoke(
        "scheduler has a: give one for each optimizer (generator, discriminator), or one for all",
        "experiment=gan",
        "~scheduler",
        "+scheduler.a._target_=torch.optim.lr_scheduler.ConstantLR",
    ),
    "an optimizer that this torch lacks": smoke(
        "module 'torch.optim'? This is torch 2.", "optimizer._target_=torch.optim.Missing"
    ),
    "a key of the schema": smoke("Give it another value, as --help trainer.max_steps shows", "~trainer.max_steps"),
    "wrong argument": smoke("unexpected keyword argument 'x'", "+optimizer.x=1"),
    "an argument of the option": smoke(
        "'betas'. '~optimizer.betas' leaves it out. If an option gave it, choose none: `defaults: [override",
        "optimizer=adamw",
        "optimizer._target_=torch.optim.SGD",
    ),
    "a scheduler that wants a metric": smoke(
        "ReduceLROnPlateau steps by the objective: set data.validation and objective.metric",
        "~scheduler",
        "+scheduler={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau}",
        "objective.metric=null",
    ),
    "a plateau of the other mode": smoke(
        "scheduler.mode=min contradicts objective.mode=max",
        "~scheduler",
        "+scheduler={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau}",
    ),
    "a plateau with an interval": smoke(
        "scheduler.interval=epoch: torch.optim.lr_scheduler.ReduceLROnPlateau steps after evaluations",
        "~scheduler",
        "+scheduler={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau,mode:max,interval:epoch}",
    ),
    "unknown interval": smoke("scheduler.interval=day is not one of step, epoch", "+scheduler.interval=day"),
    "an optimizer that wants a closure": smoke(
        "torch.optim.lbfgs.LBFGS does not take: missing a required argument: 'closure'",
        "~optimizer",
        "+optimizer={_target_:torch.optim.LBFGS}",
    ),
    "lazy modules": smoke(
        "model: weight, bias of lazy modules have no shape yet",
        "~model",
        "+model={_target_:torch.nn.LazyLinear,out_features:10}",
    ),
    "a script": smoke(
        "model.0 is a TorchScript module",
        "~model",
        "+model={_target_:torch.nn.Sequential,_args_:[{_target_:torch.jit.script,obj:{_target_:torch.nn.Identity}}]}",
    ),
    "no target": smoke("model needs a _target_", "~model._target_"),
    "remote root": smoke("run.root=nosuch://...: not a storage for runs", "run.root=nosuch://b/x"),
    "unquoted": smoke("needs quotes: 'run.root=\"~/x\"'", "run.root=~/x"),
    "unquoted in a list": smoke(
        "the override 'model.hidden=[a=b,c]' cannot be read: a value with characters besides",
        "model.hidden=[a=b,c]",
        also="needs quotes: 'model.hidden=[\"a=b\",c]'\n",
    ),
    "a list that the shell has split": smoke(
        "'model.hidden=[8,' cannot be read: its brackets do not match. If it has spaces, quote it for the shell, "
        "as in 'model.hidden=[1, 2]'",
        "model.hidden=[8,",
        "8]",
    ),
    "quoted in part": smoke("each part of it with characters besides letters", '+params.x=["a b",ä]'),
    "a bracket in a text": smoke("needs quotes: 'run.root=\"a(b\"'", "run.root=a(b"),
    "a call that cannot be": command(
        "the override 'seed=range(a)' cannot be read: TypeError while evaluating",
        "-m",
        "experiment=smoke",
        "seed=range(a)",
    ),
    "a sweep's configuration": command("Leave -m out to see", "--cfg", "job", "-m", "experiment=smoke", "seed=1,2"),
    "a search space": command(
        "an override cannot be applied: 'NoneType' object has no attribute 'get', key: hydra.sweeper.params. A key",
        "-m",
        "experiment=smoke",
        "+hydra.sweeper.params={seed: '1,2'}",
    ),
    "a part of a search space": command(
        "an override cannot be applied: Unexpected type for root: NoneType",
        "-m",
        "experiment=smoke",
        "+hydra.sweeper.params.seed='1,2'",
    ),
    "unsafe name": smoke("run.name=../x: use letters, digits and", "run.name=../x"),
    "no such metric": smoke(
        "objective.metric=val/acc is not among the metrics of the evaluation: val/accuracy, val/loss",
        "objective.metric=val/acc",
        "trainer.max_steps=1",
    ),
    "uneven": smoke("data.batch_size=64 cannot be split into", "trainer.accumulate=7", status=1),
    "device": smoke("runtime.device=cuda:99: this machine shows", "runtime.device=cuda:99"),
    "no file": command(
        "apt-get install dataset-fashion-mnist", "experiment=fashion_mnist", "data.train.path=/nowhere", status=1
    ),
    "no text": command(
        "no file matches '/nowhere/*.txt'", "experiment=gpt", "data.train.path=/nowhere/*.txt", status=1
    ),
}


# Further cases of a mistake that another name shows, and mistakes in settings that few experiments have.
RARE = (
    "added key",
    "no callbacks",
    "unknown key",
    "wrong choice",
    "a class for an option",
    "no total",
    "an average of nothing",
    "a schedule of no optimizer",
    "an optimizer that this torch lacks",
    "an argument of the option",
    "a plateau of the other mode",
    "a plateau with an interval",
    "unknown interval",
    "a script",
    "no target",
    "unquoted",
    "a list that the shell has split",
    "a bracket in a text",
    "a call that cannot be",
    "a search space",
    "a part of a search space",
    "no file",
)


@pytest.mark.parametrize("name", [slow(name) if name in RARE else name for name in MISTAKES])
def test_a_mistake_is_reported(name: str, life: Lives, tmp_path: Path) -> None:
    overrides, status, messages = MISTAKES[name]
    root = () if any(item.startswith("run.root") for item in overrides) else (f"run.root={tmp_path}",)
    ended = life(*overrides, *root, cwd=tmp_path)
    assert [message for message in messages if message not in ended.output] == [], ended.output
    assert "Traceback" not in ended.output
    assert ended.status == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {_target_: mine.Net\ntask: x", 'mine.yaml", line 2, column 5'),
        ("trainer: {max_steps: 5}", "must be: # @package _global_"),
        ("# @package _global_\ntrainer: {max_step: 5}", "Did you mean trainer.max_steps?"),
    ],
)
def test_a_mistake_in_a_file_is_reported(text: str, message: str, life: Lives, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(text)
    ended = life("--config-dir", str(tmp_path), "experiment=mine", cwd=tmp_path)
    assert (ended.status, message in ended.output, "Traceback" in ended.output) == (2, True, False), ended.output


def test_an_error_shows_the_users_frames_and_none_of_hydra(life: Lives, tmp_path: Path) -> None:
    task = ("task._target_=mine.tasks.Breaks", "~task.label_smoothing")
    ended = life("experiment=smoke", *task, f"run.root={tmp_path}", cwd=Path(__file__).parent / "user")
    assert ended.status == 1
    assert 'raise KeyError("mine")' in ended.output
    assert "hydra/_internal" not in ended.output


def test_unsavable_state_is_reported_before_the_first_step(life: Lives, tmp_path: Path) -> None:
    task = ("task._target_=mine.tasks.Forgetful", "~task.label_smoothing")
    ended = life("experiment=smoke", *task, f"run.root={tmp_path}", cwd=Path(__file__).parent / "user")
    assert "cannot save task/nested/0/what: it is a builtins.object" in ended.output
    assert ended.status == 1
    assert "step" not in ended.output.split("cannot save")[0].split("parameters")[1]


@pytest.mark.parametrize("skip", [False, True])
def test_a_loss_that_is_no_number_names_step_and_positions(skip: bool, life: Lives, tmp_path: Path) -> None:
    task = ("task._target_=mine.tasks.Curriculum", "~task.label_smoothing", "+task.bad_every=7")
    more = ("trainer.on_nonfinite=skip",) if skip else ()
    command = ("experiment=smoke", *task, *more, "checkpoint.every_steps=null", f"run.root={tmp_path}")
    ended = life(*command, cwd=Path(__file__).parent / "user")
    if skip:
        assert ended.status == 0, ended.output
    else:
        assert ended.status == 1
        assert "the loss of step 7 is inf; its samples are at positions 384 to 447" in ended.output


READ_ONLY = "mount --bind {root} {root} && mount -o remount,ro,bind {root}"
FULL = "mount -t tmpfs -o size=100k none {root}"


@pytest.mark.parametrize(
    ("mount", "message"), [(READ_ONLY, "Read-only file system"), (FULL, "No space left on device")]
)
def test_a_real_file_system_that_refuses_is_reported(mount: str, message: str, tmp_path: Path) -> None:
    """In a mount namespace of its own, so that even root meets a real refusal."""
    root = tmp_path / "root"
    ended = mounted(mount, root, "checkpoint.max_unsaved=0")
    assert message in ended.stderr
    assert str(root) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1


@pytest.mark.campaign
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path) -> None:
    """The failure is logged and training continues; when somebody makes room, everything is saved."""
    log = tmp_path / "log"
    reported = f"until grep -qs 'It is tried again' {log}; do sleep 0.1; done"
    room = f"{{{{ ({reported}; mount -o remount,size=50m {{root}}) & }}}} && exec > {log}"
    keep = f"cp -r {{root}}/smoke {tmp_path}"
    ended = mounted(f"{FULL} && {room}", tmp_path / "root", "objective.metric=null", then=keep)
    assert ended.returncode == 0, ended.stderr
    assert "No space left on device. It is tried again" in log.read_text()
    whole = subprocess.run(
        [sys.executable, "-m", "runner", "experiment=smoke", "objective.metric=null", f"run.root={tmp_path}/whole"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(app.CONFIGS.parent)},
    )
    assert whole.returncode == 0
    (run,) = (tmp_path / "smoke").iterdir()
    assert not results(run).differences(results(tmp_path / "whole/smoke" / run.name))


def mounted(mount: str, root: Path, *arguments: str, then: str = "true") -> "subprocess.CompletedProcess[str]":
    """A run of the smoke experiment under a mount of its own, and a command after it."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine gives no mount namespaces")
    root.mkdir(exist_ok=True)
    command = f"{sys.executable} -m runner experiment=smoke run.root={root} {' '.join(arguments)}"
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount.format(root=root)} && {command} && {then.format(root=root)}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(app.CONFIGS.parent)},
        timeout=120,
    )


def test_a_finished_run_on_a_read_only_disk_is_shown(life: Lives, tmp_path: Path) -> None:
    few = "trainer.max_steps=2"
    assert life("experiment=smoke", few, f"run.root={tmp_path}", "run.name=done").status == 0
    ended = mounted(READ_ONLY, tmp_path, few, "run.name=done")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "finished step 2 (max_steps)" in ended.stdout


def test_a_log_that_cannot_be_opened_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as ``app.main`` does
    log = app.LogFile(tmp_path / "absent/runner.log", delay=True)
    log.handle(logging.LogRecord("runner", logging.INFO, "", 0, "step 1", None, None))


def test_an_unreadable_run_root_is_reported(life: Lives, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ended = life("experiment=smoke", f"run.root={tmp_path}/file")
    assert (ended.status, "Traceback" in ended.output) == (1, False)
    assert "Not a directory. Choose another run.root" in ended.output
    ended = life(
        "experiment=smoke", f"run.root={tmp_path}/{'x' * 300}"
    )  # lstat() fails, as in a folder of another user
    assert (ended.status, "Traceback" in ended.output) == (2, False)
    assert "File name too long. Choose another run.root" in ended.output


@pytest.mark.parametrize("option", ["default", slow("stdout"), slow("none"), "disabled"])
def test_hydras_own_options_of_logging(option: str, life: Lives, tmp_path: Path) -> None:
    ended = life(
        "experiment=smoke", f"hydra/job_logging={option}", "trainer.max_steps=1", f"run.root={tmp_path}", cwd=tmp_path
    )
    assert ended.status == 0, ended.output
    assert ("finished step 1" in ended.output) == (option != "disabled")


def test_help_explains_the_command(life: Lives) -> None:
    text = life("--help").output
    for part in (
        "start the run, resume it, or print its result",
        "experiment: arithmetic_grpo, arithmetic_sft, digits, fashion_mnist, gan, gpt, gpt_muon, lora, smoke",
        "75",
    ):
        assert part in text


def test_the_composed_configuration_can_be_printed(life: Lives) -> None:
    ended = life("experiment=digits", "--cfg", "job")
    assert ended.status == 0
    assert OmegaConf.create(ended.output).optimizer.lr == 0.003

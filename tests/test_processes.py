"""Many processes, one run: real ranks on gloo, killed, stopped and started again with others, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crews import Crews, Ended
from lives import Lives
from marks import quick_first, slow
from results import Results, metric_lines, results
from safetensors.torch import load_file
from waiting import until

from runner.checkpoint.sharding import rows_of
from runner.checkpoint.store import CheckpointStore
from runner.run.directory import RunDirectory
from runner.runs.audit import audit
from runner.storage import LocalLocation

KILLS = int(os.environ.get("RUNNER_KILLS", "50"))
USER = Path(__file__).parent / "user"

COMMON = (
    "runtime.num_threads=1",
    "runtime.timeout=20",
    "runtime.audit=false",
    "checkpoint.every_seconds=null",
    "metrics.every_steps=10",
)
SMOKE = (
    "experiment=smoke",
    "trainer.max_steps=30",
    "trainer.evaluate_every_steps=10",
    "trainer.clip_norm=1.0",
    "checkpoint.every_steps=4",
    *COMMON,
)
GPT = (
    "experiment=gpt",
    "model.layers=2",
    "model.heads=2",
    "model.width=32",
    "model.dropout=0.1",
    "data.train.block_size=32",
    "data.validation.limit=32",
    "task.sample_bytes=8",
    "data.randomness=sample",
    "trainer.max_steps=20",
    "trainer.evaluate_every_steps=10",
    "checkpoint.every_steps=4",
    f"data.train.path={os.path.dirname(json.__file__)}/*.py",
    *COMMON,
)
EVERYTHING = ("trainer.ema_decay=0.9", "trainer.accumulate=8", "trainer.precision=bf16", "trainer.on_nonfinite=skip")
DDP, FSDP = "runtime.parallel=ddp", "runtime.parallel=fsdp"
LAYOUTS = {
    "ddp": (2, *SMOKE, DDP),
    "fsdp": (2, *SMOKE, FSDP, "trainer.ema_decay=0.9"),
    "three": (3, *SMOKE, DDP, "data.batch_size=48", "model=convnet", "model.image_size=8", "model.channels=[4,8]"),
    "gpt": (4, *GPT, *EVERYTHING, FSDP, "runtime.shard=2"),
}

Uninterrupted = Callable[[str], tuple[Results, float]]


@pytest.fixture(scope="module")
def uninterrupted(crew: Crews, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The results of a layout's command that nothing interrupted, and the seconds it took; each is run once."""
    root = tmp_path_factory.mktemp("uninterrupted")
    cache: dict[str, tuple[Results, float]] = {}

    def find(name: str) -> tuple[Results, float]:
        if name not in cache:
            ended = finished(crew(*LAYOUTS[name], f"run.root={root}", f"run.name={name}"))
            cache[name] = results(folder(root, name)), ended.seconds
        return cache[name]

    return find


def folder(root: Path, name: str) -> Path:
    (run,) = root.glob(f"*/{name}")
    return run


def finished(ended: Ended) -> Ended:
    assert not any(ended.statuses), ended.output
    return ended


@pytest.mark.campaign
@pytest.mark.parametrize("name", LAYOUTS)
def test_random_kills_change_nothing(name: str, crew: Crews, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    """SIGKILL of one rank, or of all of them, at random moments: the others end by themselves, none hangs."""
    expected, whole = uninterrupted(name)
    size, *command = LAYOUTS[name]
    chance, kills, runs = random.Random(name), 0, 0
    while kills < max(1, KILLS // 10):
        runs += 1
        while True:
            to = chance.choice([*([rank] for rank in range(size)), [*range(size)]])
            background = f"checkpoint.background={chance.choice(['true', 'false'])}"
            workers = f"runtime.num_workers={chance.choice([0, 0, 1])}"
            more = (f"run.root={tmp_path}", f"run.name=r{runs}", "runtime.timeout=10", background, workers)
            ended = crew(size, *command, *more, to=to, after=chance.uniform(0.2, 1.1) * whole)
            if None not in ended.statuses:
                break
            # 0: it had the result, and left before the one that was killed could be missed
            assert all(status in (None, 0, 1, 2) for status in ended.statuses), ended.output
            kills += 1
        finished(ended)
        assert not results(folder(tmp_path, f"r{runs}")).differences(expected), f"run {runs}"


@pytest.mark.parametrize(
    ("name", "victim"), [("ddp", 0), slow("fsdp", 1), pytest.param("three", 2, marks=pytest.mark.campaign)]
)
def test_a_dying_rank_ends_the_others_and_costs_nothing(
    name: str, victim: int, crew: Crews, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    size, *command = LAYOUTS[name]
    more = (f"run.root={tmp_path}", "run.name=cut")
    ended = crew(size, *command, *more, to=[victim], step=17)
    assert ended.statuses == [None if rank == victim else 1 for rank in range(size)]
    message = f"rank {victim} (pid" if victim else "rank 0, or the launcher that started it, is gone"
    assert message in ended.output
    assert "Traceback" not in ended.output
    resumed = finished(crew(size, *command, *more))
    assert "attempt  2, resumed from step 16 of attempt 1" in resumed.output
    assert not results(folder(tmp_path, "cut")).differences(uninterrupted(name)[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DDP, FSDP])
def test_many_restore_a_structure_that_training_changed(layout: str, crew: Crews, tmp_path: Path) -> None:
    """A group of the optimizer that a task added, and buffers that grow."""
    task = ("task._target_=mine.growing.Changes", "+task.what=add", "~task.label_smoothing")
    head = ("optimizer._target_=mine.growing.some", "+optimizer.names=[layers.4]")
    command = (*SMOKE, layout, *task, *head, "model._target_=mine.growing.Remembers", f"run.root={tmp_path}")
    finished(crew(2, *command, "trainer.max_steps=12", "run.name=whole", cwd=USER))
    assert crew(2, *command, "trainer.max_steps=12", "run.name=cut", cwd=USER, to=[1], step=10).statuses[1] is None
    resumed = finished(crew(2, *command, "trainer.max_steps=12", "run.name=cut", cwd=USER))
    assert "resumed from step 8 of attempt 1" in resumed.output
    assert not results(folder(tmp_path, "cut")).differences(results(folder(tmp_path, "whole")))


def test_a_signal_to_any_rank_stops_all_after_the_same_step(
    crew: Crews, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    size, *command = LAYOUTS["ddp"]
    more = (f"run.root={tmp_path}", "run.name=stopped", "checkpoint.every_steps=1")
    ended = crew(size, *command, *more, to=[1], send=signal.SIGTERM, when=f"{tmp_path}/smoke/stopped/commits/*")
    assert ended.statuses == [75, 75], ended.output
    assert ended.output.count("SIGTERM: stopped after step") == 1
    finished(crew(size, *command, *more[:2]))
    assert not results(folder(tmp_path, "stopped")).differences(uninterrupted("ddp")[0])


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_signal_while_one_rank_waits_for_data_is_no_failure(rank: int, crew: Crews, tmp_path: Path) -> None:
    size, *command = LAYOUTS["ddp"]
    data = ("data.train._target_=mine.data.Stalls", f"+data.train.rank={rank}", f"+data.train.mark={tmp_path}/mark")
    more = (f"run.root={tmp_path}", "run.name=waits", "runtime.audit=false")
    ended = crew(size, *command, *more, *data, cwd=USER, send=signal.SIGTERM, when=f"{tmp_path}/mark")
    assert ended.statuses == [75, 75], ended.output
    (end,) = (json.loads(path.read_text()) for path in tmp_path.glob("smoke/waits/attempts/*.end.json"))
    assert end["outcome"] == "interrupted", end


@pytest.mark.parametrize("stopped", [0, slow(1)])
def test_a_stopped_rank_is_found_and_named(stopped: int, crew: Crews, tmp_path: Path) -> None:
    size, *command = LAYOUTS["ddp"]
    more = (f"run.root={tmp_path}", "run.name=stop", "runtime.timeout=3", "checkpoint.every_steps=1")
    when = f"{tmp_path}/smoke/stop/commits/*"
    ended = crew(size, *command, *more, to=[stopped], send=signal.SIGSTOP, when=when)
    assert ended.statuses == [None if rank == stopped else 1 for rank in range(size)]
    assert f"rank {stopped}" in ended.outputs[1 - stopped]
    assert "(runtime.timeout)" in ended.outputs[1 - stopped]
    assert ended.seconds < 30


def test_an_error_of_one_rank_ends_all_and_is_reported_once(crew: Crews, tmp_path: Path) -> None:
    size, *command = LAYOUTS["ddp"]
    task = (
        "task._target_=mine.tasks.Hangs",
        "~task.label_smoothing",
        "+task.rank=1",
        "+task.step=5",
        "+task.fails=true",
    )
    ended = crew(size, *command, *task, f"run.root={tmp_path}", "run.name=fails", cwd=USER)
    assert ended.statuses == [1, 1]
    assert ended.output.count("RuntimeError: mine") == 1
    assert ended.output.count("Traceback") == 1
    assert (
        "RuntimeError: mine"
        in json.loads(next((tmp_path / "smoke/fails/attempts").glob("*.end.json")).read_text())["reason"]
    )


def test_of_two_jobs_on_the_same_run_only_one_trains(crew: Crews, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    command = (*LAYOUTS["ddp"], f"run.root={tmp_path}", "run.name=both")
    first, second = crew.side_by_side(command, command)
    trained, other = sorted([first, second], key=lambda ended: "from scratch" not in ended.output)
    assert trained.statuses == [0, 0], trained.output
    if other.statuses == [4, 4]:
        assert "is in use by attempt" in other.output
    else:  # it came when the first had finished
        assert other.statuses == [0, 0], other.output
        assert "attempt " not in other.output
    assert not results(folder(tmp_path, "both")).differences(uninterrupted("ddp")[0])


def test_another_number_of_processes_has_the_same_samples(life: Lives, crew: Crews, tmp_path: Path) -> None:
    """4 -> 1 -> 2 -> 4, and from ddp to fsdp: every line of the ledger is that of one process."""
    command = (*SMOKE, "trainer.max_steps=36", "trainer.accumulate=2", f"run.root={tmp_path}")
    assert life(*command, "run.name=one").status == 0
    hops = [(4, FSDP, 9), (1, DDP, 18), (2, DDP, 27), (4, FSDP, None)]
    for size, layout, cut in hops:
        ended = crew(size, *command, "run.name=hops", layout, step=cut)
    finished(ended)
    assert "moved    processes 2 -> 4" in ended.output
    assert (
        "1 x 4 processes (replicas x slices), 0 repeated layers; each process takes 1 micro-batch of 16" in ended.output
    )
    alone, hops_ = folder(tmp_path, "one"), folder(tmp_path, "hops")
    assert ledger(hops_) == ledger(alone)
    proof = audit(RunDirectory.at(str(hops_)))
    assert not proof["problems"]
    assert (proof["steps"], proof["attempts"]) == (36, 4)


def test_a_child_of_several_processes_goes_on_as_its_parent(crew: Crews, tmp_path: Path) -> None:
    """Also with a mean of what a rank saw, which is that of all, and an optimizer that never leaves weights alone."""
    odd = ("model._target_=mine.odd.Centres", "optimizer=sgd", "optimizer._target_=mine.odd.Decays")
    command = (*SMOKE, FSDP, *odd, "+callbacks.brakes._target_=mine.odd.Brakes", f"run.root={tmp_path}")
    finished(crew(2, *command, "trainer.max_steps=4", "run.name=parent", cwd=USER))
    finished(crew(2, *command, "trainer.max_steps=8", "run.name=whole", cwd=USER))
    more = (f"run.parent={folder(tmp_path, 'parent')}", "run.inherit=all")
    finished(crew(2, *command, "trainer.max_steps=8", "run.name=child", *more, cwd=USER))
    whole, child = (results(folder(tmp_path, name)) for name in ("whole", "child"))
    assert (child.weights, child.tensors) == (whole.weights, whole.tensors)
    first, second = (drawn(folder(tmp_path, "child"), rank) for rank in range(2))
    assert torch.equal(first, drawn(folder(tmp_path, "whole"), 0))
    assert torch.equal(second, drawn(folder(tmp_path, "whole"), 1))
    assert not torch.equal(first, second)


def drawn(run: Path, rank: int) -> torch.Tensor:
    """The state of torch's generator of a rank in the newest checkpoint."""
    store = CheckpointStore(LocalLocation(run))
    checkpoint, name = store.open(store.commits()[0]), f"generators/{rank}/torch"
    place = checkpoint.places[name]
    return checkpoint.reader.read({name: (place, rows_of(place.kind.shape))})[name]


def ledger(run: Path) -> dict[int, str]:
    """The line of every step, by whichever attempt."""
    lines = (line for path in sorted(run.glob("ledger/*.txt")) for line in path.read_text().splitlines()[1:])
    return {int(line.split()[0]): line for line in lines}


def test_a_run_is_the_same_in_all_layouts_up_to_rounding(life: Lives, crew: Crews, tmp_path: Path) -> None:
    """Losses, gradient norms and the means over 360 samples in four batches, which three processes have unequally."""
    command = (*SMOKE, "data.batch_size=48", "model.dropout=0.0", "trainer.accumulate=2", "trainer.ema_decay=0.9")
    command = (*command, "data.evaluation_batch_size=100", f"run.root={tmp_path}")
    assert life(*command, "run.name=one").status == 0
    expected = metric_lines(folder(tmp_path, "one"))
    assert {"train/loss", "train/grad_norm", "val/loss", "val/accuracy"} <= expected[0].keys()
    weights = load_file(folder(tmp_path, "one") / "model.safetensors")
    for size, layout in [(3, DDP), (2, FSDP)]:
        finished(crew(size, *command, layout, f"run.name={size}"))
        for line, actual in zip(expected, metric_lines(folder(tmp_path, f"{size}")), strict=True):
            assert actual == pytest.approx(line, rel=1e-4)
        for name, tensor in load_file(folder(tmp_path, f"{size}") / "model.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", [slow(DDP), FSDP])
def test_weights_that_were_built_frozen_are_trained_by_all(
    layout: str, life: Lives, crew: Crews, tmp_path: Path
) -> None:
    """As by one process, and to the bit after a kill."""
    odd = ("model._target_=mine.odd.Frozen", "task._target_=mine.odd.Thaws", "model.dropout=0.0")
    command = (*SMOKE, *odd, "trainer.max_steps=10", "trainer.ema_decay=0.9", f"run.root={tmp_path}")
    assert life(*command, "run.name=one", cwd=USER).status == 0
    finished(crew(2, *command, layout, "run.name=whole", cwd=USER))
    assert None in crew(2, *command, layout, "run.name=cut", cwd=USER, to=[0], step=6).statuses
    finished(crew(2, *command, layout, "run.name=cut", cwd=USER))
    assert not results(folder(tmp_path, "cut")).differences(results(folder(tmp_path, "whole")))
    alone, whole = (load_file(folder(tmp_path, name) / "model.safetensors") for name in ("one", "whole"))
    for name, tensor in alone.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_single_process_imports_no_torch_distributed(tmp_path: Path) -> None:
    code = """
import sys, torch
before = {*sys.modules}
import runner.experiment
from runner.__main__ import main
more = ("torch.distributed", "torch.nn.parallel", "torch._dynamo")
assert not [name for name in {*sys.modules} - before if name.startswith(more)]
assert main() == 0
ours = {name.removeprefix("runner.distributed.") for name in sys.modules if name.startswith("runner.distributed.")}
assert ours == {"communicator", "outside", "watchdog", "world"}, ours
"""
    command = [sys.executable, "-c", code, "experiment=smoke", "trainer.max_steps=2", f"run.root={tmp_path}"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(USER.parent.parent)})


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WHERE = {**os.environ, "PYTHONPATH": f"{USER.parent.parent}:{USER}", "OMP_NUM_THREADS": "1"}
HANGS = ("task._target_=mine.tasks.Hangs", "~task.label_smoothing", "+task.rank=1", "+task.step=15")
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.background=false")


@pytest.mark.campaign
def test_torchrun_starts_a_run_again_by_itself(tmp_path: Path) -> None:
    """A rank is killed in the middle, and torchrun begins all of them anew."""
    ended = subprocess.run(
        [
            *TORCHRUN,
            "--max-restarts=1",
            "-m",
            "runner",
            *SMOKE,
            *HANGS,
            "+task.dies=true",
            "+task.once=died",
            *EVERY_STEP,
            f"run.root={tmp_path}",
        ],
        cwd=tmp_path,
        env=WHERE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "attempt  2, resumed from step 14 of attempt 1" in ended.stdout
    assert "finished step 30" in ended.stdout
    assert [path.name for path in tmp_path.rglob("*.log")] == ["runner.log"]


@pytest.mark.campaign
def test_ranks_do_not_outlive_torchrun(tmp_path: Path) -> None:
    """It is killed while one of them hangs and the other waits for that one, which both would do for an hour."""
    command = [*TORCHRUN, "-m", "runner", *SMOKE, *HANGS, "runtime.timeout=3600", *EVERY_STEP, f"run.root={tmp_path}"]
    with (tmp_path / "said").open("wb") as log:
        torchrun = subprocess.Popen(command, cwd=tmp_path, env=WHERE, stdout=log, stderr=log)
    try:
        until(lambda: [*tmp_path.rglob("commits/*-s000000014-*")], process=torchrun)
        ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    finally:
        torchrun.kill()
        torchrun.wait()
    until(lambda: not any(runs(int(rank)) for rank in ranks))
    assert b"the launcher that started it, is gone" in (tmp_path / "said").read_bytes()


def runs(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


MISTAKES = {
    "uneven": (
        ("data.batch_size=9",),
        "data.batch_size=9 samples of a step cannot be shared out among 2 processes equally; start 1, 3, 9 of them",
    ),
    "shard": ((FSDP, "runtime.shard=3"), "runtime.shard=3 does not divide the 2 processes into equal replicas"),
    "fp16": ((FSDP, "trainer.precision=fp16"), "trainer.precision=fp16 needs runtime.parallel=ddp"),
    "iterable": (
        ("data.train._target_=mine.data.Stateless", "~data.train.split", "~data.train.shift", "+data.train.size=64"),
        "would read all of it. Make it map-style",
    ),
    "typo": (("trainer.max_step=3",), "Key 'max_step' not in 'TrainerConfig'"),
    "sweep": (("-m", "seed=1,2"), "a sweep (-m) was started in 2 processes"),
}


@pytest.mark.parametrize("name", quick_first(MISTAKES, "uneven", "iterable", "sweep"))
def test_a_mistake_is_reported_once(name: str, crew: Crews, tmp_path: Path) -> None:
    overrides, message = MISTAKES[name]
    ended = crew(2, *overrides, *SMOKE, f"run.root={tmp_path}", cwd=USER)
    assert ended.statuses == [2, 2], ended.output
    assert ended.output.count(message) == 1, ended.output
    assert "Traceback" not in ended.output

"""Data workers: what they cannot send is an error, and none is left, however training ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import Lives
from marks import slow
from omegaconf import OmegaConf
from results import results
from torch.utils.data import IterableDataset, get_worker_info
from waiting import until

from runner import signals
from runner.data.fetch import Fetcher
from runner.data.iterable import BatchOptions, IterableStream
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan
from runner.data.stream import EvaluationData, MapStyleStream
from runner.errors import DataError

USER = Path(__file__).parent / "user"
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LIMIT = 60.0  # seconds, where a fault would last forever
METHODS = ["fork", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("spawn", "forkserver"))]


class Numbers:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(index))


class Endless(IterableDataset[Any]):
    """An iterable of numbers that needs no state."""

    def __iter__(self) -> Iterator[Any]:
        return iter(range(1000))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Killed(Numbers):
    """A large batch that is sent in the pipe itself, and then the worker is killed."""

    def __getitem__(self, index: int) -> Any:
        if index >= 8 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return "x" * (1 << 20)


class Blocks(Numbers):
    """Waits forever at a sample."""

    def __getitem__(self, index: int) -> Any:
        if index == 20:
            threading.Event().wait()
        return super().__getitem__(index)


class Strange(Exception):
    """An exception that is pickled and cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} {two}")


def function(samples: list[Any]) -> Any:
    return lambda: samples


def generator(samples: list[Any]) -> Any:
    return (sample for sample in samples)


def with_gradient(samples: list[Any]) -> Any:
    return torch.ones(2, requires_grad=True) * 2


def with_lock(samples: list[Any]) -> Any:
    return {"x": [threading.Lock()]}


def strange(samples: list[Any]) -> Any:
    return [Strange(1, 2)]


def training(samples: Any, loading: LoaderOptions, collate: Any = None) -> MapStyleStream:
    plan = Plan(len(samples), 1, 4, shuffle=False, randomness="off")
    return MapStyleStream(Fetcher(samples, plan, label="train", collate=collate), loading=loading, device=CPU)


def take(stream: MapStyleStream, steps: int) -> None:
    for _ in range(steps):
        list(stream.step())
        stream.advance()


def read_training(loading: LoaderOptions, collate: Any) -> None:
    stream = training(Numbers(), loading, collate)
    stream.open()
    list(stream.step())


def read_iterable(loading: LoaderOptions, collate: Any) -> None:
    options = BatchOptions(seed=1, batch_size=4, randomness="off", collate=collate)
    stream = IterableStream(Endless(), options, micro_batches=1, loading=loading, device=CPU)
    stream.open()
    list(stream.step())


def read_evaluation(loading: LoaderOptions, collate: Any) -> None:
    data = EvaluationData(
        Numbers(), seed=1, batch_size=4, randomness="off", loading=loading, device=CPU, collate=collate
    )
    list(data)


READERS = {"data.train": read_training, "data.train (a Endless)": read_iterable, "data.validation": read_evaluation}


@pytest.fixture
def handlers() -> Iterator[None]:
    """The runner's signal handlers, for one test."""
    before = {number: signal.getsignal(number) for number in (*signals.STOP_SIGNALS, signal.SIGURG)}
    signals.install()
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", READERS)
def test_a_batch_that_cannot_be_sent_is_an_error(key: str, method: str) -> None:
    with pytest.raises(DataError) as raised:
        READERS[key](LoaderOptions(2, start_method=method), function)
    told = str(raised.value)
    assert told.startswith(f"{key}: a data worker cannot send what it has read: ")
    assert "pickle" in told
    assert "runtime.num_workers=0" in told


@pytest.mark.parametrize(
    ("collate", "told"),
    [
        (generator, "cannot pickle 'generator' object"),
        (with_lock, "cannot pickle '_thread.lock' object"),
        (with_gradient, r"detach\(\) on tensors of a batch"),
        (strange, r"TypeError: .*missing 1 required positional argument"),
    ],
)
def test_unsendable_values_are_reported(collate: Callable[..., Any], told: str) -> None:
    for read in READERS.values():
        with pytest.raises(DataError, match=told):
            read(LoaderOptions(1), collate)


def test_batches_before_an_unsendable_one_come_in_order() -> None:
    def collate(samples: list[Any]) -> Any:
        return function(samples) if samples[0] == 20 else torch.stack(samples)

    stream = training(Numbers(), LoaderOptions(2, prefetch=4), collate)
    stream.open()
    for first in range(0, 20, 4):
        ((_, batch),) = stream.step()
        assert batch[0] == first
        stream.advance()
    with pytest.raises(DataError, match="cannot send"):
        list(stream.step())


class Server(Numbers):
    """Whether the parent of the process that reads a sample has loaded torch."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor("libtorch" in Path(f"/proc/{os.getppid()}/maps").read_text())


def test_the_fork_server_imports_torch_for_all_workers() -> None:
    stream = training(Server(), LoaderOptions(1, start_method="forkserver"))
    try:
        stream.open()
        ((_, batch),) = stream.step()
        assert batch.all()
    finally:
        stream.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("handlers")
def test_a_killed_worker_is_reported_with_the_cause(method: str) -> None:
    """In the middle of a message, too, at whose rest the training process would wait forever."""
    stream = training(Killed(), LoaderOptions(2, start_method=method))
    stream.open()
    with pytest.raises(DataError, match=r"data worker \d \(pid \d+\) was ended by SIGKILL.*memory"):
        take(stream, 4)


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), BaseException("x")])
def test_a_worker_that_ends_is_reported_with_its_status(error: BaseException) -> None:
    """And not by the batches that it has sent and can no longer hand over."""

    def collate(samples: list[Any]) -> Any:
        if samples[0] >= 20:
            raise error
        return torch.stack(samples)

    stream = training(Numbers(), LoaderOptions(2, prefetch=8), collate)
    stream.open()
    with pytest.raises(DataError, match=r"^data.train: data worker \d \(pid \d+\) ended with status [13]"):
        take(stream, 8)


@pytest.mark.parametrize("method", METHODS)
def test_closing_ends_workers_that_wait_for_ever(method: str) -> None:
    stream = training(Blocks(), LoaderOptions(2, start_method=method))
    stream.open()
    take(stream, 4)
    began = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - began < LIMIT
    assert not multiprocessing.active_children()


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5 * LIMIT, env=environment)


FEW = """
import multiprocessing, resource, sys
from test_workers import Numbers, training
from runner.data.loader import LoaderOptions
from runner.errors import DataError

stream = training(Numbers(), LoaderOptions(4, start_method=sys.argv[1]))
first = multiprocessing.get_context(sys.argv[1]).Process(target=int)  # opens what the first of all opens
first.start()
first.join()
opened = resource.getrlimit(resource.RLIMIT_NOFILE)
import os
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + int(sys.argv[2]), opened[1]))
try:
    stream.open()
    held = [batch for _ in range(40) for batch in stream.step()]
except DataError as error:
    print(error)
print(len([p for p in multiprocessing.active_children() if p.is_alive()]), "left")
"""


@pytest.mark.parametrize(
    ("method", "more"), [("fork", 12), slow("fork", 20), pytest.param("spawn", 12, marks=pytest.mark.campaign)]
)
def test_too_few_open_files_end_with_the_remedy(method: str, more: int) -> None:
    ended = python(FEW, method, str(more))
    assert ended.returncode == 0, ended.stderr
    assert "ulimit -n" in ended.stdout, ended.stdout + ended.stderr
    assert "0 left" in ended.stdout


DEEP = """
from test_workers import Numbers, training
from runner.data.loader import LoaderOptions
from runner.errors import DataError

stream = training(Numbers(), LoaderOptions(1, start_method="fork"))
try:
    stream.open()
    list(stream.step())
except DataError as error:
    print(error)
stream.close()
"""


def test_a_long_temporary_folder_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches travel through sockets below it, whose paths have at most 107 bytes."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    ended = python(DEEP)
    assert "Set TMPDIR to a folder with a path of at most 70 characters" in ended.stdout, ended.stdout + ended.stderr


ORPHANS = """
import multiprocessing, os, signal, sys
from test_workers import Blocks, training
from runner.data.loader import LoaderOptions

stream = training(Blocks(), LoaderOptions(2, start_method=sys.argv[1]))
stream.open()
list(stream.step())
print(*[p.pid for p in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", METHODS[1]])
def test_workers_end_with_a_killed_training_process(method: str) -> None:
    """Also those that are busy forever."""
    ended = python(ORPHANS, method)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ended.stdout.split()))


FORKS = """
import multiprocessing, os, signal, subprocess, sys, time
from runner import signals

signals.install()
for _ in range(10):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(abs, range(4))
process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600])
process.start()
process.terminate()
process.join()
print(process.exitcode)
assert signals.received() is None
if os.fork() == 0:
    signals.ignore()  # as in a data worker
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    child.stdout.readline()
    child.terminate()
    print(child.wait(), flush=True)
    os._exit(0)
os.wait()
os.kill(os.getpid(), signal.SIGTERM)
print(signals.received())
"""


def test_children_of_somebodys_code_obey_signals() -> None:
    ended = python(FORKS)
    assert (ended.returncode, ended.stdout.split()) == (0, ["-15", "-15", "SIGTERM"]), ended.stderr


STUCK = """
import ctypes, os, threading
from runner import signals

signals.install()
print("begun", flush=True)
if {stuck}:
    mutex = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # runs no Python code any more
threading.Event().wait()
"""


@pytest.mark.parametrize("stuck", [False, True], ids=["waiting", "stuck in C"])
@pytest.mark.parametrize("numbers", ["TERM TERM", slow("INT TERM"), slow("TERM INT")])
def test_a_second_signal_ends_the_process_whatever_it_does(numbers: str, stuck: bool) -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK.format(stuck=stuck)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout
    process.stdout.readline()
    last = signal.SIGTERM
    for name in numbers.split():
        last = signal.Signals[f"SIG{name}"]
        process.send_signal(last)
        time.sleep(1)  # else they are taken for one that was sent twice
    assert process.wait(LIMIT) in (-last, 128 + last)
    process.stdout.close()


@pytest.mark.parametrize(
    ("where", "workers"),
    [
        ("train", 1),
        ("validation", 0),
        ("iterable", 1),
        *(slow(*case) for case in (("train", 0), ("validation", 1), ("iterable", 0))),
    ],
)
def test_a_signal_is_obeyed_while_data_is_waited_for(where: str, workers: int, life: Lives, tmp_path: Path) -> None:
    """The state of the last step is committed, and the resumed run ends as if nothing had happened."""
    once = tmp_path / "once"
    step = {"train": 3, "validation": 20, "iterable": 2 if workers else 3}[where]
    after = f"{tmp_path}/waits/cut/commits/*-s{step:09d}-*" if workers and where != "validation" else "null"
    at = 20 if where == "validation" else 50
    waits = {"_target_": "mine.data.Waits", "size": 100, "at": at, "once": str(once), "after": after}
    good = {"_target_": "mine.data.Rows", "size": 100}
    stream = {"_target_": "mine.data.Iterable", "size": 100, "rows": waits}
    data = {"train": good, "validation": good, "batch_size": 16, "shuffle": False}
    data |= {"train": stream} if where == "iterable" else {where: waits}
    rows = OmegaConf.load(USER / "conf/experiment/rows.yaml")
    (tmp_path / "conf/experiment").mkdir(parents=True)
    text = "# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.merge({**rows, "data": {}}, {"data": data}))
    (tmp_path / "conf/experiment/waits.yaml").write_text(text)
    common = (f"--config-dir={tmp_path}/conf", "experiment=waits", "runtime.audit=false", f"run.root={tmp_path}")
    common = (*common, "runtime.check_batches=0")
    once.touch()
    whole = life(*common, f"runtime.num_workers={workers}", "run.name=whole", cwd=USER)
    assert whole.status == 0, whole.output
    once.unlink()
    cut = (*common, f"runtime.num_workers={workers}", "run.name=cut")
    ended = life(*cut, cwd=USER)
    assert ended.status == 75, ended.output
    steps = (2, 3) if step == 2 else (step,)  # the third looks ahead, in which it may be met
    assert any(f"SIGTERM: stopped after step {one}, which is committed" in ended.output for one in steps)
    assert life(*cut, cwd=USER).status == 0
    assert results(tmp_path / "waits/cut") == results(tmp_path / "waits/whole")

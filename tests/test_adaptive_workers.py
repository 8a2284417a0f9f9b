"""``runtime.num_workers=auto``: the number of workers moves while batches are read, and no bit changes."""

import logging
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import Dataset, Subset, get_worker_info

from runner.data.fetch import Fetcher
from runner.data.limits import Limits, cores, free_memory
from runner.data.loader import LoaderOptions
from runner.data.plan import Plan
from runner.data.stream import EvaluationData, MapStyleStream
from runner.data.workers import Measurement, WorkerChoice, unread_copy
from runner.distributed.world import local_size
from runner.errors import DataError

CPU = torch.device("cpu")
N, BATCH = 50, 4


class Noisy(Dataset[Any]):
    """Draws, opens its file at the first read, and says which process has read a sample."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(range(N)))
        self.path, self.strength = path, 1.0
        self.file: Any = None

    def __del__(self) -> None:
        if file := getattr(self, "file", None):
            file.close()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.file = self.file or self.path.open("rb", buffering=0)
        self.file.seek(index)
        return self.file.read(1)[0] + torch.rand(3)


class Where(Noisy):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), get_worker_info() is not None


class Fails(Noisy):
    """Workers end at a sample, or cannot begin."""

    def __getitem__(self, index: int) -> Any:
        if index == N // 2 and get_worker_info() is not None:
            os._exit(3)
        return super().__getitem__(index)


class Unsendable(Noisy):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be sent")

    def __deepcopy__(self, memo: Any) -> Any:
        return Noisy(self.path)


class Locked(Noisy):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lock = threading.Lock()


class ByProcess(Noisy):
    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(get_worker_info() is not None))


class OfItsModule(Noisy):
    """Keeps the open file in its class."""

    opened: int | None = None

    def __getitem__(self, index: int) -> Any:
        if self.opened is None:
            type(self).opened = os.open(self.path, os.O_RDONLY)
        return torch.tensor(float(index))


class OpenOnce(Noisy):
    """Its library refuses to open a file twice in a process, of which a forked one knows the open files."""

    paths: ClassVar[set[Path]] = set()

    def __del__(self) -> None:
        if getattr(self, "file", None):
            self.paths.discard(self.path)
        super().__del__()

    def __getitem__(self, index: int) -> Any:
        if self.file is None and self.path in self.paths:
            raise RuntimeError("already open in this process")
        self.paths.add(self.path)
        return super().__getitem__(index)


class ThreadPool(Noisy):
    """Reads in a thread of its module, which a forked process does not have."""

    pool: ThreadPoolExecutor | None = None

    def __getitem__(self, index: int) -> Any:
        if self.pool is None:
            type(self).pool = ThreadPoolExecutor(1)
        assert self.pool
        return self.pool.submit(lambda: self.path.read_bytes()[index]).result() + torch.rand(3)


class Script:
    """Chooses the given numbers of workers one after the other, then the last."""

    def __init__(self, numbers: list[int], limits: Limits, options: LoaderOptions) -> None:
        self.numbers = [*numbers]

    def after(self, measured: Measurement) -> int:
        return self.numbers.pop(0) if self.numbers else measured.workers

    def limit(self, measured: Measurement) -> tuple[int, str]:
        return 4, "a script"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoaderOptions]:
    """Options with which the numbers of workers are those given."""

    def make(*numbers: int, start_method: str = "fork") -> LoaderOptions:
        monkeypatch.setattr("runner.data.workers.WorkerChoice", partial(Script, list(numbers)))
        return LoaderOptions(start_method=start_method, limits=Limits(4, seconds=(0.0, 0.0)))

    return make


def opened(samples: Any, loading: LoaderOptions, *, audit: bool = False, consumed: int = 0) -> MapStyleStream:
    fetcher = Fetcher(samples, Plan(N, 1, BATCH, 2), label="train")
    stream = MapStyleStream(fetcher, loading=loading, device=CPU, audit=audit)
    stream.consumed = consumed
    stream.open()
    return stream


def read(stream: MapStyleStream, steps: int) -> tuple[list[Any], list[int]]:
    """The batches of some steps, and the number of workers in each step."""
    batches, numbers = [], []
    for _ in range(steps):
        stream.ready()
        batches += [batch for _, batch in stream.step()]
        stream.advance()
        numbers.append(stream.workers)
    return batches, numbers


def same(batches: list[Any], others: list[Any]) -> bool:
    return len(batches) == len(others) and all(map(torch.equal, batches, others))


@pytest.fixture
def expected(tmp_path: Path) -> list[Any]:
    return read(opened(Noisy(tmp_path / "plain"), LoaderOptions()), 60)[0]


def test_the_bits_stay_while_the_number_moves(scripted: Any, tmp_path: Path, expected: list[Any]) -> None:
    stream = opened(Noisy(tmp_path / "x"), scripted(2, 3, 0, 1, 4, 0), audit=True)
    batches, numbers = read(stream, 60)
    stream.close()
    assert same(batches, expected)
    assert list(dict.fromkeys(numbers)) == [0, 2, 3, 1, 4]
    assert numbers[-1] == 0


def test_workers_read_after_the_move(scripted: Any, tmp_path: Path) -> None:
    stream = opened(Where(tmp_path / "x"), scripted(2, 0))
    batches, _ = read(stream, 40)
    stream.close()
    assert {bool(there.any()) for _, there in batches} == {True, False}
    assert not batches[0][1].any()
    assert not batches[-1][1].any()


@pytest.mark.parametrize("cut", [3, 6, 7, 11, 20])
def test_a_resume_around_a_move_goes_on_alike(scripted: Any, tmp_path: Path, expected: list[Any], cut: int) -> None:
    first = opened(Noisy(tmp_path / "x"), scripted(2, 0, 1))
    before, _ = read(first, cut)
    state = first.state_dict()  # and workers have read ahead
    first.close()
    second = opened(Noisy(tmp_path / "x"), scripted(1, 3))
    second.load_state_dict(state)
    after, _ = read(second, 60 - cut)
    second.close()
    assert same(before + after, expected)
    assert "workers" not in str(state)


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.campaign)])
def test_a_worker_that_dies_leaves_reading_to_this_process(
    scripted: Any, tmp_path: Path, expected: list[Any], caplog: pytest.LogCaptureFixture, start_method: str
) -> None:
    batches, numbers = read(opened(Fails(tmp_path / "x"), scripted(2, start_method=start_method)), 60)
    assert same(batches, expected)
    assert (2 in numbers, numbers[-1]) == (True, 0)
    assert "this process reads by itself; workers failed" in caplog.text


def test_data_that_cannot_be_sent_stays_in_this_process(
    scripted: Any, tmp_path: Path, expected: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    batches, numbers = read(opened(Unsendable(tmp_path / "x"), scripted(1, 2, start_method="spawn")), 60)
    assert same(batches, expected)
    assert {*numbers} == {0}
    assert caplog.text.count("workers cannot start: TypeError: cannot be sent") == 1


@pytest.mark.parametrize(
    ("kind", "cause"), [(Locked, "it cannot be copied"), (OfItsModule, "leave files open that workers must not share")]
)
def test_data_that_workers_must_not_get_stays_here(
    scripted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any, cause: str
) -> None:
    caplog.set_level(logging.INFO, "runner")
    _, numbers = read(opened(kind(tmp_path / "x"), scripted(2, 2, 2)), 40)
    if OfItsModule.opened is not None:
        os.close(OfItsModule.opened)
        OfItsModule.opened = None
    assert {*numbers} == {0}
    assert caplog.text.count(cause) == 1


def test_a_fork_has_no_open_files_of_the_data(scripted: Any, tmp_path: Path, expected: list[Any]) -> None:
    stream = opened(OpenOnce(tmp_path / "x"), scripted(2, 0, 1), audit=True)
    batches, numbers = read(stream, 60)
    stream.close()
    assert same(batches, expected)
    assert list(dict.fromkeys(numbers)) == [0, 2, 1]


def test_workers_that_wait_forever_are_given_up(
    scripted: Any, tmp_path: Path, expected: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    loading = scripted(2, 2, 2)
    loading = replace(loading, limits=replace(loading.limits, timeout=1.0))
    batches, numbers = read(opened(ThreadPool(tmp_path / "x"), loading), 60)
    assert ThreadPool.pool
    ThreadPool.pool.shutdown()
    assert same(batches, expected)
    assert numbers[-1] == 0
    assert "Its workers may wait for a thread or a lock" in caplog.text


@pytest.mark.parametrize("wrap", [lambda samples: samples, lambda samples: Subset(samples, range(N))])
def test_data_that_is_changed_from_outside_is_an_error(scripted: Any, tmp_path: Path, wrap: Any) -> None:
    samples = Noisy(tmp_path / "x")
    samples.strength = 0.5
    stream = opened(wrap(samples), scripted(2, 0))
    read(stream, 20)
    samples.strength = 1.0
    with pytest.raises(DataError, match=r"strength of .* was 0.5 and is 1.0 now.*runtime.num_workers=0"):
        read(stream, 20)
    stream.close()


def test_samples_that_differ_in_a_worker_stay_here(
    scripted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches, numbers = read(opened(ByProcess(tmp_path / "x"), scripted(2), audit=True), 20)
    assert numbers[-1] == 0
    assert not torch.cat(batches).any()
    assert "It depends on the process" in caplog.text


def test_an_error_of_the_data_is_raised_as_ever(scripted: Any, tmp_path: Path) -> None:
    class Short(Noisy):
        def __getitem__(self, index: int) -> Any:
            return torch.tensor(1 / (index - 7))

    with pytest.raises(DataError, match=r"sample 7 of .*Short cannot be read"):
        read(opened(Short(tmp_path / "x"), scripted(2)), 60)


def test_evaluation_moves_as_well(scripted: Any, tmp_path: Path) -> None:
    def evaluation(loading: LoaderOptions) -> EvaluationData:
        data = Noisy(tmp_path / "x")
        return EvaluationData(data, seed=1, batch_size=3, randomness="sample", loading=loading, device=CPU)

    plain = [batch for _ in range(3) for _, batch in evaluation(LoaderOptions())]
    moving = evaluation(scripted(2, 0, 3))
    head = [batch for _, batch in moving.head(2)]
    batches = [batch for _ in range(3) for _, batch in moving]
    moving.close()
    assert same(batches, plain)
    assert same(head, plain[:2])


def choice(cores: float = 4, *, free: float = math.inf, shared: float = math.inf, **more: Any) -> WorkerChoice:
    limits = Limits(cores, lambda: free, lambda: shared, **more)
    return WorkerChoice(limits, LoaderOptions(start_method="fork", limits=limits))


def measured(workers: int, rest: float, waited: float, reading: float, *, busy: float = 1.0) -> Measurement:
    return Measurement(workers, rest, waited, reading, busy, size=1000)


def test_the_number_grows_until_reading_is_hidden() -> None:
    choose = choice(8)
    assert choose.after(measured(0, 0.01, 0.025, 0.025)) == 3
    assert choose.after(measured(3, 0.01, 0.002, 0.03)) == 5
    assert choose.after(measured(5, 0.01, 0.0, 0.03)) == 5


def test_workers_that_do_not_help_are_given_up() -> None:
    choose = choice()
    assert choose.after(measured(0, 0.01, 0.01, 0.01)) == 2
    assert choose.after(measured(2, 0.02, 0.005, 0.02)) == 0
    assert choose.after(measured(0, 0.01, 0.01, 0.01)) == 0


def test_other_work_is_tried_anew() -> None:
    choose = choice()
    assert choose.after(measured(0, 0.01, 0.03, 0.03)) == 4
    assert choose.after(measured(4, 0.01, 0.0, 0.03)) == 4
    assert choose.after(measured(4, 0.1, 0.0, 0.03)) == 1  # the model became larger
    assert choose.after(measured(1, 5.0, 0.0, 0.03)) == 0


def test_a_short_read_is_left_in_this_process() -> None:
    assert choice().after(measured(0, 0.001, 0.0004, 0.0004)) == 0
    assert choice().after(measured(0, 1.0, 0.04, 0.04)) == 0


@pytest.mark.parametrize(
    ("limits", "busy", "number"),
    [
        ({"cores": 2}, 1.0, 2),
        ({"cores": 0.5}, 1.0, 0),
        ({"cores": 2}, 0.2, 10),  # it waits for a store
        ({"cores": 8, "free": 500e6}, 1.0, 2),
        ({"cores": 8, "shared": 6000}, 1.0, 1),
        ({"cores": 7, "fit": lambda most: min(most, 6)}, 1.0, 6),
        ({"cores": 100}, 1.0, 32),
    ],
)
def test_the_number_is_limited(limits: dict[str, Any], busy: float, number: int) -> None:
    now = measured(0, 0.001, 1.0, 1.0, busy=busy)
    assert choice(**limits).limit(now)[0] == choice(**limits).after(now) == number


def cgroups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"},
        {"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["a parent", "a container", "version 1"],
)
def test_a_quota_of_the_group_counts(tmp_path: Path, files: dict[str, str]) -> None:
    assert cores(cgroups(tmp_path, files)) == 0.5


def test_no_quota_leaves_the_affinity_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    files = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}
    assert cores(cgroups(tmp_path, files)) == 1


def test_memory_of_the_group_counts(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4000 kB\n",
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/memory.max": "5000\n",
        "sys/fs/cgroup/a/memory.current": "3000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500\n",
    }
    assert free_memory(cgroups(tmp_path, files)) == 2500
    assert free_memory(tmp_path / "nothing") == math.inf


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "8", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "11", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 4),
        ({"WORLD_SIZE": "8", "RANK": "0"}, 8),
    ],
)
def test_processes_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], number: int
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert local_size() == number


def test_a_copy_shares_large_data_and_modules_alone() -> None:
    sparse = pytest.importorskip("scipy.sparse")

    class Inner:
        def __init__(self) -> None:
            self.large, self.small, self.table = torch.zeros(20_000), [1], {"x": list(range(2_000))}
            self.matrix = sparse.eye_array(20_000)

    class Outer:
        def __init__(self) -> None:
            self.parts, self.module = [Inner()], torch.utils.data

    outer = Outer()
    copied = unread_copy(outer).parts[0]
    inner = outer.parts[0]
    assert copied.large is inner.large
    assert copied.table["x"] is inner.table["x"]
    assert copied.matrix is inner.matrix
    assert copied.small is not inner.small

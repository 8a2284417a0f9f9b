"""Fixtures of all tests."""

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "user"))
sys.path.insert(0, str(Path(__file__).parent))

import servers
from crews import Crews
from lives import Lives, lives

from runner.run.attempts import Attempt

if TYPE_CHECKING:
    from judge import Judge

# A shell that starts the tests in the background has them, and every process that they start, ignore Ctrl-C; nohup has
# them ignore the end of the session.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


CAMPAIGN_END = "RUNNER_CAMPAIGN_END"  # set here for the processes of pytest-xdist, in seconds since 1970


def pytest_configure() -> None:
    """The time for the campaigns counts from the start of the first process of pytest."""
    if minutes := os.environ.get("RUNNER_CAMPAIGN_MINUTES"):
        os.environ.setdefault(CAMPAIGN_END, str(time.time() + 60 * float(minutes)))


@pytest.hookimpl(trylast=True)  # after the selection by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a limit of time, the first campaign of each file comes before the second of any."""
    if CAMPAIGN_END in os.environ:
        turns: Counter[Path] = Counter()
        turn = {}
        for item in items:
            turn[item] = turns[item.path]
            turns[item.path] += "cluster" not in getattr(item, "fixturenames", ())  # one cluster for all its tests
        items.sort(key=turn.__getitem__)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No campaign starts after the end of the time for campaigns."""
    if item.get_closest_marker("campaign") and time.time() > float(os.environ.get(CAMPAIGN_END, "inf")):
        pytest.skip("the time for the campaigns is over (RUNNER_CAMPAIGN_MINUTES)")


@pytest.fixture(scope="session", autouse=True)
def scratch_of_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What killed processes leave in the temporary folder goes with the folders of the tests."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more threads, which wait for each other beside the other tests' processes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hearts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attempts that a test leaves behind end with it, instead of going on into what the next one looks at."""
    begun: list[Attempt] = []
    begin = Attempt.__init__

    def remembered(self: Attempt, *arguments: Any) -> None:
        begin(self, *arguments)
        begun.append(self)

    monkeypatch.setattr(Attempt, "__init__", remembered)
    yield
    for attempt in begun:
        attempt.stop_beating()


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the temporary folders of this test are. Data workers have sockets there, whose paths must be short."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)  # for processes
        yield Path(folder)


@pytest.fixture(scope="module")
def module_judge() -> "Iterator[Judge]":
    from judge import USER, Judge

    from runner.verify.execution import fork_servers

    with fork_servers(USER) as servers:
        yield Judge(servers)


@pytest.fixture
def judge(module_judge: "Judge", scratch: Path) -> "Judge":
    """Call it for the verdict of ``runner.verify`` on the small experiment of ``user``."""
    return module_judge


@pytest.fixture(scope="session")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Call it to live one process life of the runner, and to end it as you please."""
    with lives(tmp_path_factory.mktemp("lives")) as server:
        yield server


@pytest.fixture(scope="session")
def crew(life: Lives) -> Crews:
    """Call it to live one life of a run of several processes, and to end some of them as you please."""
    return Crews(life)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Slurm cluster with two processors."""
    with servers.slurm(tmp_path_factory.mktemp("slurm"), cpus=2) as environment:
        yield environment


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """An S3 server with a bucket."""
    with servers.s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """An Azure server with a container."""
    with servers.azure(tmp_path_factory.mktemp("azure")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """A GCS server."""
    with servers.gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def sftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """An SSH server with an empty folder."""
    with servers.sftp(tmp_path_factory.mktemp("sftp")) as server:
        yield server

"""Whole runs on real stores: killed in the middle of a save, damaged, started twice, and equal to the bit to a run on
a disk that nobody disturbed.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import servers
from lives import Ended, Lives
from marks import slow
from results import results

import runner
from runner.runs.__main__ import main

COMMAND = ("experiment=digits", "trainer.max_steps=60", "trainer.evaluate_every_steps=20", "checkpoint.every_steps=10")
NAME = "digits/trainer.evaluate_every_steps=20,trainer.max_steps=60"


@dataclass(frozen=True)
class Store:
    """A server, and lives that have its credentials in their environment, or what they must be told besides."""

    server: servers.Server
    lives: Lives
    folder: Path

    def root(self, name: str) -> str:
        return f"{self.server.url}/{name}"

    @property
    def arguments(self) -> list[str]:
        options = {} if self.server.environment else self.server.options
        return [f"+run.storage_options.{key}={value}" for key, value in options.items()]

    def command(self, name: str) -> tuple[str, ...]:
        return (*COMMAND, f"run.root={self.root(name)}", *self.arguments)

    def life(self, *arguments: str, step: int | None = None, put: int | None = None) -> Ended:
        environment = self.server.environment
        return self.lives(*arguments, cwd=self.folder, environment=environment, step=step, put=put)

    def copy(self, name: str) -> Path:
        """The run directory as a synced copy on this machine."""
        target = self.folder / name
        system, path = fsspec.url_to_fs(f"{self.root(name)}/{NAME}", **self.server.options)
        for remote in system.find(path):
            local = target / os.path.relpath(remote, system._strip_protocol(path))
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(system.cat_file(remote))
        return target


@pytest.fixture(scope="module", params=["s3", slow("azure"), slow("sftp")])
def store(request: pytest.FixtureRequest, life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(request.getfixturevalue(request.param), life, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def undisturbed(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    assert life(*COMMAND, f"run.root={root}").status == 0
    return root / NAME


def test_killed_in_a_save_and_resumed_is_the_undisturbed_run(
    store: Store, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at puts of all kinds, in the background and not; the curves and the ledger are there as well."""
    command = store.command("killed")
    for put, background in [(12, "false"), (9, "true"), (13, "true")]:
        ended = store.life(*command, f"checkpoint.background={background}", "checkpoint.every=null", put=put)
        assert ended.status is None, ended.output
    ended = store.life(*command)
    assert (ended.status, "resumed from step" in ended.output) == (0, True), ended.output
    copy = store.copy("killed")
    assert not results(copy).differences(results(undisturbed))
    assert list((copy / "tensorboard").iterdir())
    assert main(["audit", str(copy)]) == 0
    assert "0 differing" in capsys.readouterr().out
    again = store.life(*command)
    assert (again.status, "attempt" in again.output) == (0, False)


def test_a_damaged_checkpoint_costs_steps_and_says_so(store: Store, undisturbed: Path) -> None:
    command = store.command("damaged")
    assert store.life(*command, step=35).status is None
    system, path = fsspec.url_to_fs(f"{store.root('damaged')}/{NAME}/data", **store.server.options)
    (newest,) = (name for name in system.find(path) if "s000000030" in name)
    raw = bytearray(system.cat_file(newest))
    raw[-100] ^= 1
    system.pipe_file(newest, bytes(raw))
    ended = store.life(*command)
    assert ended.status == 0, ended.output
    assert "unused   step 30 of attempt 1" in ended.output
    assert "resumed from step 20 of attempt 1" in ended.output
    assert not results(store.copy("damaged")).differences(results(undisturbed))


def test_of_two_runs_started_at_once_only_one_trains(store: Store) -> None:
    command, environment = store.command("twice"), store.server.environment
    started = [store.lives.start(*command, cwd=store.folder, environment=environment) for _ in range(2)]
    ended = [life.wait() for life in started]
    assert sorted(process.status for process in ended) == [0, 4], [process.output for process in ended]
    assert any("is in use by" in process.output for process in ended)


def test_no_secret_reaches_a_file_or_the_screen(store: Store) -> None:
    secrets = [value for key, value in store.server.options.items() if key in ("secret", "connection_string")]
    ended = store.life(*store.command("secret"), step=15)
    files = [
        path.read_bytes() for path in [*store.copy("secret").rglob("*"), *store.folder.rglob("*")] if path.is_file()
    ]
    for secret in secrets:
        assert secret not in ended.output
        assert not [raw for raw in files if secret.encode() in raw]


@pytest.mark.slow
def test_children_open_their_parent_with_the_runs_options(store: Store) -> None:
    command = ("experiment=smoke", "trainer.max_steps=5", f"run.root={store.root('family')}", *store.arguments)
    assert store.life(*command, "run.name=p").status == 0
    child = store.life(*command, "run.name=c", f"run.parent={store.root('family')}/smoke/p")
    fork = store.life(*command, "run.name=p", "optimizer.lr=0.5", "run.on_drift=fork")
    for ended, message in ((child, "weights from step 5 of"), (fork, "forked from step 5 of")):
        assert ended.status == 0, ended.output
        assert message in ended.output


def test_commands_take_the_options_of_a_store(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store with an endpoint of its own is known to a command by ``--storage-option`` alone."""
    root, run = store.root("asked"), f"{store.root('asked')}/smoke/p"
    command = ("experiment=smoke", "trainer.max_steps=5", f"run.root={root}", *store.arguments, "run.name=p")
    assert store.life(*command).status == 0
    for name in store.server.environment:
        monkeypatch.delenv(name, raising=False)
    options = [
        f"--storage-option={key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in store.server.options.items()
    ]
    for words in (["list", root], ["compare", root], ["show", run], ["audit", run], ["diff", run, run], ["prune", run]):
        assert main([*words, *options]) == 0, (words, capsys.readouterr())
    assert main(["export", run, str(tmp_path / "w.safetensors"), *options]) == 0
    assert runner.open(run, store.server.options).step == 5
    assert "step 5 of" in capsys.readouterr().out

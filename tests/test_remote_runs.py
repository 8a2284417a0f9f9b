"""Whole runs on real stores: killed in the middle of a save, damaged, started twice, and equal to the bit to a run on
a disk that nobody disturbed.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import servers
from lives import Lives, lives
from results import results

COMMAND = ("experiment=digits", "trainer.max_steps=60", "trainer.evaluate_every_steps=20", "checkpoint.every_steps=10")
NAME = "digits/trainer.evaluate_every_steps=20,trainer.max_steps=60"


@dataclass(frozen=True)
class Store:
    """A server, processes that have its credentials in their environment, and what they must be told besides."""

    server: servers.Server
    life: Lives
    arguments: tuple[str, ...]
    folder: Path

    def root(self, name: str) -> str:
        return f"{self.server.url}/{name}"

    def command(self, name: str) -> tuple[str, ...]:
        return (*COMMAND, f"run.root={self.root(name)}", *self.arguments)

    def copy(self, name: str) -> Path:
        """The run directory as a synced copy on this machine."""
        target = self.folder / name
        system, path = fsspec.url_to_fs(f"{self.root(name)}/{NAME}", **self.server.options)
        for remote in system.find(path):
            local = target / os.path.relpath(remote, system._strip_protocol(path))
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(system.cat_file(remote))
        return target


Serve = Callable[[Path], AbstractContextManager[servers.Server]]


@pytest.fixture(scope="module", params=[servers.s3, servers.azure, servers.sftp], ids=["s3", "azure", "sftp"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    serve: Serve = request.param
    folder = tmp_path_factory.mktemp("store")
    with serve(tmp_path_factory.mktemp("server")) as server, pytest.MonkeyPatch.context() as patch:
        arguments = []
        options = dict(server.options)
        if "connection_string" in options:
            patch.setenv("AZURE_STORAGE_CONNECTION_STRING", options["connection_string"])
        elif "secret" in options:
            patch.setenv("AWS_ACCESS_KEY_ID", options["key"])
            patch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_ENDPOINT_URL", options["client_kwargs"]["endpoint_url"])
        else:
            arguments = [f"+run.storage_options.{key}={value}" for key, value in options.items()]
        with lives(folder) as life:
            yield Store(server, life, tuple(arguments), folder)


@pytest.fixture(scope="module")
def undisturbed(life: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    assert life(*COMMAND, f"run.root={root}").status == 0
    return root / NAME


def test_killed_in_a_save_and_resumed_is_the_undisturbed_run(store: Store, undisturbed: Path) -> None:
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
    audit = subprocess.run(
        [sys.executable, "-m", "runner.runs", "audit", str(copy)], capture_output=True, text=True, check=False
    )
    assert (audit.returncode, "0 differing" in audit.stdout) == (0, True), audit.stdout + audit.stderr
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


def test_of_two_that_start_at_once_one_trains(store: Store, tmp_path: Path) -> None:
    command = store.command("twice")
    ended = []
    with lives(tmp_path) as other:
        other("--version")  # its server is up
        threads = [
            threading.Thread(target=lambda life=life: ended.append(life(*command))) for life in (store.life, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(one.status for one in ended) == [0, 4], [one.output for one in ended]
    assert any("is in use by" in one.output for one in ended)


def test_no_secret_reaches_a_file_or_the_screen(store: Store) -> None:
    secrets = [value for key, value in store.server.options.items() if key in ("secret", "connection_string")]
    ended = store.life(*store.command("secret"), step=15)
    files = [
        path.read_bytes() for path in [*store.copy("secret").rglob("*"), *store.folder.rglob("*")] if path.is_file()
    ]
    for secret in secrets:
        assert secret not in ended.output
        assert not [raw for raw in files if secret.encode() in raw]


def test_children_find_a_remote_parent_with_its_options(store: Store) -> None:
    command = ("experiment=smoke", "trainer.max_steps=5", f"run.root={store.root('family')}", *store.arguments)
    assert store.life(*command, "run.name=p").status == 0
    child = store.life(*command, "run.name=c", f"run.parent={store.root('family')}/smoke/p")
    fork = store.life(*command, "run.name=p", "optimizer.lr=0.5", "run.on_drift=fork")
    for ended, told in ((child, "weights from step 5 of"), (fork, "forked from step 5 of")):
        assert ended.status == 0, ended.output
        assert told in ended.output

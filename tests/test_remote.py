"""Bad days of a remote store: it hangs, fails for a while, refuses, is not there, is given secrets."""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import servers
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from marks import slow
from servers import Server
from waiting import until

from runner.errors import ConfigError, StorageError
from runner.run.directory import RunDirectory
from runner.storage import backend, is_remote, open_location, remote
from runner.storage.location import Entry, Location, local_root

VERBS: dict[str, Callable[[Location], Any]] = {
    "put": lambda location: location.put("new", [b"new"]),
    "replace": lambda location: location.replace("old", [b"old"]),
    "read": lambda location: location.read("old", limit=9),
    "read_into": lambda location: location.read_into("old", 0, [memoryview(bytearray(3))]),
    "list": lambda location: location.list(""),
    "remove": lambda location: location.remove("new"),
}


class Refused(Exception):
    """What azure raises, for example: an error of no built-in kind that has a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server says {status}")
        self.status_code = status


class Faulty(MemoryFileSystem):  # type: ignore[misc]
    """Memory whose next operations fail, before or after they were carried out."""

    protocol = ("faulty", "memory")
    before: ClassVar[list[BaseException]] = []
    after: ClassVar[list[BaseException]] = []
    hold: ClassVar[list[threading.Event]] = []
    calls: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("faulty:/")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._faulty("pipe_file", path, value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        return self._faulty("cat_file", path, start, end)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self._faulty("ls", path, detail)

    def rm_file(self, path: str) -> None:
        self._faulty("rm_file", path)

    def info(self, path: str, **kwargs: Any) -> Any:
        return self._faulty("info", path) if self.before else super().info(path)

    def _faulty(self, verb: str, *arguments: Any) -> Any:
        self.calls.append(verb)
        if self.before:
            raise self.before.pop(0)
        if self.hold:
            self.hold.pop(0).wait(10)
        result = getattr(MemoryFileSystem, verb)(self, *arguments)
        if self.after:
            raise self.after.pop(0)
        return result


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BACKOFF", 0.001)


@pytest.fixture
def faulty() -> Iterator[Location]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    location = open_location(f"faulty://{os.urandom(4).hex()}/run")
    location.replace("old", [b"old"])
    Faulty.calls.clear()
    yield location
    for faults in (Faulty.before, Faulty.after, Faulty.hold):
        faults.clear()


def passing() -> list[BaseException]:
    return [OSError(5, "reset"), Refused(503), asyncio.TimeoutError()]


@pytest.mark.parametrize("verb", ["put", "replace", "list", "remove"])
@pytest.mark.parametrize("when", [Faulty.before, Faulty.after], ids=["before", "after"])
def test_transient_errors_are_retried(faulty: Location, verb: str, when: list[BaseException]) -> None:
    faulty.put("new", [b"old"])
    # What was removed before the answer was lost is gone at the second try, which is then the last.
    when += passing()[:1] if verb == "remove" else passing()
    VERBS[verb](faulty)
    assert not when
    expected = [Entry("old", 3)] if verb == "remove" else [Entry("new", 3), Entry("old", 3)]
    assert faulty.list("") == expected
    if verb == "put":
        assert faulty.read("new", limit=9) == b"new"


@pytest.mark.parametrize("verb", ["read", "read_into"])
def test_a_read_is_tried_again(faulty: Location, verb: str) -> None:
    Faulty.before += passing()
    VERBS[verb](faulty)
    assert not Faulty.before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", [EOFError, ValueError, asyncio.TimeoutError, asyncio.CancelledError, Exception])
def test_a_permanent_error_names_the_object_and_cause(faulty: Location, verb: str, kind: type[BaseException]) -> None:
    Faulty.before += [kind("gone") for _ in range(20)]
    with pytest.raises(StorageError, match=rf"cannot \w+ faulty://\w+/run(/old|/new)?: {kind.__name__}: gone"):
        VERBS[verb](faulty)
    assert len(Faulty.calls) >= backend.TRIES


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "error", [PermissionError("no"), Refused(403), Refused(400), NotImplementedError("no")], ids=repr
)
def test_a_refusal_is_not_tried_again(faulty: Location, verb: str, error: BaseException) -> None:
    Faulty.before += [error] * 20
    with pytest.raises(StorageError):
        VERBS[verb](faulty)
    assert len(Faulty.calls) <= 2  # a read that fails asks for the size


@pytest.mark.parametrize("verb", ["read", "list"])
def test_an_error_is_not_taken_for_absence(faulty: Location, verb: str) -> None:
    for error in (PermissionError("no"), OSError(5, "broken"), KeyError("x")):
        Faulty.before[:] = [error] * 20
        with pytest.raises(StorageError):
            VERBS[verb](faulty)


def test_retries_do_not_draw_from_the_users_generator(faulty: Location) -> None:
    import random

    state = random.getstate()
    Faulty.before += passing()
    faulty.list("")
    assert random.getstate() == state


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["s3", "az", "sftp"])
def test_a_server_that_never_answers_is_given_up(kind: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "DEADLINE", 0.5)
    monkeypatch.setattr(backend, "TRIES", 2)
    with servers.silent() as port:
        location = open_location(*silent(kind, port))
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot \w+ .*TimeoutError: (no answer|an earlier try)"):
            VERBS[verb](location)
        assert time.monotonic() - start < (20 if verb == "list" else 5)


def silent(kind: str, port: int) -> tuple[str, dict[str, Any]]:
    """URL and options of a store of some kind at a port."""
    endpoint = f"http://127.0.0.1:{port}"
    if kind == "s3":
        return "s3://bucket/x", {"key": "labkey", "secret": "labsecret", "client_kwargs": {"endpoint_url": endpoint}}
    if kind == "az":
        account = f"DefaultEndpointsProtocol=http;AccountName=a;AccountKey=aaaa;BlobEndpoint={endpoint}/a;"
        return "az://container/x", {"connection_string": account}
    return f"sftp://nobody@127.0.0.1:{port}/x" if kind == "sftp" else "stuck://x", {}


@pytest.mark.parametrize("kind", ["s3", slow("sftp"), slow("stuck")])
def test_an_abandoned_operation_does_not_keep_the_process(kind: str) -> None:
    code = """
import ast, sys, time, fsspec
from fsspec.implementations.memory import MemoryFileSystem
from runner.errors import StorageError
from runner.storage import backend, open_location
backend.DEADLINE, backend.TRIES = 0.5, 1
class Stuck(MemoryFileSystem):
    def pipe_file(self, *arguments, **options):
        time.sleep(60)
fsspec.register_implementation("stuck", Stuck)
url, options = ast.literal_eval(sys.argv[1])
try:
    open_location(url, options).put("a", [b"x"])
except StorageError:
    print("given up", flush=True)
"""
    with servers.silent() as port:
        ended = subprocess.run(
            [sys.executable, "-c", code, repr(silent(kind, port))],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            timeout=20,
        )
    assert (ended.returncode, ended.stdout) == (0, b"given up\n"), ended.stderr


def test_larger_objects_have_more_time() -> None:
    assert backend.deadline(0) == backend.DEADLINE
    assert backend.deadline(32 << 20) > 2 * backend.DEADLINE


def test_a_late_upload_never_lands_on_a_newer_one(faulty: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "DEADLINE", 0.2)
    monkeypatch.setattr(backend, "TRIES", 1)
    event = threading.Event()
    journal = faulty.journal("j")
    journal.append(b"one")
    Faulty.hold.append(event)
    with pytest.raises(StorageError, match="no answer within"):
        journal.sync()
    journal.append(b"two")
    with pytest.raises(StorageError, match="an earlier try"):
        journal.sync()
    faulty.put("other", [b"is not held up"])
    event.set()
    journal.sync()
    assert faulty.read("j", limit=9) == b"onetwo"
    time.sleep(0.2)
    assert faulty.read("j", limit=9) == b"onetwo"


def test_an_asynchronous_write_that_takes_too_long_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()

    class Slow(AsyncFileSystem):  # type: ignore[misc]
        protocol = "s3"
        cachable = False

        async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.set()
                raise

    fsspec.register_implementation("slow", Slow, clobber=True)
    monkeypatch.setattr(backend, "DEADLINE", 0.2)
    monkeypatch.setattr(backend, "TRIES", 1)
    with pytest.raises(StorageError, match="cannot write slow://bucket/x/a: "):
        open_location("slow://bucket/x").put("a", [b"x"])
    assert cancelled.wait(5)


def test_an_unsynced_journal_is_synced_whole_later(faulty: Location) -> None:
    journal = faulty.journal("j")
    journal.append(b"one")
    Faulty.before += [PermissionError("no")]
    with pytest.raises(StorageError):
        journal.sync()
    journal.sync()
    assert faulty.read("j", limit=9) == b"one"
    journal.append(b"two")
    journal.sync()
    calls = len(Faulty.calls)
    journal.sync()
    assert len(Faulty.calls) == calls
    assert faulty.read("j", limit=9) == b"onetwo"


def test_secrets_are_in_no_message(faulty: Location, caplog: pytest.LogCaptureFixture) -> None:
    import traceback

    options = {"key": "AKIAKEY", "client_kwargs": {"deep": ["s3cr3t-token"]}, "short": "key"}
    location = open_location(faulty.url, options)
    Faulty.before += [PermissionError("bad key AKIAKEY with s3cr3t-token")]
    with pytest.raises(StorageError, match=r"bad key \*\*\* with \*\*\*") as caught:
        location.list("")
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(location) + caplog.text
    assert "AKIAKEY" not in shown
    assert "s3cr3t" not in shown


@pytest.mark.parametrize(
    "url", ["sftp://user:pw@host/x", "sftp://user:p#w@host/x", "SFTP://user:pw@host:22/x", "s3://key:pw@bucket"]
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.storage_options\.password=.*oc\.env") as caught:
        open_location(url)
    assert "pw" not in str(caught.value)
    assert "p#w" not in str(caught.value)


@pytest.mark.parametrize("root", ["s3://", "s3:///exps", "gs:///", "sftp:///home/me"])
def test_a_root_whose_bucket_or_host_is_empty_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="bucket, container or host is missing"):
        RunDirectory.under(root, "experiment", "variant")
    with pytest.raises(ConfigError, match="bucket, container or host is missing"):
        open_location(root)


def test_a_port_is_no_password() -> None:
    assert is_remote("sftp://me@host:22/a@b")
    open_location("sftp://me@host:22/a@b")
    open_location("sftp://host:22/a@b")


def test_a_missing_package_is_reported_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(kind: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for url, extra in (("s3://b/x", "s3"), ("gs://b/x", "gcs"), ("az://c/x", "azure"), ("sftp://h/x", "sftp")):
        with pytest.raises(ConfigError, match=rf"pip install 'hydra-runner\[{extra}\]'"):
            open_location(url)


@pytest.mark.parametrize("url", ["s4://bucket/x", "https://host/x"])
def test_an_unusable_storage_is_reported_with_the_usable(url: str) -> None:
    with pytest.raises(ConfigError, match=r"not a storage for runs; use a path, s3://.*sftp://.*memory://"):
        open_location(url)


@pytest.mark.parametrize("url", ["simplecache::s3://bucket/x", "zip://a::s3://b", "filecache::/tmp/x"])
def test_a_chained_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="chained URL"):
        open_location(url)


def test_remote_urls_are_recognised() -> None:
    for url in ("s3://bucket", "S3://bucket", "memory://x", "abfs+x.y-1://z"):
        assert is_remote(url)
        with pytest.raises(ConfigError, match="a path of this machine"):
            local_root(url)
    for path in ("outputs", "/a/b", "file:///a", "FILE:///a", "local:///a", "a:b", "./a::b"):
        assert not is_remote(path)
    assert local_root("FILE:///a") == "/a"
    assert local_root("~/a") == f"{Path.home()}/a"
    assert open_location("MEMORY://x").url == "memory://x"


def test_a_missing_bucket_is_an_error(s3: Server, azure: Server) -> None:
    for server, missing in ((s3, "s3://no-such/x"), (azure, "az://no-such/x")):
        location = open_location(missing, server.options)
        for verb in ("list", "read"):
            with pytest.raises(StorageError, match="there is no bucket or container no-such"):
                VERBS[verb](location)


def test_wrong_keys_are_an_error_at_once(s3: Server) -> None:
    location = open_location(s3.url, s3.options | {"secret": "wrong-secret"})
    for verb in VERBS.values():
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot .*PermissionError"):
            verb(location)
        assert time.monotonic() - start < 5


def test_missing_credentials_say_where_they_are_read(
    s3: Server, azure: Server, sftp: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    without = {name: value for name, value in s3.options.items() if name not in ("key", "secret")}
    no_key = {"look_for_keys": False, "allow_agent": False, **sftp.options} | {"key_filename": None}
    for url, options, place in (
        (s3.url, without, "AWS_ACCESS_KEY_ID"),
        (azure.url, {}, "AZURE_STORAGE_CONNECTION_STRING"),
        (sftp.url, no_key, "storage_options.key_filename"),
    ):
        with pytest.raises(StorageError, match=f"Credentials are read from .*{place}"):
            open_location(url, options).list("")


def test_an_sftp_connection_that_was_lost_is_made_again(sftp: Server) -> None:
    location = open_location(f"{sftp.url}/lost", sftp.options)
    location.put("a", [b"1"])
    for system in location._backend._idle:  # type: ignore[attr-defined]
        system.client.close()
    assert location.list("") == [Entry("a", 1)]


def test_the_scratch_folder_for_locks_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    location = open_location("memory://x")
    lock = location.lock("a")
    assert lock
    lock.release()
    scratch = tmp_path / f"hydra-runner-{os.getuid()}"
    assert scratch.stat().st_mode & 0o777 == 0o700
    scratch.chmod(0o777)
    with pytest.raises(StorageError, match="not this user's alone"):
        location.lock("a")
    scratch.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    scratch.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="not this user's alone"):
        location.lock("a")


def test_a_listing_has_four_times_as_long(faulty: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have many pages; but one that hangs ends."""
    monkeypatch.setattr(backend, "DEADLINE", 0.25)
    monkeypatch.setattr(backend, "TRIES", 1)
    Faulty.hold.append(threading.Event())
    threading.Timer(0.5, Faulty.hold[0].set).start()
    assert faulty.list("") == [Entry("old", 3)]
    Faulty.hold.append(threading.Event())
    with pytest.raises(StorageError, match="no answer within 1 s"):
        faulty.list("")


def uploads(server: Server, path: str) -> list[str]:
    """The unfinished uploads below a path."""
    system = fsspec.filesystem("s3", **server.options, skip_instance_cache=True)
    bucket, key, _ = system.split_path(path)
    found = system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads", [])
    return sorted(upload["Key"].removeprefix(f"{key}/") for upload in found)


def test_uploads_of_killed_processes_are_aborted(s3: Server) -> None:
    """Those of its own folders, and none of a run below it or beside it."""
    url = f"{s3.url}/{os.urandom(4).hex()}"
    system = fsspec.filesystem("s3", **s3.options, skip_instance_cache=True)
    bucket, key, _ = system.split_path(url)
    for name in ("run/data/a", "run/data/b", "run/model", "run/below/data/a", "run2/data/a"):
        upload = system.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{key}/{name}")
        system.call_s3(
            "upload_part", Bucket=bucket, Key=f"{key}/{name}", UploadId=upload["UploadId"], PartNumber=1, Body=b"x" * 99
        )
    assert len(uploads(s3, url)) == 5
    RunDirectory("", "", "", open_location(f"{url}/run", s3.options)).remove_leftovers()
    assert uploads(s3, url) == ["run/below/data/a", "run2/data/a"]


def test_an_upload_that_takes_too_long_leaves_no_parts(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    call, hangs = s3fs.S3FileSystem._call_s3, asyncio.Event()

    async def stuck(self: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
        if keywords.get("PartNumber") == 2:
            await hangs.wait()
        return await call(self, method, *arguments, **keywords)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", stuck)
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 << 20)
    monkeypatch.setattr(remote, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(backend, "DEADLINE", 3.0)
    monkeypatch.setattr(backend, "RATE", 1 << 40)
    monkeypatch.setattr(backend, "TRIES", 1)
    url = f"{s3.url}/{os.urandom(4).hex()}"
    with pytest.raises(StorageError, match=r"cannot write .*/a"):
        open_location(url, s3.options).put("a", [bytes(11 << 20)])
    until(lambda: not uploads(s3, url))

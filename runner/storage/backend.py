"""Access to an fsspec store with deadlines, retries and clear errors.

An operation is a function of a file system. It runs in a daemon thread, which is abandoned at its deadline, because no
client's own timeout covers a server that accepts a request and never answers. All operations can be repeated.
"""

import asyncio
import copy
import os
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from runner.errors import ConfigError, StorageError, printable
from runner.storage.location import protocol


@dataclass(frozen=True, slots=True)
class StoreKind:
    """How the runner writes to one kind of store. A kind that is not in ``STORES`` is written like a disk: under a
    temporary name, then ``mv`` over the final name, which its file system must do in one step.

    ``protocols``: the schemes of its URLs. ``extra``: the extra of this package that installs its fsspec backend, if
    fsspec has none. ``atomic``: an object appears when its upload is complete, and not before. ``bucket``: a path
    begins with a bucket or container, which must exist. ``options``: defaults for the arguments of its file system.
    ``credentials``: where its file system looks for them.
    """

    protocols: tuple[str, ...]
    extra: str = ""
    atomic: bool = False
    bucket: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    credentials: str = ""


# s3fs would upload ten parts of 50 MB at once; and ``backend`` retries, so botocore need not.
_S3 = {"max_concurrency": 2, "config_kwargs": {"retries": {"max_attempts": 0}}}

_OF_S3 = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_OF_GCS = "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`"
_OF_AZURE = "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY"
_OF_SFTP = "an ssh agent, a key in ~/.ssh, or +run.storage_options.key_filename=<path of a key>"

STORES = (
    StoreKind(("s3", "s3a"), "s3", atomic=True, bucket=True, options=_S3, credentials=_OF_S3),
    StoreKind(("gs", "gcs"), "gcs", atomic=True, bucket=True, credentials=_OF_GCS),
    StoreKind(("az", "abfs", "abfss"), "azure", atomic=True, bucket=True, credentials=_OF_AZURE),
    # Its posix-rename is atomic; but nothing makes the server sync its disk.
    StoreKind(("sftp", "ssh"), "sftp", credentials=_OF_SFTP),
    StoreKind(("memory",), atomic=True),
)


def store_kind(*protocols: str) -> StoreKind:
    """The first kind that has one of these protocols; for others a kind that renames, without an extra."""
    return next((kind for kind in STORES if {*protocols} & {*kind.protocols}), StoreKind(protocols))


T = TypeVar("T")

DEADLINE = 30.0  # seconds for an operation without its bytes
_LISTING_FACTOR = 4  # a listing may have many pages, and take so many times the deadline
RATE = 256 << 10  # bytes per second of the slowest usable connection
TRIES = 4
BACKOFF = 0.5  # seconds before the second try, doubled before each further try

_PASSWORD = re.compile(r"[^:]+://[^/]*:[^/]*@")
_ENDPOINT = re.compile(r"https?://[^@?]*")  # a URL without credentials
_FINAL = (PermissionError, FileNotFoundError, NotADirectoryError, ImportError, TypeError, NotImplementedError)
_FINAL_NAMES = {"AuthenticationException", "BadHostKeyException", "ClientAuthenticationError"}
_FINAL_NAMES |= {"DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError"}
_CREDENTIALS = re.compile("credential|authenticat|accesskey", re.IGNORECASE)
_TRY_LATER = {408, 409, 425, 429}
_SHORTEST_SECRET = 4
_jitter = random.SystemRandom()  # the global generator belongs to the user and is part of a run's state


class Backend:
    """A folder in a store. Raises ConfigError for a URL or options that cannot be used.

    Asynchronous file systems are shared by all threads. Others (sftp) are not thread-safe: each operation borrows an
    idle file system, or makes a new one.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        scheme = protocol(url)
        if _PASSWORD.match(url):
            raise ConfigError(
                f"run.root={scheme}://...: no password in a URL, it would be stored and shown. Use "
                "+run.storage_options.password='${oc.env:NAME}', a key file or an agent"
            )
        if store_kind(scheme).extra and not url.partition("://")[2].partition("/")[0]:
            missing = "the name of a bucket, container or host is missing; is the variable for it empty?"
            raise ConfigError(f"run.root={scheme}://...: {missing}")
        self._class = _file_system(scheme)
        self._options = dict(options)
        self._secrets = sorted(set(_strings(self._options)), key=len, reverse=True)
        self.url = f"{scheme}{url[len(scheme) :].rstrip('/')}"
        self.root = str(self._class._strip_protocol(self.url)).rstrip("/")
        names = self._class.protocol  # a subclass of a known file system may have a protocol of its own
        self.kind = store_kind(scheme, *([names] if isinstance(names, str) else names))
        self._bucket = self.root.partition("/")[0] if self.kind.bucket else None
        self._begin()

    def below(self, folder: str) -> "Backend":
        """A folder in this folder that is known to exist; both share idle connections."""
        other = copy.copy(self)
        other.url, other.root = f"{self.url}/{folder}", self.path(folder)
        other._bucket = None  # the folder exists, and so does the bucket
        other._abandoned = {}
        return other

    def path(self, name: str) -> str:
        """The path of an object, or of the folder itself, for the file system."""
        return f"{self.root}/{name}" if name else self.root or "/"

    def run(self, verb: str, name: str, operation: Callable[[Any], T], *, size: int = 0) -> T:
        """The result of ``operation``, retried after errors that may be temporary. Raises StorageError.

        ``size`` is the number of bytes that it transfers. Two tries to write the same name never run at the same time.
        """
        seconds = deadline(size) * (_LISTING_FACTOR if verb == "list" else 1)
        for number in range(TRIES):
            if number:
                time.sleep(BACKOFF * 2**number * _jitter.uniform(0.5, 1.0))
            try:
                return self._try(name if verb == "write" else "", operation, seconds)
            except StorageError:
                raise
            except (Exception, asyncio.CancelledError) as error:
                failure = error
                if _is_final(error):
                    break
        raise self._error(verb, name, failure)

    def check_bucket(self, system: Any) -> None:
        """Raise FileNotFoundError if there is no bucket, which would look like an empty folder. Asks once."""
        if self._bucket is not None:
            try:
                system.info(self._bucket)
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no bucket or container {self._bucket}") from None
            except Exception:
                pass  # a user of the objects need not have the right to ask about the bucket
            self._bucket = None

    def _try(self, target: str, operation: Callable[[Any], T], seconds: float) -> T:
        # A try that ran out of time may still write, and would then overwrite what this one writes.
        earlier = self._abandoned.get(target)
        if earlier and not wait([earlier], seconds).done:
            raise TimeoutError(f"an earlier try to write it has not ended in {seconds:.0f} s")
        systems: list[Any] = []  # the file system in use, until this gives it up

        def work() -> T:
            system = self._take()
            systems.append(system)
            try:
                result = operation(system)
            except BaseException:
                self._discard(system)
                raise
            # No ``systems``: the deadline passed, and the connection has been discarded.
            if systems and not any(other is system for other in self._idle):
                self._idle.append(system)
            return result

        future = _start(work)
        if wait([future], seconds).done:
            return future.result()
        if target:
            self._abandoned[target] = future
        while systems:
            self._discard(systems.pop())
        raise TimeoutError(f"no answer within {seconds:.0f} s")

    def _take(self) -> Any:
        if self._pid != os.getpid():
            # After a fork: keep the parent's connections open and unused, because closing them would end them there.
            self._inherited = [self._idle, self._abandoned]
            self._begin()
        try:
            system = self._idle.pop()
        except IndexError:
            defaults = {**store_kind(protocol(self.url)).options, **self._class._get_kwargs_from_urls(self.url)}
            system = self._class(**{**defaults, **self._options}, skip_instance_cache=True)
            system.dircache.use_listings_cache = False
        if isinstance(system, AsyncFileSystem):
            self._idle.append(system)
        return system

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._idle: list[Any] = []
        self._abandoned: dict[str, Future[Any]] = {}  # object name -> a try to write it that ran out of time

    def _discard(self, system: Any) -> None:
        """Stop using a file system that failed. Closing its connection ends the threads that wait on it."""
        self._idle[:] = [other for other in self._idle if other is not system]
        client = getattr(system, "client", None)
        if client is not None and not isinstance(system, AsyncFileSystem):
            _start(client.close)

    def _error(self, verb: str, name: str, error: BaseException) -> StorageError:
        reason = next(iter(str(error).splitlines()), "")  # azure appends pages of headers
        if not reason and isinstance(error, asyncio.TimeoutError):
            reason = "no answer in time"
        text = printable(f"{type(error).__name__}: {reason}").rstrip(": ")
        if self.kind.credentials and _CREDENTIALS.search(text):
            text += f". Credentials are read from {self.kind.credentials}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        failure = StorageError(f"cannot {verb} {self.url}{'/' if name else ''}{name}: {text}")
        trace = "".join(traceback.format_exception(error))
        failure.__cause__ = None if any(secret in trace for secret in self._secrets) else error
        failure.__suppress_context__ = True
        return failure


def deadline(size: int) -> float:
    """The seconds that an operation of ``size`` bytes may take."""
    return DEADLINE + size / RATE


def write_timeout(system: Any, size: int) -> dict[str, float]:
    """Keywords with which an asynchronous file system cancels a write at its deadline, before the next try begins."""
    return {"timeout": deadline(size)} if isinstance(system, AsyncFileSystem) else {}


def _file_system(scheme: str) -> Any:
    """The file system class of a scheme. Raises ConfigError for an unknown scheme, or if its package is missing."""
    try:
        if scheme in ("http", "https"):  # read-only
            raise ValueError(scheme)
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = store_kind(scheme).extra
        remedy = f": pip install 'hydra-runner[{extra}]'" if extra else ""
        raise ConfigError(f"run.root={scheme}://...: its package is not installed{remedy} ({error})") from error
    except ValueError:
        protocols = ", ".join(f"{name}://" for kind in STORES for name in kind.protocols)
        raise ConfigError(
            f"run.root={scheme}://...: not a storage for runs; use a path, {protocols}, "
            "or another protocol that an installed fsspec package offers"
        ) from None


def _start(function: Callable[[], T]) -> "Future[T]":
    """Run a function in a daemon thread, which does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="storage", daemon=True).start()
    return future


def _is_final(error: BaseException | None) -> bool:
    """Whether a retry is pointless: access denied, object missing, wrong configuration."""
    while error is not None:
        if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
            return True
        status = _status(error)
        if status is not None and 400 <= status < 500 and status not in _TRY_LATER:
            return True
        error = error.__cause__
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of azure, gcsfs or botocore."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    for status in (getattr(error, "status_code", None), getattr(error, "code", None), metadata.get("HTTPStatusCode")):
        if isinstance(status, int):
            return status
    return None


def _strings(value: Any) -> Iterator[str]:
    """All strings in storage options that may be secrets: long enough, and no plain URL."""
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)
    elif isinstance(value, str) and len(value) >= _SHORTEST_SECRET and not _ENDPOINT.fullmatch(value):
        yield value

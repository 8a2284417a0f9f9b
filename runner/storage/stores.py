"""The kinds of stores, and how the runner writes to each: the one table of them.

A kind is an fsspec protocol. One that is not in the table, from any other installed fsspec package, is written like a
disk: under a temporary name, then ``mv`` over the final name, which its file system must do in one step.

No kind needs to create an object only if it is absent, to append, or to lock: names are used once, journals are
uploaded again as a whole, and locks are files of this machine (``location.Location`` has the promises).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Store:
    """How objects of one kind of store are written.

    ``protocols``: the schemes of its URLs. ``extra``: the extra of this package that installs its fsspec backend; empty
    if fsspec has it. ``atomic``: an object is seen when its upload is complete, and not before; without it an object is
    written under a temporary name and renamed. ``bucket``: the first segment of a path is a bucket or container, which
    must exist. ``spools``: an upload that does not fit into memory is collected in a temporary file. ``options``:
    arguments of its file system, before those of the user.
    """

    protocols: tuple[str, ...]
    extra: str = ""
    atomic: bool = False
    bucket: bool = False
    spools: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


# s3fs would upload ten parts of 50 MB at once; and ``backend`` retries, so botocore need not.
_S3 = {"max_concurrency": 2, "config_kwargs": {"retries": {"max_attempts": 0}}}

STORES = (
    Store(("s3", "s3a"), "s3", atomic=True, bucket=True, options=_S3),
    Store(("gs", "gcs"), "gcs", atomic=True, bucket=True),
    Store(("az", "abfs", "abfss"), "azure", atomic=True, bucket=True),
    Store(("sftp", "ssh"), "sftp"),  # posix-rename is atomic; but nothing makes the server sync its disk
    Store(("memory",), atomic=True, spools=False),
)
LOCAL = {"file", "local"}
READ_ONLY = {"http", "https"}
PROTOCOLS = [protocol for store in STORES for protocol in store.protocols]


def store_of(*protocols: str) -> Store:
    """The first store that has one of these protocols. For protocols that are not in the table: a store that renames,
    without an extra.
    """
    return next((store for store in STORES if {*protocols} & {*store.protocols}), Store(protocols))

"""Which requests of an fsspec store belong to which operation: a listing that asks for page after page gets on."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

# What s3fs, gcsfs, adlfs and fsspec's sftp call for every request, or for every answer.
_REQUEST = ("_call_s3", "_call", "service_client._pipeline._transport.send", "ftp._read_packet")
REQUESTS: ContextVar[list[None] | None] = ContextVar("requests", default=None)  # tasks in fsspec's loop inherit it


def count_requests(system: Any) -> None:
    """Have a file system note every request for the operation that it belongs to."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            requests = REQUESTS.get()
            if requests is not None:
                requests.append(None)
            return call(*arguments, **keywords)

        return noted

    for path in _REQUEST:
        *owners, name = path.split(".")
        owner = functools.reduce(lambda found, part: getattr(found, part, None), owners, system)
        if call := getattr(owner, name, None):
            setattr(owner, name, counted(call))

"""The sealed manifest that is a commit, and the names of the objects around it.

*Sealed*: the last line is the sha256 of everything before it. A torn manifest does not unseal and so is no commit,
which is why the storage need not write atomically. The seal finds damage; it proves no authorship.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from runner.storage.location import Location

FORMAT = 1
LIMIT = 64 << 20  # bytes of a manifest

_COMMIT = re.compile(r"a([0-9]{6,})-s([0-9]{9,})-([0-9a-f]{12})\.json")
_DATA = re.compile(r"s([0-9]{9,})-a([0-9]{6,})-([0-9a-f]{12})\.[0-9]{5}\.safetensors")


@dataclass(frozen=True, slots=True, order=True)
class CommitId:
    """One commit, ordered as resuming wants it: by attempt, then by step."""

    attempt: int
    step: int
    nonce: str

    @classmethod
    def new(cls, attempt: int, step: int) -> "CommitId":
        """An id that no other process or try has."""
        return cls(attempt, step, secrets.token_hex(6))

    @property
    def commit(self) -> str:
        """The manifest's name."""
        return f"commits/{self}.json"

    def data(self, part: int) -> str:
        """The name of a data file."""
        return f"data/s{self.step:09d}-a{self.attempt:06d}-{self.nonce}.{part:05d}.safetensors"

    def __str__(self) -> str:
        return f"a{self.attempt:06d}-s{self.step:09d}-{self.nonce}"


def commits(location: Location) -> list[CommitId]:
    """All commits under a location, the one to resume from first."""
    found = (parse_commit(entry.name) for entry in location.list("commits"))
    return sorted((commit for commit in found if commit is not None), reverse=True)


def parse_commit(name: str) -> CommitId | None:
    """The id in the name of an object in ``commits``; None for any other object."""
    found = _COMMIT.fullmatch(name)
    return CommitId(int(found[1]), int(found[2]), found[3]) if found else None


def parse_data(name: str) -> CommitId | None:
    """The id of the commit that an object in ``data`` belongs to; None for any other object."""
    found = _DATA.fullmatch(name)
    return CommitId(int(found[2]), int(found[1]), found[3]) if found else None


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as sealed JSON."""
    body = json.dumps(manifest, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    return body + sha256(body).hexdigest().encode() + b"\n"


def unseal(raw: bytes) -> dict[str, Any] | None:
    """The manifest, or None where the seal is broken."""
    end = raw.rfind(b"\n", 0, -1) + 1
    body, tail = raw[:end], raw[end:]
    if tail != sha256(body).hexdigest().encode() + b"\n":
        return None
    try:
        manifest = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None

"""Commits: the sealed manifests, the names of the objects around them, and the digests of tensors.

*Sealed*: the last line is a checksum of everything before it. A torn manifest does not unseal and so is no commit:
the storage need not write atomically.

Without a key, seals and digests detect damage but prove no authorship: anyone who can write to the storage can make
them. With a key in ``HYDRA_RUNNER_SEALING_KEY`` only its holders can, and manifests sealed without it, or with another
key, are refused. Only this module reads the key; it is neither stored nor printed.

A manifest may be written by an attacker, so its bytes, its values and its depth are bounded before it is parsed. A
manifest beyond the bounds is not sealed either: no commit is acknowledged that cannot be read again.
"""

import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import ConfigError, StateError
from runner.hashing import checksum, sha256_digest
from runner.plain import is_deep
from runner.storage.location import Buffer, Location

KEY_VARIABLE = "HYDRA_RUNNER_SEALING_KEY"


def seal_of(body: bytes) -> bytes:
    """The seal of a text, which says how it was made: ``sha256:<hex>``, or ``hmac-sha256:<hex>`` with a key."""
    key = _key()
    seal = f"sha256:{sha256_digest(body)}" if key is None else f"hmac-sha256:{hmac.digest(key, body, 'sha256').hex()}"
    return seal.encode()


def keyed_digest(*data: Buffer) -> str:
    """The digest of bytes in one piece or several, as ``hashing.checksum`` makes it with the key of this process."""
    return checksum(*data, key=_key())


def _key() -> bytes | None:
    value = os.environ.get(KEY_VARIABLE)
    if value == "":
        raise ConfigError(f"{KEY_VARIABLE} is set and empty; give it a key, or unset it to seal without one")
    return None if value is None else os.fsencode(value)


FORMAT = 2
LIMIT = 64 << 20  # bytes of a manifest
MAX_VALUES = 1 << 22  # in a manifest; JSON's smallest value takes 2 bytes there and 90 in memory
MAX_TENSORS = 1 << 18  # of a checkpoint; about as many as the bytes of a manifest have room for
MAX_DEPTH = 200  # of nested lists and objects, which are read recursively

_COMMIT = re.compile(r"a([0-9]{6,15})-s([0-9]{9,15})-([0-9a-f]{12})\.json")
_DATA = re.compile(r"s([0-9]{9,15})-a([0-9]{6,15})-([0-9a-f]{12})(?:\.[0-9]{5}){1,2}\.safetensors")


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

    def data(self, part: int, rank: int | None = None) -> str:
        """The name of a data file, of a rank where there are several."""
        number = f"{part:05d}" if rank is None else f"{rank:05d}.{part:05d}"
        return f"data/s{self.step:09d}-a{self.attempt:06d}-{self.nonce}.{number}.safetensors"

    def __str__(self) -> str:
        return f"a{self.attempt:06d}-s{self.step:09d}-{self.nonce}"


def commits(location: Location) -> list[CommitId]:
    """All commits under a location, the one to resume from first."""
    ids = (parse_commit(entry.name) for entry in location.list("commits"))
    return sorted((commit for commit in ids if commit is not None), reverse=True)


def parse_commit(name: str) -> CommitId | None:
    """The id in the name of an object in ``commits``; None for any other object."""
    match = _COMMIT.fullmatch(name)
    return CommitId(int(match[1]), int(match[2]), match[3]) if match else None


def parse_data(name: str) -> CommitId | None:
    """The id of the commit that an object in ``data`` belongs to; None for any other object."""
    match = _DATA.fullmatch(name)
    return CommitId(int(match[2]), int(match[1]), match[3]) if match else None


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as sealed JSON. Raises StateError for a manifest that ``unseal`` would refuse."""
    if is_deep(manifest, MAX_DEPTH):
        raise StateError(f"cannot save a state that is nested more than {MAX_DEPTH} levels deep")
    body = json.dumps(manifest, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    raw = body + seal_of(body) + b"\n"
    if len(raw) > LIMIT or _values(body) > MAX_VALUES:
        raise StateError(
            f"cannot save the state: what is not a tensor in it takes {len(raw)} bytes of JSON; up to {LIMIT} bytes "
            f"and {MAX_VALUES} values can be read again. Keep long lists of numbers as tensors."
        )
    return raw


def unseal(raw: bytes) -> dict[str, Any] | None:
    """The manifest, or None where the seal is broken or was not made with the key of this process."""
    body, tail = _split(raw)
    if not hmac.compare_digest(tail, seal_of(body) + b"\n") or _values(body) > MAX_VALUES:
        return None
    try:
        manifest = json.loads(body, object_pairs_hook=_unambiguous, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and not is_deep(manifest, MAX_DEPTH) else None


def seal_problem(raw: bytes) -> str:
    """Why a manifest does not unseal, in words."""
    kind, _, rest = _split(raw)[1].rstrip(b"\n").partition(b":")
    keyed = _key() is not None
    if kind == b"hmac-sha256" and not keyed:
        return f"is sealed with a key, and {KEY_VARIABLE} is not set"
    if kind == b"hmac-sha256" and len(rest) == 64:
        return f"is damaged, or sealed with another key than that in {KEY_VARIABLE}"
    if kind == b"sha256" and keyed:
        return f"is sealed without a key, and {KEY_VARIABLE} is set"
    return "does not unseal"


def _split(raw: bytes) -> tuple[bytes, bytes]:
    """The sealed text, and the last line."""
    end = raw.rfind(b"\n", 0, -1) + 1
    return raw[:end], raw[end:]


def _values(body: bytes) -> int:
    """An upper bound of the number of values in a JSON text; costs a scan and no memory."""
    return sum(body.count(mark) for mark in (b",", b"[", b"{"))


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key twice in one object, which readers may take for different values")
    return unique


def _refuse(token: str) -> None:
    raise ValueError(f"{token} is not JSON")

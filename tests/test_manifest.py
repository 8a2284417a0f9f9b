"""Sealed manifests, and the names of what they stand for."""

import gc
import json
from hashlib import sha256
from pathlib import Path

import pytest

from runner.checkpoint.manifest import CommitId, commits, parse_commit, parse_data, seal, unseal
from runner.storage import LocalLocation

MANIFEST = {"format": 1, "step": 7, "files": {"data/x": 12}, "parts": {"model": ["ü", None, 0.1]}}
NONCE = "0123456789ab"


def test_a_sealed_manifest_unseals_to_itself() -> None:
    assert unseal(seal(MANIFEST)) == MANIFEST
    assert unseal(seal({})) == {}


def test_the_seal_is_the_sha256_of_all_lines_before_it() -> None:
    """So that anyone can check it with sha256sum."""
    body, tail = seal(MANIFEST)[:-72], seal(MANIFEST)[-72:]
    assert json.loads(body) == MANIFEST
    assert body.endswith(b"\n")
    assert tail == f"sha256:{sha256(body).hexdigest()}\n".encode()


def test_no_truncated_manifest_unseals() -> None:
    raw = seal(MANIFEST)
    assert [end for end in range(len(raw)) if unseal(raw[:end]) is not None] == []
    assert [start for start in range(1, len(raw)) if unseal(raw[start:]) is not None] == []


def test_no_manifest_with_one_other_byte_unseals() -> None:
    raw = seal(MANIFEST)
    for place in range(len(raw)):
        for byte in {*range(256)} - {raw[place]}:
            bad = bytearray(raw)
            bad[place] = byte
            assert unseal(bytes(bad)) is None


def test_no_lengthened_manifest_unseals() -> None:
    raw = seal(MANIFEST)
    assert [extra for extra in (b"\n", b" ", b"\0", raw) if unseal(raw + extra) or unseal(extra + raw)] == []


@pytest.mark.parametrize("body", [b"[1]\n", b"null\n", b"{\n", b"\xff\n", b"[" * 100_000 + b"\n", b"\n", b""])
def test_a_seal_around_something_else_is_no_manifest(body: bytes) -> None:
    gc.collect()
    gc.disable()  # a finalizer of other tests' garbage would fail at the limit of recursion
    try:
        assert unseal(body + f"sha256:{sha256(body).hexdigest()}\n".encode()) is None
    finally:
        gc.enable()


def test_values_outside_json_are_not_sealed() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal({"loss": float("nan")})


@pytest.mark.parametrize("commit", [CommitId(1, 0, NONCE), CommitId(7, 1200, NONCE), CommitId(10**7, 10**12, NONCE)])
def test_names_parse_both_ways(commit: CommitId) -> None:
    folder, name = commit.commit.split("/")
    assert (folder, parse_commit(name)) == ("commits", commit)
    folder, name = commit.data(0).split("/")
    assert (folder, parse_data(name)) == ("data", commit)
    assert parse_data(commit.data(3).split("/")[1]) == commit


def test_names_are_those_of_the_format() -> None:
    commit = CommitId(7, 1200, NONCE)
    assert commit.commit == "commits/a000007-s000001200-0123456789ab.json"
    assert commit.data(2) == "data/s000001200-a000007-0123456789ab.00002.safetensors"


FOREIGN = [
    "",
    "readme.txt",
    "a7-s1200-0123456789ab",
    "a000007-s000001200-0123456789ab.json\n",
    "a000007-s000001200-0123456789ab.json.tmp-1",
    "xa000007-s000001200-0123456789ab.json",
    "a000007-s000001200-0123456789AB.json",
    "a000007-s000001200-0123456789.json",
    "a00007-s000001200-0123456789ab.json",
    "a000007-s00001200-0123456789ab.json",
    "a-00007-s000001200-0123456789ab.json",
    "a00000\u0667-s000001200-0123456789ab.json",
    "s000001200-a000007-0123456789ab.safetensors",
    "s000001200-a000007-0123456789ab.00000.safetensors.tmp-1",
    "s000001200-a000007-0123456789ab.0.safetensors",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_names_are_ignored(name: str) -> None:
    assert parse_commit(name) is None
    assert parse_data(name) is None


def test_no_two_commits_have_one_name() -> None:
    assert len({CommitId.new(1, 5).commit for _ in range(100)}) == 100


def test_commits_are_listed_in_the_order_of_resuming(tmp_path: Path) -> None:
    """The newest attempt knows best, even where an older one was further."""
    location = LocalLocation(tmp_path)
    assert commits(location) == []
    found = [CommitId(*number, NONCE) for number in [(1, 5), (3, 2), (2, 9), (3, 10), (10**6, 1), (3, 10**9)]]
    for commit in found:
        location.put(commit.commit, [b"torn"])
    location.put("commits/readme.txt", [b""])
    assert [(commit.attempt, commit.step) for commit in commits(location)] == [
        (10**6, 1),
        (3, 10**9),
        (3, 10),
        (3, 2),
        (2, 9),
        (1, 5),
    ]

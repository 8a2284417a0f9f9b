"""Sealed with a key, without one, with another one: who may write a checkpoint that this process loads."""

import hmac
import json
from hashlib import blake2b, sha256

import pytest
from faults import MemoryLocation, newest, save

from runner.checkpoint.manifest import KEY_VARIABLE, keyed_digest, seal, unseal
from runner.checkpoint.store import CheckpointStore
from runner.errors import ConfigError

KEY, OTHER = "correct horse battery staple", "tr0ub4dor &3"
Keys = pytest.MonkeyPatch


def use(keys: Keys, key: str | None) -> None:
    if key is None:
        keys.delenv(KEY_VARIABLE, raising=False)
    else:
        keys.setenv(KEY_VARIABLE, key)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Give the process a key, or none, with ``use``."""
    use(monkeypatch, None)
    return monkeypatch


def sealed(keys: Keys, key: str | None) -> MemoryLocation:
    """A location with one commit that was made under that key."""
    use(keys, key)
    location = MemoryLocation()
    save(CheckpointStore(location), 1)
    return location


@pytest.mark.parametrize("key", [None, KEY, "ü", "x" * 1000])
def test_a_commit_sealed_with_a_key_is_loaded_with_it(key: str | None, keys: Keys) -> None:
    assert newest(CheckpointStore(sealed(keys, key))) == (1, [])


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (KEY, None, f"is sealed with a key, and {KEY_VARIABLE} is not set"),
        (KEY, OTHER, f"is damaged, or sealed with another key than that in {KEY_VARIABLE}"),
        (KEY, KEY + "\n", f"is damaged, or sealed with another key than that in {KEY_VARIABLE}"),
        (None, KEY, f"is sealed without a key, and {KEY_VARIABLE} is set"),
    ],
)
def test_another_key_is_refused_with_the_cause(then: str | None, now: str | None, told: str, keys: Keys) -> None:
    location = sealed(keys, then)
    use(keys, now)
    step, (reason,) = newest(CheckpointStore(location))
    assert step is None
    assert reason.endswith(told)
    assert KEY not in reason
    assert OTHER not in reason


def test_the_seal_and_the_digests_match_their_names(keys: Keys) -> None:
    """Frozen: anyone with the key can check them with common tools."""
    body, tail = seal({"a": 1})[:-72], seal({"a": 1})[-72:]
    assert tail == f"sha256:{sha256(body).hexdigest()}\n".encode()
    assert keyed_digest(b"x").startswith("xxh3:")
    use(keys, KEY)
    assert (
        seal({"a": 1}) == body + b"hmac-sha256:" + hmac.new(KEY.encode(), body, "sha256").hexdigest().encode() + b"\n"
    )
    hashed = blake2b(b"x", digest_size=32, key=sha256(KEY.encode()).digest())
    assert keyed_digest(b"x") == f"blake2b:{hashed.hexdigest()}"


def test_tensors_are_digested_with_the_key(keys: Keys) -> None:
    """A stranger can make other bytes of the same xxh3, and cannot name their keyed digest."""
    location = sealed(keys, KEY)
    (name,) = (name for name in location.objects if name.startswith("commits/"))
    manifest = unseal(location.objects[name])
    assert manifest is not None
    found = [one for _, _, header, blocks in manifest["files"].values() for one in (header, *blocks)]
    assert len(found) == 2
    assert all(one.startswith("blake2b:") for one in found)
    use(keys, OTHER)
    assert keyed_digest(b"x") != (use(keys, KEY), keyed_digest(b"x"))[1]


@pytest.mark.parametrize("kind", ["blocks", "headers"])
def test_with_a_key_a_digest_without_one_is_refused(kind: str, keys: Keys) -> None:
    """Even in a manifest with the right seal."""
    location = sealed(keys, KEY)
    (name,) = (name for name in location.objects if name.startswith("commits/"))
    (data,) = (name for name in location.objects if name.startswith("data/"))
    manifest = unseal(location.objects[name])
    assert manifest is not None
    ((_, header, _, _),) = manifest["files"].values()
    use(keys, None)
    if kind == "blocks":
        manifest["files"][data][3] = [keyed_digest(location.objects[data][header:])]
    else:
        manifest["files"][data][2] = keyed_digest(location.objects[data][:header])
    use(keys, KEY)
    location.objects[name] = seal(manifest)
    step, (reason,) = newest(CheckpointStore(location))
    assert step is None
    assert "expected xxh3:" in reason


@pytest.mark.parametrize("damage", ["", "sha256:", "hmac-sha256:", "md5:0", "hmac-sha256:00\n\n"])
@pytest.mark.parametrize("key", [None, KEY])
def test_no_other_last_line_is_a_seal(key: str | None, damage: str, keys: Keys) -> None:
    use(keys, key)
    body = json.dumps({"a": 1}).encode() + b"\n"
    assert unseal(body + damage.encode() + b"\n") is None
    assert unseal(body + damage.encode()) is None
    if (key, damage) != (None, "sha256:"):
        assert unseal(body + f"{damage}{sha256(body).hexdigest()}\n".encode()) is None


def test_a_torn_manifest_differs_from_one_of_another_key(keys: Keys) -> None:
    location = sealed(keys, KEY)
    (name,) = (name for name in location.objects if name.startswith("commits/"))
    location.objects[name] = location.objects[name][:-40]
    assert newest(CheckpointStore(location))[1] == [f"{name} does not unseal"]


def test_a_new_key_takes_over_from_the_commits_that_have_it(keys: Keys) -> None:
    location = sealed(keys, None)
    use(keys, KEY)
    save(CheckpointStore(location), 2)
    assert newest(CheckpointStore(location)) == (2, [])
    use(keys, None)
    step, (reason,) = newest(CheckpointStore(location))
    assert (step, "is sealed with a key" in reason) == (1, True)


def test_an_empty_key_is_refused(keys: Keys) -> None:
    """It would seal with what everybody knows; most likely a variable of a script was not set."""
    with pytest.raises(ConfigError, match="is set and empty"):
        sealed(keys, "")


def test_the_key_is_stored_nowhere(keys: Keys) -> None:
    location = sealed(keys, KEY)
    hidden = (KEY.encode(), KEY.encode().hex().encode(), sha256(KEY.encode()).hexdigest().encode())
    assert not [name for name, raw in location.objects.items() for secret in hidden if secret in raw]

"""The seal (checksum) of manifests and the digests of tensors, with or without a secret key.

Without a key they detect damage but prove no authorship: anyone who can write to the storage can make them. With a key
in ``HYDRA_RUNNER_SEALING_KEY`` only its holders can, and manifests sealed without it, or with another key, are refused.
Only this module reads the key; it is neither stored nor printed.
"""

import hmac
import os
from hashlib import blake2b, sha256

import xxhash

from runner.errors import ConfigError
from runner.storage.location import Buffer

VARIABLE = "HYDRA_RUNNER_SEALING_KEY"

_PLAIN, _KEYED = "sha256", "hmac-sha256"


def seal_of(body: bytes) -> bytes:
    """The seal of a text, which says how it was made: ``sha256:<hex>``, or ``hmac-sha256:<hex>`` with a key."""
    key = _key()
    if key is None:
        return f"{_PLAIN}:{sha256(body).hexdigest()}".encode()
    return f"{_KEYED}:{hmac.digest(key, body, 'sha256').hex()}".encode()


def is_seal_of(body: bytes, seal: bytes) -> bool:
    """Whether ``seal`` is the one that ``body`` has under the key of this process."""
    return hmac.compare_digest(seal, seal_of(body))


def refusal(seal: bytes) -> str:
    """Why a text with that seal is refused, in words."""
    kind, _, rest = seal.partition(b":")
    keyed = _key() is not None
    if kind == _KEYED.encode() and not keyed:
        return f"is sealed with a key, and {VARIABLE} is not set"
    if kind == _KEYED.encode() and len(rest) == 64:
        return f"is damaged, or sealed with another key than that in {VARIABLE}"
    if kind == _PLAIN.encode() and keyed:
        return f"is sealed without a key, and {VARIABLE} is set"
    return "does not unseal"


def digest(*data: Buffer) -> str:
    """The digest of bytes, in one piece or several: ``xxh3:<hex>`` (128 bits), or ``blake2b:<hex>`` with a key, because
    xxh3 resists accidents and no attacker.
    """
    key = _key()
    # The key is hashed, as blake2b takes at most 64 bytes of it.
    hasher = xxhash.xxh3_128() if key is None else blake2b(digest_size=32, key=sha256(key).digest())
    for piece in data:
        hasher.update(piece)
    return f"{'xxh3' if key is None else 'blake2b'}:{hasher.hexdigest()}"


def _key() -> bytes | None:
    value = os.environ.get(VARIABLE)
    if value == "":
        raise ConfigError(f"{VARIABLE} is set and empty; give it a key, or unset it to seal without one")
    return None if value is None else os.fsencode(value)

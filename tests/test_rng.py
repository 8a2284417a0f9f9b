"""Hashes: seeds and digests that are on disk; and the global generators as state."""

import json
import random
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from runner.checkpoint.encoding import decode, encode
from runner.hashing import checksum, derive, hex_digest, int_digest, json_digest, sha256_digest
from runner.rng import Generators, seed_all, temporary_seed


def draw() -> list[Any]:
    """Numbers from every global generator; python's and numpy's gaussians come in pairs, of which one is now cached."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.standard_normal(),
        torch.rand(()).item(),
        torch.randn(3).tolist(),
    ]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint makes of a state."""
    value, tensors = encode(state, "generators")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    restored: dict[str, Any] = decode(json.loads(json.dumps(value, allow_nan=False)), copies.__getitem__)
    return restored


def states() -> tuple[Any, dict[str, list[int]]]:
    """Every bit of every generator's state."""
    value, tensors = encode(Generators().state_dict(), "generators")
    return value, {name: tensor.tolist() for name, tensor in tensors.items()}


def test_derived_seeds_are_frozen() -> None:
    assert derive("train", 0) == 0x2BFD0C4C89251BA
    assert derive("order", 0, 0, 0) == 0x862EE67E0A12F23C
    assert derive("model", 1) == 0x78807320064C3613
    assert derive("evaluation", 0, 100) == 0xBDBAFA57FA9F5880


def test_digests_are_frozen() -> None:
    """They are in run directories, in manifests and in names of files."""
    assert hex_digest(b"a", b"bc") == hex_digest(b"abc") == "d8bb14d833d59559"
    assert json_digest({"b": 1, "a": [2]}, b"x", sort_keys=True) == "0713a07f8d537912"
    assert int_digest(b"abc") == 6455300059550759896
    assert int_digest(b"abc", size=16) == 29866912097233495977616214728350583503
    assert checksum(b"a", b"bc") == "xxh3:06b05ab6733a618578af5f94892f3950"
    keyed = "a29ce4d49e98495b3e474f6ebda97bab78f13724d0ce5d55ef19e0dbb471916c"
    assert checksum(b"abc", key=b"k") == f"blake2b:{keyed}"
    assert sha256_digest(b"abc").startswith("ba7816bf8f01cfea")


def test_neighbours_have_seeds_of_their_own() -> None:
    seeds = [derive(label, *parts) for label in ("train", "order") for parts in product(range(20), range(20))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_parts_of_a_seed_do_not_run_together() -> None:
    spelt = [derive("a", 1, 2), derive("a", 12), derive("a", "1", 2), derive("a1", 2), derive("a", 2, 1)]
    assert len(set(spelt)) == len(spelt)


def test_seed_all_decides_what_every_generator_draws() -> None:
    drawn = []
    for key in (5, 5, (1 << 64) - 1):
        seed_all(key)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_every_bit_of_a_seed_counts() -> None:
    """All 64 for python; numpy's old generator, and torch's on a CPU, take the lower 32."""

    def drawn(key: int) -> tuple[float, ...]:
        seed_all(key)
        return random.random(), np.random.random(), torch.rand((), dtype=torch.float64).item()

    key = derive("any")
    one = drawn(key)
    for bit in range(64):
        other = drawn(key ^ 1 << bit)
        assert [a != b for a, b in zip(one, other, strict=True)] == [True, bit < 32, bit < 32]


@pytest.mark.parametrize("warm", [0, 1, 2, 700], ids=lambda warm: f"after {warm} draws")
def test_generators_go_on_where_a_checkpoint_left_them(warm: int) -> None:
    seed_all(3)
    for _ in range(warm):
        draw()
    saved = through_json(Generators().state_dict())
    expected = [draw() for _ in range(3)]
    seed_all(99)
    draw()
    Generators().load_state_dict(saved)
    assert [draw() for _ in range(3)] == expected


def test_the_cached_gaussian_of_numpy_is_state() -> None:
    seed_all(3)
    np.random.standard_normal()
    saved = through_json(Generators().state_dict())
    cached = np.random.standard_normal()
    np.random.seed(0)
    Generators().load_state_dict(saved)
    assert np.random.standard_normal() == cached


def test_an_isolated_block_leaves_no_trace() -> None:
    seed_all(3)
    draw()
    before = states()
    expected = draw()
    seed_all(3)
    draw()
    with temporary_seed(8):
        draw()
    assert states() == before
    assert draw() == expected


def test_an_isolated_block_leaves_no_trace_when_it_fails() -> None:
    def fail() -> None:
        with temporary_seed(8):
            draw()
            raise KeyError

    seed_all(3)
    expected = draw()
    seed_all(3)
    with pytest.raises(KeyError):
        fail()
    assert draw() == expected


def test_an_isolated_block_draws_by_its_key_alone() -> None:
    drawn = []
    for outside, key in ((1, 8), (2, 8), (2, 9)):
        seed_all(outside)
        with temporary_seed(key):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert drawn[1] != drawn[2]

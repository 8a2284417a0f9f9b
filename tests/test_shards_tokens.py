"""Flat arrays of tokens as rows: equal to the arrays joined and cut."""

import pickle
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from runner.errors import ConfigError, DataError
from runner.shards.scan import Scan, save
from runner.shards.tokens import Tokens

SIZES = (100, 0, 7, 1, 53)


@pytest.fixture
def memory() -> Iterator[str]:
    """A store that is no disk."""
    yield "memory://test_tokens"
    fsspec.filesystem("memory").rm("/test_tokens", recursive=True)


def shards(folder: Path, dtype: str, suffix: str) -> list[np.ndarray[Any, Any]]:
    folder.mkdir(exist_ok=True)
    limits = np.iinfo(dtype)
    draws = np.random.default_rng(0)
    arrays = [draws.integers(limits.min, limits.max, size, dtype, endpoint=True) for size in SIZES]
    for number, array in enumerate(arrays):
        if suffix == "npy":
            np.save(folder / f"{number}.npy", array)
        else:
            array.tofile(folder / f"{number}.{suffix}")
    return arrays


def cut(stream: Any, length: int) -> list[list[int]]:
    tokens = [int(token) for token in stream]
    rows = (len(tokens) - 1) // length
    return [tokens[row * length : row * length + length + 1] for row in range(rows)]


def rows(samples: Any) -> list[list[int]]:
    return [samples[index].tolist() for index in range(len(samples))]


@pytest.mark.parametrize("suffix", ["bin", "npy"])
@pytest.mark.parametrize(
    ("dtype", "given"),
    [("uint8", "uint8"), ("uint16", "int32"), ("uint32", "int64"), ("int32", "int32"), ("int64", "int64")],
)
def test_packed_shards_equal_their_concatenation(
    tmp_path: Path, memory: str, dtype: str, given: str, suffix: str
) -> None:
    arrays = shards(tmp_path / "x", dtype, suffix)
    fsspec.filesystem("memory").put(f"{tmp_path}/x", "/test_tokens", recursive=True)
    for length in (1, 8, 160):
        here, there = (
            Tokens(path=f"{where}/*", length=length, dtype=None if suffix == "npy" else dtype)
            for where in (f"{tmp_path}/x", memory)
        )
        assert rows(here) == rows(there) == cut(np.concatenate(arrays), length)
        assert here[0].dtype == getattr(torch, given)
        assert here.fingerprint == there.fingerprint
        assert sum(here.manifest.counts) == sum(SIZES)


def test_separators_stand_between_shards(tmp_path: Path) -> None:
    arrays = shards(tmp_path / "x", "uint16", "bin")
    joined = [token for number, array in enumerate(arrays) for token in ([9] if number else []) + array.tolist()]
    for length in (1, 5, 8):
        assert rows(Tokens(path=f"{tmp_path}/x", length=length, separator=9)) == cut(joined, length)


@pytest.mark.parametrize("separator", [None, 3])
def test_counts_say_where_samples_begin(tmp_path: Path, separator: int | None) -> None:
    shards(tmp_path / "x", "uint16", "bin")
    samples = Tokens(path=f"{tmp_path}/x", length=6, separator=separator)
    begins = np.cumsum([0, *(size + (separator is not None) for size in SIZES)])
    naive = [sum(low <= row * 6 < high for row in range(len(samples))) for low, high in pairwise(begins)]
    assert samples.counts == naive
    assert sum(samples.counts) == len(samples)


def test_any_file_is_an_array_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("gr\u00fc\u00dfe\n".encode())
    (tmp_path / "b.txt").write_bytes(b"hello")
    samples = Tokens(path=f"{tmp_path}/*.txt", length=4, dtype="uint8", separator=10)
    assert rows(samples) == cut("gr\u00fc\u00dfe\n\nhello".encode(), 4)
    assert samples[0].dtype == torch.uint8


def test_a_manifest_of_tokens(tmp_path: Path) -> None:
    shards(tmp_path / "x", "uint32", "bin")
    save(f"{tmp_path}/m.json", Scan(f"{tmp_path}/x", dtype="uint32").run())
    samples = Tokens(manifest=f"{tmp_path}/m.json", length=10)
    assert rows(samples) == rows(Tokens(path=f"{tmp_path}/x", length=10, dtype="uint32"))
    with pytest.raises(ConfigError, match="lists shards of tokens uint32, but the configuration says tokens uint16"):
        Tokens(manifest=f"{tmp_path}/m.json", length=10, dtype="uint16")


def test_the_fingerprint_covers_the_settings_of_samples(tmp_path: Path) -> None:
    shards(tmp_path / "x", "uint16", "bin")
    options: list[dict[str, Any]] = [{"length": 8}, {"length": 9}, {"length": 8, "separator": 0}]
    options.append({"length": 8, "dtype": "int16"})
    assert len({Tokens(path=f"{tmp_path}/x", **each).fingerprint for each in options}) == len(options)


def test_locate_names_every_shard_of_a_sample(tmp_path: Path) -> None:
    shards(tmp_path / "x", "uint16", "bin")
    where = f"file://{tmp_path}/x"
    assert Tokens(path=where, length=98).locate(0) == f"{where}/0.bin, tokens 0 to 99"
    told = f"{where}/0.bin, tokens 98 to 100 and {where}/2.bin, tokens 0 to 7 and {where}/3.bin, tokens 0 to 1"
    assert Tokens(path=where, length=49).locate(2).startswith(told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 4, "dtype": "float32"}, "dtype='float32' is not a dtype"),
        ({"length": 4, "separator": 70000}, "a token from 0 to 65535"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    shards(tmp_path / "x", "uint16", "bin")
    with pytest.raises(ConfigError, match=told):
        Tokens(path=f"{tmp_path}/x", **options)


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"odd\.bin: expected tokens of 2 bytes \(uint16\), found 3 bytes"):
        Tokens(path=f"{tmp_path}/odd.bin", length=1)
    np.save(tmp_path / "a.npy", np.arange(100))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"a\.npy is truncated: 920 bytes, but its header promises 100 tokens of int64"):
        Tokens(path=f"{tmp_path}/a.npy", length=1)
    for wrong in (np.zeros((2, 2), np.int32), np.zeros(4), np.zeros(4, ">i4")):
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(DataError, match=r"a\.npy: expected a flat, little-endian array of integers"):
            Tokens(path=f"{tmp_path}/a.npy", length=1)
    (tmp_path / "a.txt.gz").write_bytes(b"1234")
    with pytest.raises(DataError, match="decompress it"):
        Tokens(path=f"{tmp_path}/a.txt.gz", length=1, dtype="uint8")


def test_arrays_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    np.save(tmp_path / "b.npy", np.arange(9, dtype=np.int32))
    with pytest.raises(DataError, match=r"b\.npy holds int32, but other shards or the configuration have int64"):
        Tokens(path=str(tmp_path), length=1)


def test_a_changed_or_too_short_array_is_refused(tmp_path: Path) -> None:
    shards(tmp_path / "x", "uint16", "bin")
    samples = Tokens(path=f"{tmp_path}/x", length=4)
    with (tmp_path / "x/0.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(DataError, match=r"0\.bin: expected 200 bytes, found 202"):
        samples[0]
    with pytest.raises(DataError, match="too few for one sample of 301"):
        Tokens(path=f"{tmp_path}/x", length=300)
    with pytest.raises(IndexError):
        samples[len(samples)]


def first(batch: list[Any]) -> Any:
    return batch[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same_records_as_this_process(tmp_path: Path, start: str) -> None:
    shards(tmp_path / "x", "uint16", "bin")
    samples = Tokens(path=f"{tmp_path}/x", length=4)
    assert len(pickle.dumps(samples)) < 5000
    expected = rows(samples)
    found = DataLoader(samples, num_workers=2, collate_fn=first, multiprocessing_context=start)  # type: ignore[arg-type]
    assert [row.tolist() for row in found] == expected
    assert rows(pickle.loads(pickle.dumps(samples))) == expected

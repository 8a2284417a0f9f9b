"""Documents packed into rows: equal to their concatenation."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner.errors import DataError
from runner.shards import formats
from runner.shards.packing import Packed
from runner.shards.records import Records

LENGTHS = (5, 0, 1, 30, 2, 0, 0, 8, 1, 1, 13, 0)


def documents() -> list[list[int]]:
    numbers = iter(range(100, 1000))
    return [[next(numbers) for _ in range(length)] for length in LENGTHS]


def joined(parts: list[list[int]], separator: int | None) -> list[int]:
    between = [] if separator is None else [separator]
    return [token for number, part in enumerate(parts) for token in (between if number else []) + part]


def cut(tokens: list[int], length: int) -> list[list[int]]:
    return [tokens[at : at + length + 1] for at in range(0, (len(tokens) - 1) // length * length, length)]


def rows(samples: Any) -> list[list[int]]:
    return [samples[index].tolist() for index in range(len(samples))]


@pytest.mark.parametrize("separator", [None, 0])
@pytest.mark.parametrize("length", [1, 2, 7, 30, 60])
def test_packed_equals_the_concatenation(length: int, separator: int | None) -> None:
    expected = cut(joined(documents(), separator), length)
    for form in (list, np.array, torch.tensor, lambda each: np.array(each, np.uint16)):
        packed = Packed([form(each) for each in documents()], LENGTHS, length=length, separator=separator)
        assert rows(packed) == expected
        assert packed[0].dtype == torch.int64
    order = np.random.default_rng(0).permutation(len(packed)).tolist()
    assert [packed[index].tolist() for index in order] == [expected[index] for index in order]
    for outside in (-1, len(packed)):
        with pytest.raises(IndexError):
            packed[outside]


class Counted(list[list[int]]):
    """Remembers what was read of it."""

    def __getitem__(self, index: Any) -> Any:
        self.read = [*getattr(self, "read", []), index]
        return super().__getitem__(index)


def test_only_the_documents_of_a_sample_are_read() -> None:
    counted = Counted(documents())
    packed = Packed(counted, LENGTHS, length=10)
    packed[1], packed[2]
    assert counted.read == [3]
    packed[3]
    assert counted.read == [3, 4, 7]


def test_lengths_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "lengths.npy", np.array(LENGTHS, np.uint16))
    packed = Packed(documents(), f"{tmp_path}/lengths.npy", length=10)
    assert rows(packed) == rows(Packed(documents(), np.array(LENGTHS), length=10))


def test_a_document_of_another_length_is_refused() -> None:
    wrong = [6, *LENGTHS[1:]]
    with pytest.raises(DataError, match="document 0: expected 6 tokens, found 5"):
        Packed(documents(), wrong, length=4)[0]


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ([1, 2], "12 documents and 2 lengths"),
        ([0.5] * 12, "expected a flat array of counts, found float64"),
        ([[1] * 12], "found int64 of shape .1, 12."),
        ([-1] * 12, "expected a flat array of counts"),
        ([1] * 12, "12 tokens are too few"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        Packed(documents(), lengths, length=20)


def test_a_file_that_holds_no_lengths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"no")
    with pytest.raises(DataError, match=r"a\.npy: not an array in numpy's format"):
        Packed(documents(), f"{tmp_path}/a.npy", length=1)


def test_documents_that_are_no_flat_integers_are_refused() -> None:
    for wrong in ([0.5], [[1]], "text"):
        with pytest.raises(DataError, match="document 0: expected a flat sequence of integers"):
            Packed([wrong, [2]], [1, 1], length=1)[0]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 30)
    for number, borders in enumerate([(0, 3), (3, 3), (3, 8), (8, 12)]):
        text = "".join(f"{document}\n" for document in documents()[slice(*borders)])
        (tmp_path / f"{number}.jsonl").write_text(text)
    return Records(path=f"{tmp_path}/*.jsonl")


def test_shards_of_documents_are_shards_of_samples(records: Records) -> None:
    packed = Packed(records, LENGTHS, length=4)
    assert rows(packed) == cut(joined(documents(), None), 4)
    begins = np.cumsum([0, *LENGTHS])[[0, 3, 3, 8, 12]]
    naive = [sum(low <= row * 4 < high for row in range(len(packed))) for low, high in pairwise(begins)]
    assert packed.counts == naive
    told = packed.locate(1)
    assert told.startswith("document 0 (file://")
    assert ", record 0, in the block at byte 0), tokens 4 to 5 and document 2 (" in told
    packed.hold(2, 3)
    assert rows(pickle.loads(pickle.dumps(packed))) == rows(packed)
    others = [Packed(records, LENGTHS, length=5), Packed(records, LENGTHS, length=4, separator=0), packed]
    assert len({each.fingerprint for each in others}) == 3


def test_missing_fields_of_documents_are_missing_when_packed() -> None:
    packed = Packed(documents(), LENGTHS, length=4)
    assert not hasattr(packed, "counts")
    assert not hasattr(packed, "fingerprint")
    assert packed.locate(0) == "document 0, tokens 0 to 5"
    packed.hold(2, 3)

"""Documents packed into rows: equal to their concatenation, and exact at any row after a resume."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from runner.errors import DataError
from runner.shards import formats
from runner.shards.packing import Packed, PackingStream
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


@pytest.mark.parametrize("separator", [None, 0])
@pytest.mark.parametrize("length", [1, 2, 7, 30, 60, 99])
def test_the_stream_equals_the_concatenation(length: int, separator: int | None) -> None:
    stream = PackingStream(documents(), length=length, separator=separator)
    expected = cut(joined(documents(), separator), length)
    assert [row.tolist() for row in stream] == expected
    assert stream.state_dict() == {"epoch": 1, "document": 0, "offset": 0}
    assert [row.tolist() for row in stream] == expected


@pytest.mark.parametrize("separator", [None, 0])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("length", [1, 3, 7, 30])
def test_the_stream_resumes_at_every_row(length: int, shuffle: bool, separator: int | None) -> None:
    def fresh() -> PackingStream:
        return PackingStream(documents(), length=length, separator=separator, shuffle=shuffle, seed=3)

    whole = fresh()
    seen = [(whole.state_dict(), row.tolist()) for _ in range(3) for row in whole]
    starts = [fresh().state_dict()]
    again = fresh()
    for _ in range(3):
        starts += [again.state_dict() for _ in again]
    for number, state in enumerate(starts):
        resumed = fresh()
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert resumed.state_dict() == state
        rest = [row.tolist() for _ in range(3 - state["epoch"]) for row in resumed]
        assert rest == [row for _, row in seen[number:]]


def test_epochs_are_shuffled_each_in_its_own_way() -> None:
    numbers = [[number] for number in range(50)]

    def epoch(seed: int, epoch: int) -> list[int]:
        stream = PackingStream(numbers, length=49, shuffle=True, seed=seed)
        stream.set_epoch(epoch)
        [row] = stream
        found: list[int] = row.tolist()
        return found

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(-1, 0)]
    assert all(sorted(order) == [*range(50)] for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == epoch(0, 1)
    assert orders[0][:8] == [10, 15, 13, 44, 41, 3, 37, 47]  # no upgrade may move a document


def test_a_pass_that_was_left_begins_again() -> None:
    stream = PackingStream(documents(), length=4)
    passing = iter(stream)
    begun = [next(passing).tolist() for _ in range(2)]
    assert [row.tolist() for row in stream][:2] == begun


def test_set_epoch_keeps_a_restored_position_of_that_epoch() -> None:
    stream = PackingStream(documents(), length=4)
    stream.load_state_dict({"epoch": 2, "document": 3, "offset": 1})
    stream.set_epoch(2)
    assert next(iter(stream)).tolist() == documents()[3][1:6]
    stream.set_epoch(3)
    assert next(iter(stream)).tolist() == joined(documents(), None)[:5]


def test_a_position_outside_is_refused() -> None:
    with pytest.raises(DataError, match="is not in these 12 documents"):
        PackingStream(documents(), length=4).load_state_dict({"epoch": 0, "document": 13, "offset": 0})


def test_each_worker_packs_its_share() -> None:
    stream = PackingStream(documents(), length=3)
    found = [row.tolist() for row in DataLoader(stream, batch_size=None, num_workers=2)]
    shares = [cut(joined(documents()[worker::2], None), 3) for worker in range(2)]
    assert sorted(found) == sorted(shares[0] + shares[1])

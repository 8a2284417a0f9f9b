"""The data sets that come with the runner."""

import gzip
import random
import sysconfig
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from runner.datasets.digits import Digits
from runner.datasets.fashion_mnist import FashionMNIST
from runner.datasets.images import LabelledImages
from runner.datasets.text import Text
from runner.errors import ConfigError, DataError


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def idx(array: Any) -> bytes:
    """An array in the idx format."""
    array = np.asarray(array, np.uint8)
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


PIXELS = np.arange(3 * 4 * 4).reshape(3, 4, 4) * 5
LABELS = [7, 0, 9]


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Three pictures of 4x4 pixels to train on, and the first of them to test with."""
    for prefix, count in (("train", 3), ("t10k", 1)):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS[:count])))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:count])))
    return tmp_path


def test_the_splits_of_the_digits_are_disjoint_and_complete() -> None:
    whole = load_digits()
    train, validation = Digits(split="train"), Digits(split="validation")
    assert (len(train), len(validation)) == (1437, 360)
    pixels = torch.cat([train.images, validation.images]).mul(16).flatten(1).tolist()
    pairs = zip(pixels, train.labels + validation.labels, strict=True)
    assert sorted(pairs) == sorted(zip(whole.data.tolist(), whole.target.tolist(), strict=True))


def test_a_digit_is_a_picture_from_zero_to_one_with_its_label() -> None:
    image, label = Digits(split="train", shift=1)[5]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert type(label) is int
    assert {*Digits(split="validation").labels} == {*range(10)}
    assert Digits(split="train").images.aminmax() == (0, 1)


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'test'; there are train and validation"):
        Digits(split="test")
    with pytest.raises(ConfigError, match="no split 'validation'; there are train and test"):
        FashionMNIST(path=str(tmp_path), split="validation")
    with pytest.raises(ConfigError, match="no split 'test'; there are train and validation"):
        Text(split="test", block_size=4)


def test_pictures_as_they_are_draw_no_random_number() -> None:
    images = torch.rand(2, 1, 3, 3)
    before = torch.get_rng_state()
    data = LabelledImages(images, torch.tensor([1, 0]))
    assert same(data[1][0], images[1])
    assert [label for _, label in data] == [1, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shifted_picture_is_filled_with_zeros() -> None:
    torch.manual_seed(0)
    data = LabelledImages(torch.ones(1, 1, 3, 3), torch.tensor([0]), shift=1)
    moved = {tuple(data[0][0].flatten().tolist()) for _ in range(200)}
    expected = set()
    for down, right in product((-1, 0, 1), repeat=2):
        image = torch.zeros(3, 3)
        image[max(0, down) : 3 + min(0, down), max(0, right) : 3 + min(0, right)] = 1
        expected.add(tuple(image.flatten().tolist()))
    assert moved == expected


def test_a_picture_is_mirrored_half_of_the_time() -> None:
    torch.manual_seed(0)
    image = torch.arange(4.0).view(1, 1, 2, 2)
    data = LabelledImages(image, torch.tensor([0]), flip=True)
    drawn = [data[0][0] for _ in range(400)]
    mirrored, straight = (sum(same(picture, kind) for picture in drawn) for kind in (image[0].flip(-1), image[0]))
    assert mirrored + straight == 400
    assert 150 < mirrored < 250


def test_fashion_mnist_is_read_from_idx_files(fashion: Path) -> None:
    train, test = FashionMNIST(path=str(fashion), split="train"), FashionMNIST(path=f"file://{fashion}", split="test")
    assert (len(train), len(test)) == (3, 1)
    assert train.labels == LABELS
    assert same(train.images, torch.tensor(PIXELS, dtype=torch.float32).unsqueeze(1) / 255)
    assert same(test[0][0], train[0][0])


def test_missing_pictures_are_reported_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        FashionMNIST(path=str(tmp_path), split="train")
    assert f"cannot read {tmp_path}/train-images-idx3-ubyte.gz" in str(refused.value)
    assert "apt-get install dataset-fashion-mnist" in str(refused.value)
    assert "data.train.path" in str(refused.value)


NO_IDX = {
    "empty": b"",
    "half a magic number": b"\0\0\x08",
    "no dimensions": b"\0\0\x08\0",
    "255 dimensions": b"\0\0\x08\xff",
    "half a head": idx(PIXELS)[:10],
    "one byte short": idx(PIXELS)[:-1],
    "one byte long": idx(PIXELS) + b"\0",
    "floats": b"\0\0\x0d" + idx(PIXELS)[3:],
    "another format": b"\x01" + idx(PIXELS)[1:],
    "impossibly large": b"\0\0\x08\x03" + b"\xff" * 12,
}


@pytest.mark.parametrize("raw", NO_IDX.values(), ids=NO_IDX.keys())
def test_a_file_of_another_format_than_idx_is_reported(fashion: Path, raw: bytes) -> None:
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is not an idx file .*\n.*apt-get"):
        FashionMNIST(path=str(fashion), split="train")


def joined(data: Text) -> bytes:
    """The whole text of a data set with blocks of one byte."""
    rows = bytes_of(data)
    return b"".join(row[:1] for row in rows) + rows[-1][1:]


def bytes_of(data: Text) -> list[bytes]:
    return [bytes(data[index].tolist()) for index in range(len(data))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two hundred files of 100 bytes, each of its own words."""
    chance = random.Random(0)
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    for number in range(200):
        folder = tmp_path / "corpus" / ("deep" if number % 2 else "")
        (folder / f"{number:03d}.txt").write_bytes(chance.randbytes(50).hex().encode())
    return tmp_path / "corpus"


@pytest.fixture
def remote(corpus: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.put(str(corpus), "/test_datasets", recursive=True)
    yield "memory://test_datasets"
    system.rm("/test_datasets", recursive=True)


def test_blocks_overlap_by_the_byte_that_is_only_predicted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(48)))
    data = Text(split="train", block_size=4, path=f"{tmp_path}/a.txt", held_out=3)
    assert bytes_of(data) == [bytes(range(first, first + 5)) for first in range(0, 28, 4)]
    assert data[0].dtype == torch.uint8


def test_a_single_file_is_held_out_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(48)))
    train, validation = (
        Text(split=split, block_size=1, path=f"{tmp_path}/a.txt", held_out=3) for split in ("train", "validation")
    )
    assert joined(train) == bytes(range(32))
    assert joined(validation) == bytes(range(32, 48))


def test_every_file_is_for_training_or_for_validation(corpus: Path) -> None:
    parts = [Text(split=split, block_size=1, path=str(corpus), held_out=5) for split in ("train", "validation")]
    documents = [joined(part).split(b"\n") for part in parts]
    assert sorted(documents[0] + documents[1]) == sorted(path.read_bytes() for path in corpus.rglob("*.txt"))
    assert 20 < len(documents[1]) < 60


def test_a_file_stays_on_its_side_when_others_come_and_go(corpus: Path) -> None:
    """By its content, so that neither a new name nor a copy brings what was held out into training."""

    def held_out() -> set[bytes]:
        data = Text(split="validation", block_size=1, path=str(corpus), held_out=5)
        return {*joined(data).split(b"\n")}

    before = held_out()
    for number, path in enumerate(sorted(corpus.rglob("*.txt"))):
        if number % 4 == 0:
            path.rename(corpus / f"renamed-{number}.txt")
        elif number % 4 == 1:
            (corpus / f"copy-{number}.txt").write_bytes(path.read_bytes())
    assert held_out() == before
    for path in sorted(corpus.rglob("*.txt"))[::2]:
        path.unlink()
    assert held_out() < before


def test_files_folders_globs_and_urls_name_the_same_text(corpus: Path, remote: str) -> None:
    texts = [
        Text(split="train", block_size=1, path=path)
        for path in (str(corpus), f"{corpus}/**/*.txt", f"file://{corpus}", remote, f"{remote}/**/*.txt")
    ]
    assert len({joined(text) for text in texts}) == 1
    flat = Text(split="train", block_size=1, path=f"{corpus}/*.txt")
    assert len(flat) < len(texts[0])


def test_a_limit_keeps_blocks_from_all_over_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(201)))
    options: dict[str, Any] = {"split": "train", "block_size": 2, "path": f"{tmp_path}/a.txt", "held_out": 1000}
    whole, limited = Text(**options), Text(**options, limit=4)
    assert len(whole) == 100
    assert bytes_of(limited) == [bytes_of(whole)[index] for index in (0, 25, 50, 75)]
    assert bytes_of(Text(**options, limit=1000)) == bytes_of(whole)


def test_too_little_text_is_reported_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    assert len(Text(split="train", block_size=8, path=f"{tmp_path}/a.txt", held_out=10)) == 1
    with pytest.raises(DataError) as refused:
        Text(split="train", block_size=9, path=f"{tmp_path}/a.txt", held_out=10)
    assert str(refused.value) == (
        f"{tmp_path}/a.txt has 9 bytes of train text, fewer than one block of 10; "
        "give more text or a smaller data.train.block_size"
    )
    with pytest.raises(DataError, match="0 bytes of validation text"):
        Text(split="validation", block_size=1, path=f"{tmp_path}/a.txt", held_out=11)


def test_without_a_path_the_text_is_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sources alone: neither what was installed beside them nor what is no source."""
    for name in ("a.py", "deep/b.py", "site-packages/torch/c.py", "dist-packages/d.py", "e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    assert joined(Text(split="train", block_size=1, held_out=1000)) == b"a.py\ndeep/b.py"


def test_images_without_a_label_are_refused() -> None:
    with pytest.raises(DataError, match="2 images and 3 labels do not belong together"):
        LabelledImages(torch.zeros(2, 1, 8, 8), torch.zeros(3))

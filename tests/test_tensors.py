"""Tensors as safetensors files with digests."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from runner.checkpoint.sealing import digest
from runner.checkpoint.tensors import Damaged, SafetensorsFile, Stored, bytes_of, read
from runner.errors import StateError
from runner.storage import LocalLocation

WIDTHS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of any bytes that such a tensor may have."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.arange(count, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    return raw.view(dtype).view(shape)


def tensors() -> dict[str, Tensor]:
    matrix = torch.arange(12.0).view(3, 4)
    return {f"of {dtype}": of(dtype, 3, 2) for dtype in WIDTHS} | {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "another empty": torch.empty(0, 3),
        "empty too": torch.empty(3, 0, dtype=torch.int8),
        "one": of(torch.uint8, 1),
        "transposed": matrix.t(),
        "strided": matrix[:, ::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "ünïcode/path": of(torch.int16, 3),
    }


def same(a: Tensor, b: Tensor) -> bool:
    """The same type, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a.contiguous()) == bytes_of(b.contiguous())


def write(location: LocalLocation, found: dict[str, Tensor], *, copies: bool = False) -> dict[str, Stored]:
    file = SafetensorsFile(found, metadata={"step": "7"}, copies=copies)
    location.put("file.safetensors", file.chunks())
    return file.stored("file.safetensors")


@pytest.fixture
def location(tmp_path: Path) -> LocalLocation:
    return LocalLocation(tmp_path)


def one(location: LocalLocation, stored: Stored) -> torch.Tensor:
    return read(location, {"tensor": stored})["tensor"]


def test_tensors_come_back_to_the_bit(location: LocalLocation) -> None:
    stored = write(location, tensors())
    assert stored.keys() == tensors().keys()
    assert [name for name, tensor in tensors().items() if not same(one(location, stored[name]), tensor)] == []


def test_the_safetensors_library_reads_the_same(location: LocalLocation, tmp_path: Path) -> None:
    write(location, tensors())
    found = safetensors.torch.load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors().keys()
    assert [name for name, tensor in tensors().items() if not same(found[name], tensor)] == []
    with safetensors.safe_open(tmp_path / "file.safetensors", "pt") as opened:
        assert opened.metadata() == {"step": "7"}


def test_types_have_the_names_of_the_format(location: LocalLocation) -> None:
    stored = write(location, tensors())
    assert {dtype: stored[f"of {dtype}"].dtype for dtype in WIDTHS} == WIDTHS


def test_a_file_without_tensors_is_a_file(location: LocalLocation, tmp_path: Path) -> None:
    assert write(location, {}) == {}
    assert safetensors.torch.load_file(tmp_path / "file.safetensors") == {}


def test_every_tensor_is_aligned(location: LocalLocation) -> None:
    found = tensors()
    assert all(stored.offset % found[name].itemsize == 0 for name, stored in write(location, found).items())


def test_a_shared_tensor_is_written_once_and_read_under_each_name(location: LocalLocation, tmp_path: Path) -> None:
    weight = torch.rand(1000)
    stored = write(location, {"head": weight, "tokens": weight.view(1000), "other": weight.clone()})
    assert stored["head"] == stored["tokens"] != stored["other"]
    assert (tmp_path / "file.safetensors").stat().st_size < 2 * 4000 + 500
    found = read(location, stored)
    assert [same(found[name], weight) for name in ("head", "tokens", "other")] == [True] * 3
    assert found["head"].data_ptr() == found["tokens"].data_ptr() != found["other"].data_ptr()


def test_copies_are_written_under_each_name(location: LocalLocation, tmp_path: Path) -> None:
    weight = torch.rand(1000)
    stored = write(location, {"head": weight, "tokens": weight}, copies=True)
    assert stored["head"].offset != stored["tokens"].offset
    found = safetensors.torch.load_file(tmp_path / "file.safetensors")
    assert same(found["head"], weight)
    assert same(found["tokens"], weight)


def test_views_of_one_memory_that_differ_are_not_taken_for_shared(location: LocalLocation) -> None:
    base = torch.arange(16.0).view(4, 4)
    views = {"base": base, "flat": base.view(16), "part": base[0], "turned": base.t(), "bits": base.view(torch.int32)}
    stored = write(location, views)
    assert len({entry.offset for entry in stored.values()}) == len(views)
    assert [name for name, view in views.items() if not same(one(location, stored[name]), view)] == []


def test_empty_tensors_are_not_taken_for_shared(location: LocalLocation) -> None:
    stored = write(location, {"a": torch.empty(0), "b": torch.empty(0, 7)})
    assert one(location, stored["a"]).shape == (0,)
    assert one(location, stored["b"]).shape == (0, 7)


def test_one_flipped_bit_is_damage(location: LocalLocation, tmp_path: Path) -> None:
    found = {"a": of(torch.float32, 3), "b": of(torch.bfloat16, 2, 2), "c": of(torch.bool, 3)}
    stored = write(location, found)
    path = tmp_path / "file.safetensors"
    good = path.read_bytes()
    for entry in stored.values():
        for bit in range(8 * entry.offset, 8 * (entry.offset + entry.length)):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(Damaged, match=rf"file\.safetensors bytes {entry.offset} to .* digest"):
                one(location, entry)


def test_bytes_of_another_place_are_damage(location: LocalLocation) -> None:
    stored = write(location, {"a": of(torch.int64, 4), "b": of(torch.int64, 4) + 1})
    with pytest.raises(Damaged):
        one(location, replace(stored["a"], offset=stored["b"].offset))


@pytest.mark.parametrize(
    ("dtype", "shape", "length", "told"),
    [
        ("F32", (1 << 50,), 4, "4 bytes cannot be"),
        ("F32", (2, 2), 1 << 50, "cannot be a F32 tensor"),
        ("F32", (-2, -2), 16, "cannot be"),
        ("F32", (0, -1), 0, "cannot be"),
        ("F32", (), 0, "cannot be"),
        ("F32", (1 << 70, 0), 0, "cannot be"),
        ("U8", (0, 1 << 32, 1 << 32), 0, "cannot be"),
        ("U8", (1,) * 65, 1, "cannot be"),
        ("F31", (1,), 4, "unknown dtype 'F31'"),
    ],
)
def test_impossible_sizes_are_damage_before_anything_is_allocated(
    dtype: str, shape: tuple[int, ...], length: int, told: str
) -> None:
    with pytest.raises(Damaged, match=told):
        Stored(dtype, shape, "file.safetensors", 0, length, "")


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz])
def test_a_type_the_format_lacks_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(StateError, match=f"cannot save model/weight: {dtype}"):
        SafetensorsFile({"model/weight": torch.empty(1, dtype=dtype)}, metadata={})


def test_a_digest_is_that_of_the_bytes() -> None:
    """Frozen: stored checkpoints depend on it."""
    assert digest(b"") == "xxh3:99aa06d3014798d86001c324468d497f"
    assert digest(b"runner") == digest(memoryview(bytearray(b"runner"))) != digest(b"runnes")


def test_a_file_may_be_written_anywhere(location: LocalLocation, tmp_path: Path) -> None:
    """The chunks are the file, whatever takes them."""
    write(location, tensors())
    buffer = io.BytesIO()
    for chunk in SafetensorsFile(tensors(), metadata={"step": "7"}).chunks():
        buffer.write(chunk)
    assert buffer.getvalue() == (tmp_path / "file.safetensors").read_bytes()


def test_lazy_views_are_stored_as_the_values_they_stand_for(location: LocalLocation) -> None:
    z, x = torch.tensor([1 + 2j, 3 - 4j]), torch.tensor([1.0, 2.0])
    views = {"z": z, "conjugate": z.conj(), "x": x, "negative": torch._neg_view(x), "imaginary": z.conj().imag}
    stored = write(location, views)
    assert [name for name, view in views.items() if not torch.equal(one(location, stored[name]), view)] == []

"""Tensors as safetensors files with digests."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from runner.checkpoint.checkpoint import Reader, TensorBytes
from runner.checkpoint.manifest import keyed_digest
from runner.checkpoint.sharding import FileGroup, rows_of
from runner.checkpoint.tensor_file import BLOCK, Damaged, Kind, SafetensorsFile, StoredFile, bytes_of, in_file_order
from runner.errors import StateError
from runner.storage import LocalLocation

FILE = "file.safetensors"
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


@dataclass(frozen=True)
class Written:
    """A file of tensors, and how to read them."""

    group: FileGroup
    file: StoredFile
    location: LocalLocation

    def read(self, *names: str) -> dict[str, Tensor]:
        kinds = self.group.tensors
        places = {name: (TensorBytes(self.group, name, 0), rows_of(kinds[name].shape)) for name in names or kinds}
        return Reader(self.location, {FILE: self.file}).read(places)

    def begin(self, name: str) -> int:
        return self.file.header + self.group.offsets(0, self.file.data)[name]


def write(location: LocalLocation, found: dict[str, Tensor]) -> Written:
    kinds = {name: Kind.of(tensor, tuple(tensor.shape), name) for name, tensor in found.items()}
    file = SafetensorsFile(found, metadata={"step": "7"})
    size = location.put(FILE, file.chunks())
    return Written(FileGroup(1, {name: kinds[name] for name in in_file_order(kinds)}), file.stored(size), location)


@pytest.fixture
def location(tmp_path: Path) -> LocalLocation:
    return LocalLocation(tmp_path)


def test_tensors_come_back_to_the_bit(location: LocalLocation) -> None:
    written = write(location, tensors())
    found = written.read()
    assert found.keys() == tensors().keys()
    assert [name for name, tensor in tensors().items() if not same(found[name], tensor)] == []
    assert [name for name, tensor in tensors().items() if not same(written.read(name)[name], tensor)] == []


def test_the_safetensors_library_reads_the_same(location: LocalLocation, tmp_path: Path) -> None:
    write(location, tensors())
    found = safetensors.torch.load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors().keys()
    assert [name for name, tensor in tensors().items() if not same(found[name], tensor)] == []
    with safetensors.safe_open(tmp_path / "file.safetensors", "pt") as opened:
        assert opened.metadata() == {"step": "7"}


def test_types_have_the_names_of_the_format(location: LocalLocation) -> None:
    kinds = write(location, tensors()).group.tensors
    assert {dtype: kinds[f"of {dtype}"].dtype for dtype in WIDTHS} == WIDTHS


def test_a_file_without_tensors_is_a_file(location: LocalLocation, tmp_path: Path) -> None:
    assert write(location, {}).file.blocks == []
    assert safetensors.torch.load_file(tmp_path / "file.safetensors") == {}


def test_every_tensor_is_aligned(location: LocalLocation) -> None:
    found = tensors()
    written = write(location, found)
    assert all(written.begin(name) % tensor.itemsize == 0 for name, tensor in found.items())


def test_a_tensor_is_written_under_each_of_its_names(location: LocalLocation, tmp_path: Path) -> None:
    weight = torch.rand(1000)
    written = write(location, {"head": weight, "tokens": weight})
    assert written.begin("head") != written.begin("tokens")
    found = safetensors.torch.load_file(tmp_path / FILE)
    assert same(found["head"], weight)
    assert same(found["tokens"], weight)


def test_bytes_between_the_wanted_ones_are_verified_too(location: LocalLocation, tmp_path: Path) -> None:
    written = write(location, {name: torch.rand(1000) for name in "abc"})
    raw = bytearray((tmp_path / FILE).read_bytes())
    raw[written.begin("b")] ^= 1
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(Damaged):
        written.read("a", "c")


def test_large_tensors_are_of_many_blocks(location: LocalLocation, tmp_path: Path) -> None:
    """Tensors that end before, at and behind the end of a block, and one of several."""
    sizes = {"a": BLOCK - 8, "b": 8, "c": 3 * BLOCK + 5, "d": BLOCK, "e": 1}
    found = {name: of(torch.uint8, size) for name, size in sizes.items()}
    written = write(location, found)
    assert len(written.file.blocks) == -(-sum(sizes.values()) // BLOCK)
    assert all(same(tensor, found[name]) for name, tensor in written.read().items())
    raw = bytearray((tmp_path / FILE).read_bytes())
    raw[written.begin("c") + 2 * BLOCK] ^= 1
    (tmp_path / FILE).write_bytes(raw)
    assert all(same(written.read(name)[name], found[name]) for name in "ab")
    with pytest.raises(Damaged):
        written.read("c")


def test_one_flipped_bit_is_damage(location: LocalLocation, tmp_path: Path) -> None:
    written = write(location, {"a": of(torch.float32, 3), "b": of(torch.bfloat16, 2, 2), "c": of(torch.bool, 3)})
    good = (tmp_path / FILE).read_bytes()
    for bit in range(8 * written.file.header, 8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / FILE).write_bytes(bad)
        with pytest.raises(Damaged, match=rf"file\.safetensors bytes {written.file.header} to {len(good)}: digest"):
            written.read()


def test_bytes_of_another_place_are_damage(location: LocalLocation) -> None:
    written = write(location, {"a": of(torch.uint8, BLOCK), "b": of(torch.uint8, BLOCK) + 1})
    exchanged = replace(written.file, blocks=written.file.blocks[::-1])
    with pytest.raises(Damaged):
        replace(written, file=exchanged).read()


@pytest.mark.parametrize(
    ("dtype", "shape", "told"),
    [
        ("F32", (-2, -2), "there is no"),
        ("F32", (0, -1), "there is no"),
        ("F32", (1 << 70, 0), "there is no"),
        ("F32", (1 << 61,), "there is no"),
        ("U8", (0, 1 << 32, 1 << 32), "there is no"),
        ("U8", (1,) * 65, "there is no"),
        ("U8", (1.0,), "sizes"),
        ("U8", (True,), "sizes"),
        ("F31", (1,), "unknown dtype 'F31'"),
    ],
)
def test_impossible_tensors_are_damage(dtype: str, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(Damaged, match=told):
        Kind(dtype, shape)


@pytest.mark.parametrize(("shape", "size"), [((1 << 50,), 4), ((2, 2), 20), ((), 0), ((3,), 11)])
def test_wrong_sizes_are_damage_before_any_allocation(
    location: LocalLocation, shape: tuple[int, ...], size: int
) -> None:
    group, file = FileGroup(1, {"a": Kind("F32", shape)}), StoredFile(size, 0, "", [""] * min(size, 1))
    with pytest.raises(Damaged, match="bytes cannot be the tensors"):
        Reader(location, {FILE: file}).read({"a": (TensorBytes(group, "a", 0), rows_of(shape))})


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz])
def test_a_type_the_format_lacks_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(StateError, match=f"cannot save model/weight: {dtype}"):
        SafetensorsFile({"model/weight": torch.empty(1, dtype=dtype)}, metadata={})


def test_a_digest_is_that_of_the_bytes() -> None:
    """Frozen: stored checkpoints depend on it."""
    assert keyed_digest(b"") == "xxh3:99aa06d3014798d86001c324468d497f"
    assert keyed_digest(b"runner") == keyed_digest(memoryview(bytearray(b"runner"))) != keyed_digest(b"runnes")
    assert keyed_digest(b"run", b"", memoryview(b"ner")) == keyed_digest(b"runner")


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
    found = write(location, views).read()
    assert [name for name, view in views.items() if not torch.equal(found[name], view)] == []

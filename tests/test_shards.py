"""Records of every format, by number: what is scanned is what is read."""

import bz2
import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from marks import slow
from torch.utils.data import DataLoader

from runner.errors import ConfigError, DataError
from runner.shards import formats
from runner.shards.records import Records
from runner.shards.scan import Scan, save
from runner.storage import files


@pytest.fixture(params=[24, 1 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of few records, and of all."""
    monkeypatch.setattr(formats, "BLOCK_BYTES", request.param)
    return int(request.param)


@pytest.fixture
def memory() -> Iterator[str]:
    """A store that is no disk."""
    yield "memory://test_shards"
    fsspec.filesystem("memory").rm("/test_shards", recursive=True)


def lines(folder: Path, **shards: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, text in shards.items():
        (folder / f"{name}.jsonl").write_bytes(text.encode())
    return str(folder)


def every(records: Any) -> list[Any]:
    return [records[index] for index in range(len(records))]


def check_access(records: Records, expected: list[Any]) -> None:
    assert every(records) == expected
    assert sum(records.counts) == len(expected)
    order = np.random.default_rng(0).permutation(len(expected)).tolist()
    assert [records[index] for index in order] == [expected[index] for index in order]
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError):
            records[outside]


JSONL = {
    "a": "".join(f'{{"n": {n}}}\n' for n in range(20)),
    "b": "",
    "c": '"one, without an end"',
    "d": '1\r\n\r\n  \n2\r\n\n\n"\u00e4\u2028\U0001f600"\n' + json.dumps("long" * 50) + "\n\n\n[]",
}
JSON_VALUES = [{"n": n} for n in range(20)] + ["one, without an end", 1, 2, "\u00e4\u2028\U0001f600", "long" * 50, []]


def test_json_lines(tmp_path: Path, block: int) -> None:
    records = Records(path=lines(tmp_path / "x", **JSONL))
    check_access(records, JSON_VALUES)
    assert records.counts == [20, 0, 1, 5]


def test_text_lines_keep_blank_ones(tmp_path: Path, block: int) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n\u00fc\rtwo\n".encode() + b"x" * 100 + b"\n\nlast")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"\n")
    check_access(Records(path=f"{tmp_path}/*.txt"), ["one", "", "\u00fc\rtwo", "x" * 100, "", "last", ""])


def test_another_suffix_is_text_if_it_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "poem").write_text("one\ntwo\n")
    assert every(Records(path=f"{tmp_path}/poem", format="text")) == ["one", "two"]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_compressed_lines_are_one_block(tmp_path: Path, block: int, suffix: str, pack: Any) -> None:
    for name, text in JSONL.items():
        (tmp_path / f"{name}.jsonl.{suffix}").write_bytes(pack(text.encode()))
    records = Records(path=str(tmp_path))
    check_access(records, JSON_VALUES)
    assert [shard.starts.tolist() for shard in records.manifest.shards] == [
        [[0], [0]],
        [[], []],
        [[0], [0]],
        [[0], [0]],
    ]


def test_blocks_are_whole_records_of_about_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 20)
    records = Records(path=lines(tmp_path / "x", a='"1"\n"2"\n\n\n' * 10 + '"' + "x" * 100 + '"\n"3"\n'))
    [shard] = records.manifest.shards
    spans = [shard.span(number) for number in range(shard.starts.shape[1])]
    assert spans[0][::2] == (0, 0)
    assert spans[-1][1::2] == (22, shard.size)
    assert all(one[1] == two[0] and one[3] == two[2] for one, two in pairwise(spans))
    assert max(stop - start for _, _, start, stop in spans[:4]) <= 40
    assert len(records) == 22


def test_invalid_json_is_reported_when_it_is_read(tmp_path: Path) -> None:
    records = Records(path=lines(tmp_path / "x", a="1\n{oh\n3\n"))
    assert (records[0], records[2]) == (1, 3)
    with pytest.raises(
        DataError, match=r"a\.jsonl, record 1, in the block at byte 0: not a record of jsonl: Expecting"
    ):
        records[1]


def test_invalid_unicode_is_reported_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt, record 1.*utf-8"):
        Records(path=str(tmp_path))[1]


def test_decode_is_called_with_every_record(tmp_path: Path) -> None:
    assert every(Records(path=lines(tmp_path / "x", a="[1]\n[2,3]"), decode=len)) == [1, 2]


def test_any_store_gives_the_same(tmp_path: Path, memory: str, block: int) -> None:
    fsspec.filesystem("memory").put(lines(tmp_path / "x", **JSONL), "/test_shards", recursive=True)
    there, here = Records(path=f"{memory}/*.jsonl"), Records(path=f"{tmp_path}/x/*")
    check_access(there, JSON_VALUES)
    assert there.fingerprint == here.fingerprint
    assert there.locate(20) == "memory:///test_shards/c.jsonl, record 0, in the block at byte 0"


def pack(path: Path, members: list[tuple[str, bytes | None]], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            about.size = len(data or b"")
            archive.addfile(about, io.BytesIO(data or b""))


MEMBERS: list[tuple[str, bytes | None]] = [
    ("dir", None),
    ("dir/000.jpg", b"j" * 700),
    ("dir/000.CLS", b"0"),
    ("README", b"no dot"),
    ("dir/000.seg.png", b""),
    ("dir/001.jpg", b"k" * 5000),
    ("dir.v2/001.jpg", b"other"),
    (".hidden", b"x"),
    ("__meta__/a.txt", b"x"),
    ("n" * 150 + "/\u00e4" * 60 + ".txt", b"a long name"),
    ("n" * 150 + "/\u00e4" * 60 + ".cls", b"of the same"),
    *((f"{n:03}.txt", b"t" * n) for n in range(2, 30)),
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_as_webdataset_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: int) -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    pack(tmp_path / "a.tar", MEMBERS, format=form)
    with (tmp_path / "a.tar").open("rb") as file:
        parts = tariterators.tar_file_expander([{"url": "a.tar", "stream": file}])
        expected = [*tariterators.group_by_keys(parts)]
    for sample in expected:
        del sample["__url__"]
    for size in (1, 4000, 1 << 20):
        monkeypatch.setattr(formats, "BLOCK_BYTES", size)
        check_access(Records(path=f"{tmp_path}/a.tar"), expected)
    assert [*expected[0]] == ["__key__", "jpg", "cls", "seg.png"]
    assert len(expected) == 32


def test_a_changed_record_does_not_come_back(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", [("a.txt", b"a")])
    records = Records(path=f"{tmp_path}/a.tar")
    records[0].clear()
    assert records[0] == {"__key__": "a", "txt": b"a"}


def test_an_empty_tar_is_fine_beside_others(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", [])
    pack(tmp_path / "b.tar", [("a.txt", b"a")])
    assert Records(path=str(tmp_path)).counts == [0, 1]


def test_damaged_tars_are_refused_not_shortened(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", [("a.txt", b"a" * 600), ("b.txt", b"b" * 600)])
    good = (tmp_path / "a.tar").read_bytes()
    for bad, told in ((good[:2100], "unexpected end"), (b"x" * 2000, "header"), (b"", "empty")):
        (tmp_path / "a.tar").write_bytes(bad)
        with pytest.raises(DataError, match=rf"a\.tar is not a whole tar archive: .*{told}"):
            Scan(str(tmp_path)).run()
    (tmp_path / "a.tar").write_bytes(good[:1536] + b"damage" + good[1542:])
    with pytest.raises(DataError, match=r"a\.tar is damaged: no header at byte 1536"):
        Scan(str(tmp_path)).run()
    pack(tmp_path / "a.tar", [("a.txt", b"1"), ("a.TXT", b"2")])
    with pytest.raises(DataError, match=r"record 'a' has two members \.txt; its second is at byte 1024"):
        Scan(str(tmp_path)).run()


def test_parquet_as_pyarrow_reads_it(tmp_path: Path, memory: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"n": range(100), "text": [f"row {n}" for n in range(100)], "odd": [None, [1, 2]] * 50})
    for number, piece in enumerate((table, table.slice(0, 0), table.slice(0, 1))):
        pq.write_table(piece, tmp_path / f"{number}.parquet", row_group_size=7)
    fsspec.filesystem("memory").put(str(tmp_path), "/test_shards", recursive=True)
    for where in (str(tmp_path), memory):
        records = Records(path=f"{where}/*.parquet")
        check_access(records, [*table.to_pylist(), table.to_pylist()[0]])
        assert records.counts == [100, 0, 1]
        assert records.manifest.shards[0].starts[0].tolist() == [*range(0, 100, 7)]
    check_access(pickle.loads(pickle.dumps(records)), every(records))


def test_a_file_that_is_no_parquet_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: Arrow"):
        Scan(str(tmp_path)).run()


@pytest.mark.parametrize("suffixes", ["jsonl txt", "jsonl md", "tar.gz", "zip", "jsonl npy", ""])
def test_mixed_and_unknown_shards_are_refused(tmp_path: Path, suffixes: str) -> None:
    names = [f"a{number}.{suffix}" for number, suffix in enumerate(suffixes.split())] or ["jsonl"]
    for name in names:
        (tmp_path / name).write_text("1")
    with pytest.raises(DataError, match=r"unknown suffix|expected shards of one format") as refused:
        Scan(str(tmp_path)).run()
    assert f"{tmp_path}/{names[-1]}" in str(refused.value)


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    folder = lines(tmp_path / "x", a="1\n")
    (tmp_path / "x/.notes").write_text("")
    assert Records(path=folder).counts == [1]


def test_shards_stand_in_the_order_of_the_patterns_each_once(tmp_path: Path) -> None:
    folder = lines(tmp_path / "x", a="1", b="2", c="3")
    assert every(Records(path=[f"{folder}/c*", folder])) == [3, 1, 2]


def test_no_record_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record in 2 shards"):
        Records(path=lines(tmp_path / "x", a="", b="\n\n"))


def test_a_configuration_that_says_two_things_is_refused(tmp_path: Path) -> None:
    folder = lines(tmp_path / "x", a="1")
    save(f"{tmp_path}/m.json", Scan(folder).run())
    for wrong in ({}, {"path": folder, "manifest": "m"}, {"path": folder, "format": "csv"}):
        with pytest.raises(ConfigError):
            Records(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lists shards of jsonl, but the configuration says text"):
        Records(manifest=f"{tmp_path}/m.json", format="text")
    with pytest.raises(ConfigError, match="use Tokens"):
        Records(path=folder, format="tokens")
    (tmp_path / "a.bin").write_bytes(b"12")
    with pytest.raises(ConfigError, match="use Tokens"):
        Records(path=f"{tmp_path}/a.bin")


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    records = Records(path=lines(tmp_path / "x", a="1\n2\n", b="3\n"))
    lines(tmp_path / "x", a="1\n2\n3\n")
    assert records[2] == 3
    with pytest.raises(DataError, match=r"a\.jsonl: expected 4 bytes, found 6\. .*Restore it; or scan again"):
        records[0]


def test_a_shard_of_the_same_size_and_fewer_records_is_refused(tmp_path: Path) -> None:
    records = Records(path=lines(tmp_path / "x", a="1\n2\n"))
    lines(tmp_path / "x", a="123\n")
    with pytest.raises(DataError, match=r"a\.jsonl, bytes 0 to 4: expected 2 records, found 1"):
        records[0]


def test_the_fingerprint_follows_names_sizes_and_counts(tmp_path: Path) -> None:
    def of(name: str, **shards: str) -> str:
        return Records(path=lines(tmp_path / name, **shards)).fingerprint

    same = {of("x", a="1\n", b="2\n"), of("y", a="1\n", b="2\n")}
    others = {
        of("p", a="1\n", c="2\n"),
        of("q", a="1\n", b="22\n"),
        of("r", a="1\n2\n", b=""),
        of("s", a="1\n\n\n", b="2"),
    }
    assert len(same) == 1
    assert len(same | others) == 5
    save(f"{tmp_path}/m.json", Scan(f"{tmp_path}/x").run())
    assert {Records(manifest=f"{tmp_path}/m.json").fingerprint} == same


def test_blocks_are_held_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 20)
    records = Records(path=lines(tmp_path / "x", a="".join(f"{n:10}\n" for n in range(100))))
    reads = []
    original = files.read_range
    monkeypatch.setattr(files, "read_range", lambda *asked: reads.append(asked) or original(*asked))
    records.hold(2, 10)
    assert len(records) == 100
    for first in range(0, 50, 10):  # two windows of ten, in turn, each in a random order
        for place in np.random.default_rng(first).permutation(10).tolist():
            assert records[first + place] == first + place
            assert records[first + place + 50] == first + place + 50
    assert len(reads) == len(set(reads))


def test_a_pickled_shard_arrives_without_its_cache(tmp_path: Path) -> None:
    records = Records(path=lines(tmp_path / "x", a=json.dumps("x" * 100_000) + "\n" + "1\n"))
    size = len(pickle.dumps(records))
    records.hold(3, 1)
    assert every(records)[1] == 1
    again = pickle.loads(pickle.dumps(records))
    assert size < len(pickle.dumps(records)) + 50 < 5000
    assert every(again) == every(records)


def first(batch: list[Any]) -> Any:
    return batch[0]


@pytest.mark.parametrize("start", ["fork", slow("spawn")])
def test_workers_read_the_same_records_as_this_process(tmp_path: Path, start: str, block: int) -> None:
    records = Records(path=lines(tmp_path / "x", **JSONL))
    assert records[0] == JSON_VALUES[0]
    found = DataLoader(records, num_workers=2, collate_fn=first, multiprocessing_context=start)  # type: ignore[arg-type]
    assert [*found] == JSON_VALUES

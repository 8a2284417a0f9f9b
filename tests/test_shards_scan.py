"""Manifests: written, cut, gone on with, moved, damaged; and the command that makes them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from marks import slow
from waiting import until

from runner.errors import DataError
from runner.shards import formats
from runner.shards.__main__ import main
from runner.shards.records import Records
from runner.shards.scan import Scan, load, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 1, 2 and 3 records."""
    (tmp_path / "data/deep").mkdir(parents=True)
    for count, name in enumerate(("a", "b", "deep/c"), 1):
        (tmp_path / f"data/{name}.jsonl").write_text("".join(f"[{count}, {n}]\n" for n in range(count)))
    return tmp_path / "data"


def summary(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, int]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, int] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_writes_a_manifest_that_a_data_set_opens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{folder}/shards.json"
    assert main([str(folder), "--out", out]) == 0
    told = capsys.readouterr().out
    assert told == f"{out}: 6 records in 3 shards of jsonl, 42 bytes; kept 0, scanned 3\n"
    records = Records(manifest=out)
    assert [records[index] for index in range(6)] == [[1, 0], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2]]
    written = json.loads(Path(out).read_text())
    assert written["format"] == 1
    assert [shard["name"] for shard in written["shards"]] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert records.fingerprint == Records(path=f"{folder}/**/*.jsonl").fingerprint


def test_a_second_scan_reads_only_new_and_changed_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (str(folder), "--out", f"{folder}/shards.json")
    first = summary(capsys, *command)
    assert first == {"shards": 3, "records": 6, "bytes": 42, "kept": 0, "scanned": 3}
    assert summary(capsys, *command) == {**first, "kept": 3, "scanned": 0}
    (folder / "new.jsonl").write_text("1\n")
    (folder / "a.jsonl").write_text("[1, 1, 1]\n")
    os.utime(folder / "b.jsonl", ns=(1, 1))
    found = summary(capsys, *command)
    assert found == {"shards": 4, "records": 7, "bytes": 47, "kept": 1, "scanned": 3}
    (folder / "new.jsonl").unlink()
    assert summary(capsys, *command)["shards"] == 3
    assert summary(capsys, *command, "--format", "text")["kept"] == 0


def test_a_moved_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    assert main([str(folder), "--out", f"{folder}/shards.json"]) == 0
    before = Records(manifest=f"{folder}/shards.json")
    shutil.move(folder, tmp_path / "moved here")
    system = fsspec.filesystem("memory")
    system.put(f"{tmp_path}/moved here", "/test_moved", recursive=True)
    for where in (f"{tmp_path}/moved here", "memory://test_moved"):
        after = Records(manifest=f"{where}/shards.json")
        assert after[5] == [3, 2]
        assert after.fingerprint == before.fingerprint
    system.rm("/test_moved", recursive=True)


def test_shards_outside_the_manifests_folder_keep_their_urls(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main([f"{folder}/deep", "--out", f"{tmp_path}/out/shards.json"]) == 0
    shutil.move(tmp_path / "out/shards.json", tmp_path / "shards.json")
    assert Records(manifest=f"{tmp_path}/shards.json")[0] == [3, 0]


def test_a_manifest_can_lie_in_any_store(folder: Path) -> None:
    assert main([str(folder), "--out", "memory://test_scan.json"]) == 0
    assert len(Records(manifest="memory://test_scan.json")) == 6
    fsspec.filesystem("memory").rm("/test_scan.json")


def test_an_incomplete_manifest_names_the_command_to_mend_it(folder: Path) -> None:
    out = f"{folder}/shards.json"
    save(out, Scan(f"{folder}/a.jsonl").run(), command=f"python -m runner.shards {folder} --out {out}")
    with pytest.raises(DataError) as refused:
        Records(manifest=out)
    assert str(refused.value) == (
        f"{out} is incomplete: its scan was interrupted. Run it again, it continues where it stopped: "
        f"python -m runner.shards {folder} --out {out}"
    )
    assert len(load(out, partial=True).shards) == 1


def test_a_damaged_shard_keeps_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.npy").write_bytes(b"no" * 64 if name == "b" else npy())
    assert main([f"{folder}/*.npy", "--out", f"{folder}/s.json", "--dtype", "uint8", "--jobs", "1"]) == 1
    assert "b.npy is not an array in numpy's format" in capsys.readouterr().err
    (folder / "b.npy").write_bytes(npy())
    found = summary(capsys, f"{folder}/*.npy", "--out", f"{folder}/s.json", "--dtype", "uint8")
    assert (found["kept"], found["scanned"]) == (1, 1)


def npy() -> bytes:
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.arange(5, dtype=np.uint8))
    return file.getvalue()


def test_a_file_that_is_no_manifest_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{folder}/b.jsonl", "--out", f"{folder}/a.jsonl"]) == 1
    assert f"--out {folder}/a.jsonl is in the way" in capsys.readouterr().err
    assert (folder / "a.jsonl").read_text() == "[1, 0]\n"


def test_a_shard_that_changes_under_the_scan_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Scan(f"{folder}/a.jsonl")
    (folder / "a.jsonl").write_text("[1, 0]\n2\n")
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was scanned: 7 bytes, now 9"):
        one.run()


def long_scan(tmp_path: Path) -> tuple[Path, list[str]]:
    """Many shards, and the command that scans them one at a time, saving after each and slowly."""
    data = tmp_path / "many"
    data.mkdir()
    for number in range(200):
        (data / f"{number:03}.jsonl").write_text(f"[{number}]\n" * (number % 7))
    slow = (
        "import sys, time; from runner.shards import __main__ as command, formats\n"
        "command._SAVE_SECONDS = command._SAVE_SHARE = 0\n"
        "blocks = formats.JsonLines.blocks\n"
        "def slowly(self, path, size): time.sleep(0.02); yield from blocks(self, path, size)\n"
        "formats.JsonLines.blocks = slowly\n"
        "sys.exit(command.main(sys.argv[1:]))"
    )
    return data, [sys.executable, "-c", slow, str(data), "--out", f"{data}/shards.json", "--jobs", "2"]


@pytest.mark.parametrize("ending", [signal.SIGKILL, slow(signal.SIGINT)])
def test_a_scan_that_is_cut_goes_on_to_the_same_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: int
) -> None:
    data, command = long_scan(tmp_path)
    out = data / "shards.json"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(lambda: out.exists() and out.read_text().count('"name"') >= 20, process=process)
    process.send_signal(ending)
    _, told = process.communicate(timeout=300)
    assert process.returncode == (75 if ending == signal.SIGINT else -ending)
    if ending == signal.SIGINT:
        assert told.startswith("stopped: kept 0, scanned ")
    with pytest.raises(DataError, match="incomplete"):
        Records(manifest=str(out))
    found = summary(capsys, str(data), "--out", str(out))
    assert found["kept"] >= 20
    assert found["scanned"] > 0
    assert found["shards"] == 200
    assert main([f"{data}/*.jsonl", "--out", f"{tmp_path}/whole.json"]) == 0
    whole = (tmp_path / "whole.json").read_text().replace('"many/', '"')
    assert out.read_text() == whole


def change(good: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(good))
    *above, last = path.split(".")
    at: Any = found
    for key in above:
        at = at[int(key) if key.isdigit() else key]
    if value is KeyError:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("format", 2, "format: expected 1, found 2"),
        ("format", True, "format: expected 1, found True"),
        ("kind", "csv", "kind: expected one of jsonl"),
        ("kind", [], "kind: expected one of jsonl"),
        ("kind", "tokens", "dtype: expected a dtype of tokens"),
        ("dtype", "uint8", "dtype: expected a dtype of tokens"),
        ("complete", 1, "complete: expected true or false"),
        ("complete", False, "again: expected the command"),
        ("shards", {}, "shards: expected a list"),
        ("shards", KeyError, "shards: expected a list, found None"),
        ("shards.1", 5, r"shards\[1\]: expected an object, found 5"),
        ("shards.1.name", "", r"shards\[1\]\.name: expected a path"),
        ("shards.1.name", "a.jsonl", "shards: expected each shard once"),
        ("shards.1.size", -1, r"shards\[1\]\.size: expected a number"),
        ("shards.1.size", 1 << 70, r"shards\[1\]\.size: expected a number"),
        ("shards.1.records", 2.0, r"shards\[1\]\.records: expected a number"),
        ("shards.1.records", 0, r"shards\[1\]\.starts\.records: expected numbers from 0 to -1"),
        ("shards.1.mark", None, r"shards\[1\]\.mark: expected a string"),
        ("shards.1.starts", [], r"shards\[1\]\.starts: expected an object"),
        ("shards.1.starts.records", [], r"shards\[1\]\.starts: expected as many records as bytes"),
        ("shards.1.starts.records", [1], r"shards\[1\]\.starts\.records: expected 0 first"),
        ("shards.1.starts.records", [0.0], r"shards\[1\]\.starts\.records: expected a list of numbers"),
        ("shards.1.starts.bytes", ["0"], r"shards\[1\]\.starts\.bytes: expected a list of numbers"),
        ("shards.1.starts.bytes", [99], r"shards\[1\]\.starts\.bytes: expected numbers from 0 to 13"),
        ("shards.1.starts.bytes", [1 << 80], r"shards\[1\]\.starts\.bytes: expected numbers"),
        ("shards.2.starts.bytes", [0, 0], r"shards\[2\]\.starts\.bytes: expected increasing numbers"),
        ("shards.1.starts.bytes", "0" * 999, r"found '0{59}\.\.\."),
    ],
)
def test_a_hostile_manifest_is_refused_by_key(
    folder: Path, path: str, value: object, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 14)
    out = folder / "shards.json"
    assert main([str(folder), "--out", str(out)]) == 0
    out.write_text(json.dumps(change(json.loads(out.read_text()), path, value)))
    with pytest.raises(DataError, match=f"^{out} is not a manifest of shards: .*{told}"):
        Records(manifest=str(out))


@pytest.mark.parametrize("text", ["", "{", "[]", "1" * 5000, "[" * 100_000, '"\udcff"', '{"format": 1, "\\u001b": 0}'])
def test_a_line_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=f"^{tmp_path}/m.json is not a manifest of shards: "):
        Records(manifest=f"{tmp_path}/m.json")


def test_a_manifest_of_nothing_is_refused(folder: Path) -> None:
    out = folder / "m.json"
    out.write_text(json.dumps({"format": 1, "kind": "jsonl", "complete": True, "shards": []}))
    with pytest.raises(DataError, match=r"m\.json: no record in 0 shards"):
        Records(manifest=str(out))


def test_a_shard_that_is_gone_is_reported(folder: Path) -> None:
    assert main([str(folder), "--out", f"{folder}/s.json"]) == 0
    (folder / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: FileNotFoundError"):
        Records(manifest=f"{folder}/s.json")[0]

"""Plain values from JSON and YAML that a stranger may have written."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.errors import ConfigError, RunnerError, StorageError
from runner.plain import MAX_DEPTH, parse, parse_object
from runner.run.directory import RunDirectory


def test_values_are_parsed_as_json() -> None:
    value = {"a": [1, -2.5, None, True, "x\u001b"], "b": {"c": 10**299}}
    assert parse(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff", b"9" * 301, b"-" + b"9" * 5000, b"[" * 100_000, b"[" * 101 + b"]" * 101, b'{"a":' * 200],
    ids=lambda raw: f"{raw[:3]!r}*{len(raw)}",
)
def test_unusable_values_are_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(raw)
    assert parse_object(raw) is None


def test_levels_up_to_the_bound_are_taken() -> None:
    raw = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(parse(raw)).encode() == raw


@pytest.mark.parametrize("value", ["1:30", "2001-01-01", "0x10", "=", "<<", "null", "1e3", "&a", "!x", "", " a: b\n"])
def test_a_text_that_looks_like_something_else_is_stored(value: str, tmp_path: Path) -> None:
    identity = {"seed": 2**64, "model": {value: [value, 1.5, float("inf"), None, False, -1]}}
    directory = RunDirectory.under(str(tmp_path), "e", "v")
    directory.create(identity, parent=None)
    assert directory.configuration() == identity


@pytest.mark.parametrize("value", [10**400, -(10**300), b"bytes", {1, 2}])
def test_a_configuration_that_could_not_be_read_is_not_stored(value: Any, tmp_path: Path) -> None:
    directory = RunDirectory.under(str(tmp_path), "e", "v")
    with pytest.raises(ConfigError, match="cannot be stored"):
        directory.create({"seed": 1, "model": {"a": value}}, parent=None)
    assert not (tmp_path / "e/v/config.yaml").exists()


@pytest.mark.parametrize(
    "text", ["!!binary AAAA", "!!set {a}", "2001-01-01", "1:1", "1:1.5", "&a x", "!x y", "0b" + "1" * 999]
)
def test_a_kind_of_value_that_is_never_stored_is_refused(text: str, tmp_path: Path) -> None:
    directory = RunDirectory.under(str(tmp_path), "e", "v")
    directory.create({"seed": 1}, parent=None)
    path = tmp_path / "e/v/config.yaml"
    path.write_text(f"seed: {text}\n")
    if text == "&a x":
        assert directory.configuration() == yaml.safe_load(path.read_text())
        return
    with pytest.raises(StorageError, match="which no stored configuration has"):
        directory.configuration()


def test_an_error_never_moves_the_cursor() -> None:
    assert str(RunnerError("a\x1b[2J\x9b\u202e\nb")) == "a\\x1b[2J\\x9b\\u202e\nb"

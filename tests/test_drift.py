"""Differences between two configurations."""

from typing import Any

import pytest

from runner.config.identity import ABSENT, ChangedKey, compare
from runner.run.opening import drift_table


def test_equal_configurations_have_no_differences() -> None:
    tree = {"model": {"width": 8, "hidden": [1, 2]}, "seed": 0}
    assert compare(tree, {"seed": 0, "model": {"hidden": [1, 2], "width": 8}}) == []


def test_differences_are_named_by_dotted_key_in_order() -> None:
    saved = {"seed": 0, "model": {"width": 8, "depth": 2}}
    now = {"seed": 1, "model": {"width": 16, "depth": 2}}
    assert compare(saved, now) == [ChangedKey("model.width", 8, 16), ChangedKey("seed", 0, 1)]


def test_a_key_of_one_side_only_is_a_difference() -> None:
    assert compare({"a": None}, {}) == [ChangedKey("a", None, ABSENT)]
    assert compare({}, {"a": {"b": 1}}) == [ChangedKey("a.b", ABSENT, 1)]
    assert compare({"a": {}}, {"a": {"b": 1}}) == [ChangedKey("a", {}, ABSENT), ChangedKey("a.b", ABSENT, 1)]


@pytest.mark.parametrize(
    ("saved", "now"), [(1, 1.0), (0.1, 0.1), ([1, 2.0], [1.0, 2]), ("", ""), (None, None), ([{"a": 1}], [{"a": 1.0}])]
)
def test_equal_numbers_are_equal_however_yaml_wrote_them(saved: Any, now: Any) -> None:
    assert compare({"x": saved}, {"x": now}) == []


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (1, True),
        (0, False),
        (False, None),
        (1, "1"),
        (None, "null"),
        ([1], [True]),
        ([1], [1, 1]),
        ([[1]], [[True]]),
        ([{"a": 1}], [{"a": True}]),
        ([{"a": 1}], [{"b": 1}]),
        ([], {}),
        ("a", "A"),
    ],
)
def test_unlike_values_differ(saved: Any, now: Any) -> None:
    assert compare({"x": saved}, {"x": now}) == [ChangedKey("x", saved, now)]


def test_the_table_shows_key_and_both_values() -> None:
    lines = drift_table(compare({"lr": 0.1, "old": "x"}, {"lr": 1e-3, "new": None})).splitlines()
    assert [line.split() for line in lines[:1] + lines[2:]] == [
        ["key", "saved", "now"],
        ["lr", "0.1", "0.001"],
        ["new", "(absent)", "None"],
        ["old", "'x'", "(absent)"],
    ]


def test_values_are_shown_as_they_are() -> None:
    """Neither rounded nor aligned as numbers, and a text of digits is not shown as a number."""
    shown = drift_table([ChangedKey("x", "1", 1), ChangedKey("y", 1e-10, 0.30000000000000004)])
    assert "'1'" in shown
    assert "1e-10" in shown
    assert "0.30000000000000004" in shown


def test_values_of_a_stranger_cannot_drive_the_terminal() -> None:
    shown = drift_table(compare({"a\x1b[2J": "\x1b]0;title\x07"}, {"b": "\r"}))
    assert all(character.isprintable() for line in shown.split("\n") for character in line)
    assert r"a\x1b[2J" in shown


def test_a_value_that_an_interpolation_replaces_is_hidden() -> None:
    changes = compare({"key": "hunter2", "url": "${oc.env:URL}"}, {"key": "${oc.env:KEY}", "url": "${oc.env:HOST}"})
    assert changes == [ChangedKey("key", "***", "${oc.env:KEY}"), ChangedKey("url", "${oc.env:URL}", "${oc.env:HOST}")]
    assert compare({}, {"key": "${oc.env:KEY}"}) == [ChangedKey("key", ABSENT, "${oc.env:KEY}")]

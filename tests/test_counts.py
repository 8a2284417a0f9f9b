"""Counts of kills, faults and corruptions add up, and cost nothing unless a file for them is named."""

import re
from pathlib import Path

import counts
import pytest


def test_counts_of_all_processes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(counts.VARIABLE, str(tmp_path / "counts"))
    for number in (3, 1000):
        counts.count("kills", number)
    counts.count("faults")
    numbers = counts.totals(tmp_path / "counts")
    assert numbers == {"kills": 1003, "faults": 1}
    assert "| kills | 1,003 |" in counts.table(numbers)
    assert "| corruptions | 0 |" in counts.table(numbers)


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(counts.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    counts.count("kills")
    assert not list(tmp_path.iterdir())


def test_a_count_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="'murders' is not counted; there are kill points, kills"):
        counts.count("murders")


def test_the_readme_of_the_tests_names_tests_that_exist() -> None:
    folder = Path(__file__).parent
    named = set(re.findall(r"`(test_\w+)`", (folder / "README.md").read_text()))
    tests = "\n".join(path.read_text() for path in folder.glob("test_*.py"))
    assert named
    assert not {name for name in named if f"def {name}(" not in tests}

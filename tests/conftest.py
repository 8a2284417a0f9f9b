"""Fixtures of all tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "user"))
sys.path.insert(0, str(Path(__file__).parent))

from lives import Lives, lives


@pytest.fixture(scope="session")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Call it to live one process life of the runner, and to end it as you please."""
    with lives(tmp_path_factory.mktemp("lives")) as server:
        yield server

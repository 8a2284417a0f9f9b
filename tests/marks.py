"""Marks of single cases of a parametrised test."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that the tests of seconds leave out: a further one of what another case shows."""
    return pytest.param(*values, marks=pytest.mark.slow)


def quick_first(values: Any, *quick: Any) -> list[Any]:
    """All cases, of which those not named ``quick`` are slow."""
    return [value if value in quick else slow(value) for value in values]

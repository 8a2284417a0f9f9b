"""The pytest plugin. It is outside of the package, which a ``runner.py`` of the user's may hide: then nothing is
imported, and only a test that asks for the fixture fails.
"""

from importlib.util import find_spec

import pytest

_spec = find_spec("runner")
_HIDDEN = "{} hides the package runner of hydra-runner: rename it, or start pytest by its own command, not python -m"

if _spec is not None and _spec.submodule_search_locations:
    from runner.verify.fixtures import assert_resumes as assert_resumes
else:

    @pytest.fixture
    def assert_resumes() -> None:
        """Fails, and says why."""
        pytest.fail(_HIDDEN.format(_spec.origin if _spec else "something"), pytrace=False)

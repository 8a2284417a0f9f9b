"""The pytest plugin: a fixture that proves experiments in servers which all tests of a session share. It is outside of
the package, which a ``runner.py`` of the user's may hide: then only a test that asks for the fixture fails.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

_HIDDEN = "{} hides the package runner of hydra-runner: rename it, or start pytest by its own command, not python -m"


@pytest.fixture(scope="session")
def assert_resumes() -> Iterator[Callable[..., None]]:
    """``runner.verify.assert_resumes`` with servers of the session, which begin at the first call in a folder, with the
    environment of that moment.
    """
    spec = find_spec("runner")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(_HIDDEN.format(spec.origin if spec else "something"), pytrace=False)
    with ExitStack() as stack:
        calls: dict[str, Callable[..., None]] = {}

        def call(*command: str, **options: object) -> None:
            from runner import verify
            from runner.verify.execution import fork_servers

            if os.getcwd() not in calls:
                servers = stack.enter_context(fork_servers(Path.cwd()))
                calls[os.getcwd()] = partial(verify.assert_resumes, servers=servers)
            calls[os.getcwd()](*command, **options)

        yield call

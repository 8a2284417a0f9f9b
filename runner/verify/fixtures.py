"""The pytest plugin: a fixture that proves experiments in servers which all tests of a session share."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from runner import verify


@pytest.fixture(scope="session")
def assert_resumes() -> Iterator[Callable[..., None]]:
    """``runner.verify.assert_resumes`` with servers of the session, which begin at the first call in a folder, with the
    environment of that moment.
    """
    with ExitStack() as stack:
        calls: dict[str, Callable[..., None]] = {}

        def call(*command: str, **options: object) -> None:
            if os.getcwd() not in calls:
                from runner.verify.execution import fork_servers

                servers = stack.enter_context(fork_servers(Path.cwd()))
                calls[os.getcwd()] = partial(verify.assert_resumes, servers=servers)
            calls[os.getcwd()](*command, **options)

        yield call

"""Prove that an experiment resumes exactly: in real processes, with real kills, to the bit."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.verify.execution import Servers

__all__ = ["assert_resumes"]


def assert_resumes(*command: str, servers: "Servers | None" = None, **options: Any) -> None:
    """Raise AssertionError with the verdict's text unless the experiment of a command resumes exactly.

    ``command`` are the arguments of ``python -m runner``; ``options`` are those of ``verify.*``, without the prefix.
    Raises ConfigError at once for a command that cannot run. The pytest fixture ``assert_resumes`` does the same for
    many tests, faster: its ``servers``, in which everything is imported, are those of the whole session.

        def test_my_experiment_resumes(assert_resumes):
            assert_resumes("experiment=mine", minutes=2)
    """
    from runner.verify.options import check, parse

    values = [f"verify.{name}={json.dumps(value, default=str)}" for name, value in options.items()]
    parsed, rest, _ = parse([*command, *values])
    if servers is None:
        check(rest)
    from runner.verify.proof import prove

    verdict = prove(rest, parsed, progress=lambda line: print(line, file=sys.stderr), servers=servers)
    if not verdict.holds:
        raise AssertionError(f"{' '.join(command)} does not resume exactly\n{verdict.text()}")
